"""Start ROS for a node: check its arguments and parameter files, its log folder, and the launch that it ends with.

rclpy answers a bad argument with a traceback, and ignores parameters that reach no node; here each is one sentence.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import rclpy
from rclpy.exceptions import NameValidationException
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args
from rclpy.validate_namespace import validate_namespace

from mobile_vla_inference.control.output_pump import OutputPump
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.process_lifetime import signal_on_parent_exit
from mobile_vla_inference.ros.parameter_files import file_parameters, is_for

#: The option with which a launch file makes a node end together with the launch process.
END_WITH = "--end-with"

#: ROS arguments that are followed by a value.
_WITH_VALUE = {
    *("-r", "--remap", "-p", "--param", "--params-file", "-e", "--enclave"),
    *("--log-level", "--log-config-file", "--log-file-name"),
}
#: The expected arguments, by the name that rcl uses for them in its messages.
_EXPECTED = {
    "remap rule": "-r FROM:=TO with names of letters, digits, _ and /, none of which begins with a digit",
    "parameter override rule": "-p NAME:=VALUE, a list with values of one type",
    "params file": "YAML as in config/mobile_vla.yaml",
    "log level": "debug, info, warn, error or fatal",
}
_COULD_NOT_PARSE = re.compile(r"Couldn't parse (?P<kind>[\w ]+): '(?P<argument>.*)'\. Error: (?P<reason>.*)", re.DOTALL)
#: Reasons of rcl that do not help a reader.
_NO_REASON = re.compile(r"error not set|.*lexeme type.*")


def start_ros(
    node_name: str, description: str, args: Sequence[str] | None = None, output: OutputPump | None = None
) -> None:
    """Check the command line, tie the process to its launch, and initialise rclpy without its signal handlers.

    Args:
        node_name: the name that the node has unless it is remapped.
        description: shown by `--help`.
        args: like sys.argv, the default.
        output: writes the log file instead of rclpy, which holds the global interpreter lock while it writes: a disk
            that hangs would stop every thread. None: rclpy writes it.

    Raises:
        MobileVlaError: an argument or a parameter file can't be used, or the launch has ended already.
    """
    argv = list(sys.argv if args is None else args)
    own, given = _split(argv)
    options = _parse(node_name, description, own)
    if options.end_with is not None:
        _end_with(options.end_with)
    _check_parameters(node_name, given)
    try:
        remove_ros_args(args=argv)  # parses them as init does, but logs nothing besides the exception
        rclpy.init(
            args=[*argv, *_log_arguments(node_name, output)],
            signal_handler_options=SignalHandlerOptions.NO,
        )
    except RuntimeError as error:  # rclpy has no public exception class for arguments that it can't parse
        raise MobileVlaError(_explained(str(error), argv)) from error


def full_name(node_name: str, given: Sequence[tuple[str, str]]) -> str:
    """Return a node's full name after the remap rules among ROS arguments, as rcl does: the first that matches counts.

    Raises:
        MobileVlaError: the namespace is not valid.
    """
    name, namespace = "", ""
    for flag, rule in given:
        if flag not in ("-r", "--remap"):
            continue
        match = re.fullmatch(rf"(?:{re.escape(node_name)}:)?(__node|__name|__ns):=(.*)", rule)
        if match is None:
            continue
        if match[1] == "__ns":
            namespace = namespace or match[2]
        else:
            name = name or match[2]
    namespace = namespace or "/"
    try:
        validate_namespace(namespace)
    except NameValidationException as error:
        reason = without_places(str(error))
        raise MobileVlaError(f"namespace {namespace} can't be used ({reason}); correct -r __ns:={namespace}") from error
    return f"{namespace.rstrip('/')}/{name or node_name}"


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the arguments that are not for ROS, and those for ROS that have a value, as (flag, value)."""
    own: list[str] = []
    given: list[tuple[str, str]] = []
    words: Iterator[str] = iter(argv[1:])
    is_ros = False
    for word in words:
        if word == "--ros-args":
            is_ros = True
        elif not is_ros:
            own.append(word)
        elif word == "--":
            is_ros = False
        elif word in _WITH_VALUE:
            given.append((word, next(words, "")))
    return own, given


def _parse(node_name: str, description: str, own: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=node_name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        END_WITH,
        type=int,
        metavar="PID",
        help="exit as on SIGTERM when the process with this id has ended; the launch files pass their own id",
    )
    options, unknown = parser.parse_known_args(own)
    if unknown:
        raise MobileVlaError(
            f"argument {' '.join(unknown)} is unknown, expected -p NAME:=VALUE, -r FROM:=TO or --params-file FILE "
            "after --ros-args; correct it"
        )
    return options


def _end_with(pid: int) -> None:
    """End as on SIGTERM when the launch has ended for any reason: it could not stop the robot any more."""
    # The kernel sends the signal at the end of the parent's thread: launch starts its processes in its main thread.
    signal_on_parent_exit(signal.SIGTERM)
    # With a prefix such as a shell between launch and node, launch is not the parent, so it is watched as well.
    with contextlib.suppress(OSError):  # it has ended (reported below), or the kernel is older than 5.3
        launch = os.pidfd_open(pid)
        threading.Thread(target=_follow, args=(launch,), name="launch", daemon=True).start()
    if pid not in (parent.pid for parent in psutil.Process().parents()):
        raise MobileVlaError(f"process {pid} has ended, expected the launch that started this node; launch it again")


def _follow(process_fd: int) -> None:
    """Wait for the end of a process, then end this one as on SIGTERM."""
    select.select([process_fd], [], [])
    os.kill(os.getpid(), signal.SIGTERM)


def _check_parameters(node_name: str, given: Sequence[tuple[str, str]]) -> None:
    """Refuse parameters that would not reach the node, which would run with its defaults."""
    node = full_name(node_name, given)
    for flag, value in given:
        if flag == "--params-file":
            file_parameters(value, node)
        elif flag in ("-p", "--param"):
            target, _, name = value.partition(":=")[0].rpartition(":")
            if target and not is_for(target, node):
                raise MobileVlaError(
                    f"argument {flag} {value} is for {target}, expected {node}; write {flag} {name}:=VALUE"
                )


def _log_arguments(node_name: str, output: OutputPump | None) -> list[str]:
    """Prepare the log file; return the ROS arguments with which a node runs if its log folder can't be written."""
    folder = _log_folder()
    try:
        if folder is None:
            raise OSError("HOME is not set")
        folder.mkdir(parents=True, exist_ok=True)
        if output is None:
            with tempfile.TemporaryFile(dir=folder):
                return []
        output.add_file(folder / f"{node_name}_{os.getpid()}_{time.time_ns() // 1_000_000}.log")
    except OSError as error:
        print(
            f"{node_name}: warning: log folder {folder or '~/.ros/log'} can't be written "
            f"({error.strerror or error}), so the log goes to the console and /rosout only; "
            "set ROS_LOG_DIR to a folder that can be written",
            file=sys.stderr,
        )
    return ["--ros-args", "--disable-external-lib-logs"]


def _log_folder() -> Path | None:
    """Return the folder of rcl's log (rcl_logging_get_logging_directory); None if it is unknown."""
    folder = Path(os.environ.get("ROS_LOG_DIR") or Path(os.environ.get("ROS_HOME") or "~/.ros") / "log")
    if folder.parts[0] != "~":
        return folder
    home = os.environ.get("HOME")
    return Path(home, *folder.parts[1:]) if home else None


def without_places(message: str) -> str:
    """Return a message of rcl on one line, without the lines of its source code."""
    return " ".join(re.sub(r",? at /[^\s,]+", "", message).split())


def _explained(message: str, argv: Sequence[str]) -> str:
    """Return rcl's message about arguments as one sentence."""
    text = without_places(message)
    if text.startswith("["):  # UnknownROSArgsError: a list of the arguments
        unknown = " ".join(ast.literal_eval(text))
        return f"ROS argument {unknown} is unknown, expected {', '.join(sorted(_WITH_VALUE))}; correct it"
    match = _COULD_NOT_PARSE.search(text)
    if match is None or match["kind"] not in _EXPECTED:
        return f"ROS can't be started with {' '.join(argv[1:])} ({text}); correct it"
    reason = "" if _NO_REASON.fullmatch(match["reason"]) else f" ({match['reason']})"
    return f"argument {match['argument']} can't be used{reason}, expected {_EXPECTED[match['kind']]}; correct it"
