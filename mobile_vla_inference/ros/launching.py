"""Shared by the launch files: every argument and program is checked before the first process starts.

launch reports an exception, but does not end the processes that it has started; so nothing must fail after the first
node.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ament_index_python.packages import PackageNotFoundError, get_package_prefix
from rclpy.exceptions import NameValidationException
from rclpy.expand_topic_name import expand_topic_name
from rclpy.validate_full_topic_name import validate_full_topic_name
from rclpy.validate_namespace import validate_namespace

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.ros.parameter_files import expand_home, file_parameters
from mobile_vla_inference.ros.startup import END_WITH, without_places

if TYPE_CHECKING:  # the PyPI wheels of ROS 2 contain no launch
    from launch import Action, LaunchContext, LaunchDescription, LaunchDescriptionEntity
    from launch.actions import DeclareLaunchArgument
    from launch.events.process import ProcessExited

#: Arguments that `ros2 launch` itself adds for every launch file.
_OF_LAUNCH = {"launch-prefix", "launch-prefix-filter"}


class ArgumentError(MobileVlaError):
    """A launch argument can't be used."""


def description(
    file: str,
    declared: Sequence[DeclareLaunchArgument],
    *actions: LaunchDescriptionEntity,
    included: Iterable[DeclareLaunchArgument] = (),
) -> LaunchDescription:
    """Return the description of a launch file: its arguments, a check for unknown ones, then `actions`.

    Args:
        file: path of the launch file.
        declared: its arguments.
        actions: what it does afterwards.
        included: arguments of the launch file that it includes.
    """
    from launch import LaunchDescription
    from launch.actions import OpaqueFunction

    check = OpaqueFunction(function=_refuse_unknown_arguments, args=[file, [*declared, *included]])
    return LaunchDescription([*declared, check, *actions])


def argument_values(context: LaunchContext) -> Callable[[str], str]:
    """Return a function that returns the value of an argument by its name."""
    from launch.substitutions import LaunchConfiguration

    return lambda name: LaunchConfiguration(name).perform(context)


def _refuse_unknown_arguments(context: LaunchContext, file: str, declared: Iterable[DeclareLaunchArgument]) -> None:
    """Refuse an argument that the launch file doesn't have: launch would ignore it, and with it a limit or a file.

    Only if the file is the one on the command line: a file that includes it has arguments of its own.
    """
    words = sys.argv[1:]
    if not any(Path(word).name == Path(file).name for word in words):
        return
    known = {argument.name for argument in declared}
    given = [word.partition(":=")[0] for word in words if ":=" in word]
    unknown = [name for name in given if name not in known | _OF_LAUNCH]
    if unknown:
        raise ArgumentError(
            f"{Path(file).name} has no argument {', '.join(map(repr, unknown))}, expected {', '.join(sorted(known))}; "
            "correct it; a parameter of vla_node goes into a file for params_file"
        )


def required_program(package: str, program: str, needed_for: str) -> None:
    """Check that a program is installed.

    Raises:
        ArgumentError: it is not; the sentence contains what needs it and how to install it.
    """
    try:
        found = (Path(get_package_prefix(package)) / "lib" / package / program).is_file()
    except PackageNotFoundError:
        found = False
    if not found:
        distribution = os.environ.get("ROS_DISTRO", "DISTRO")
        raise ArgumentError(
            f"{needed_for} needs {program} of the package {package}, which is not installed; "
            f"sudo apt install ros-{distribution}-{package.replace('_', '-')}"
        )


def flag(name: str, text: str) -> bool | None:
    """Return an argument that is true, false or empty (None)."""
    if not text:
        return None
    if text.lower() not in ("true", "false"):
        raise ArgumentError(f"{name}:={text} can't be used, expected true or false; correct it")
    return text.lower() == "true"


def number(name: str, text: str, kind: type[int] | type[float]) -> Any:
    """Return an argument as a number above zero."""
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e6:
        expected = "a whole number" if kind is int else "a number"
        raise ArgumentError(f"{name}:={text} can't be used, expected {expected} above 0; correct it")
    return value


def full_namespace(context: LaunchContext) -> str:
    """Return the full namespace of the argument `namespace`, inside the one of the including file."""
    text = argument_values(context)("namespace")
    outer = context.launch_configurations.get("ros_namespace", "")
    namespace = text if text.startswith("/") else f"{outer.rstrip('/')}/{text}"
    namespace = f"/{namespace.strip('/')}"
    try:
        validate_namespace(namespace)
    except NameValidationException as error:
        raise ArgumentError(_bad_name("namespace", text, error)) from error
    return namespace


def check_topic(name: str, text: str, namespace: str) -> None:
    """Check that an argument is the name of a topic."""
    try:
        validate_full_topic_name(expand_topic_name(text, "vla_node", namespace))
    except (NameValidationException, ValueError) as error:
        raise ArgumentError(_bad_name(name, text, error)) from error


def parameter_files(name: str, text: str, node: str) -> tuple[list[str], dict[str, Any]]:
    """Return the parameter files of an argument, separated by commas, and the parameters that they give a node.

    Raises:
        ArgumentError: one is missing or contains nothing for the node.
    """
    files = [expand_home(each.strip()) for each in text.split(",") if each.strip()]
    given: dict[str, Any] = {}
    for file in files:
        try:
            given.update(file_parameters(file, node))
        except MobileVlaError as error:
            raise ArgumentError(f"{name}:={text} can't be used: {error}") from error
    return files, given


def end_with_launch() -> list[str]:
    """Return the arguments that make a node of this package end, with a final zero, however the launch ends."""
    return [END_WITH, str(os.getpid())]


def required(name: str) -> Callable[[ProcessExited, LaunchContext], Any]:
    """Return the `on_exit` of a node that the launch needs: the launch ends with it, and fails if the node failed."""

    def on_exit(event: ProcessExited, context: LaunchContext) -> Any:
        from launch.actions import Shutdown

        if context.is_shutdown:
            return None
        if event.returncode != 0:
            # Nothing else gives `ros2 launch` an exit status other than 0.
            raise MobileVlaError(
                f"{name} ended with exit status {event.returncode}, expected it to run; see above for why"
            )
        return Shutdown(reason=f"{name} ended")

    return on_exit


def interrupt_at_shutdown(node: Action) -> Action:
    """Return an action that sends SIGINT to a node as soon as the launch ends.

    A launch in a terminal relies on the terminal for that; if the node gets no signal, it is ended 5 s later only.
    """
    from launch.actions import EmitEvent, RegisterEventHandler
    from launch.event_handlers import OnShutdown
    from launch.events import matches_action
    from launch.events.process import SignalProcess

    def interrupt(event: Any, context: LaunchContext) -> Action | None:
        has_started = "pid" in (node.process_details or {})
        return (
            EmitEvent(event=SignalProcess(signal_number=signal.SIGINT, process_matcher=matches_action(node)))
            if has_started
            else None
        )

    return RegisterEventHandler(OnShutdown(on_shutdown=interrupt))


def _bad_name(name: str, text: str, error: Exception) -> str:
    return f"{name}:={text} can't be used ({without_places(str(error))}); correct it"
