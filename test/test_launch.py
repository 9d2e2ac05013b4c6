"""The launch files: described arguments always, and real launches with every argument where launch_ros is installed."""

from __future__ import annotations

import ast
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCH_FILES = sorted((REPOSITORY / "launch").glob("*.launch.py"))
MOBILE_VLA = REPOSITORY / "launch" / "mobile_vla.launch.py"
TWIST_MUX = REPOSITORY / "launch" / "twist_mux.launch.py"

needs_launch_ros = pytest.mark.skipif(
    importlib.util.find_spec("launch_ros") is None, reason="launch_ros comes with a full ROS 2 only"
)

LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource

path, *arguments = sys.argv[1:]
service = LaunchService(argv=arguments)
service.include_launch_description(
    LaunchDescription(
        [
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(path),
                launch_arguments=[tuple(argument.split(":=", 1)) for argument in arguments],
            )
        ]
    )
)
sys.exit(service.run())
"""

#: Stands in for a program that a launch file starts: keeps its arguments and what its parameter files say.
STAND_IN = """#!/bin/sh
printf '%s\\n' "$@" > "$0.arguments.part"
while [ $# -gt 0 ]; do
    if [ "$1" = --params-file ]; then cat "$2" >> "$0.arguments.part"; fi
    shift
done
mv "$0.arguments.part" "$0.arguments"
exec sleep 600
"""


def declared_arguments(path: Path) -> dict[str, dict[str, ast.expr]]:
    """Return the keywords of every DeclareLaunchArgument in a launch file, by the argument's name."""
    return {
        call.args[0].value: {keyword.arg: keyword.value for keyword in call.keywords}
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "DeclareLaunchArgument"
    }


def test_there_are_launch_files():
    assert [REPOSITORY / "launch" / "camera.launch.py", MOBILE_VLA, TWIST_MUX] == LAUNCH_FILES


def test_the_arguments_are_those_that_the_documentation_names():
    expected = (
        "namespace params_file checkpoint processors dtype image_topic image_transport cmd_vel_topic stamped "
        "use_sim_time autostart log_level rviz sim"
    )
    assert set(declared_arguments(MOBILE_VLA)) == set(expected.split())


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_every_argument_is_described(path):
    for name, keywords in declared_arguments(path).items():
        assert len(ast.literal_eval(keywords["description"])) > 20, name


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_every_configuration_that_is_used_is_an_argument(path):
    used = {
        call.args[0].value
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "LaunchConfiguration"
    }
    assert used == set(declared_arguments(path))


class Launch:
    """A launch in a process of its own; its log is kept."""

    def __init__(self, path: Path, arguments: tuple[str, ...], log: Path, prefix: Path) -> None:
        self._log = log
        prefixes = os.pathsep.join([str(prefix), *filter(None, [os.environ.get("AMENT_PREFIX_PATH")])])
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(path), *arguments],
                env={**os.environ, "AMENT_PREFIX_PATH": prefixes, "ROS_LOG_DIR": str(log.parent / "ros_log")},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """End it as Ctrl-C does and require that it ends well."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(timeout=30) == 0, self.log
        assert "Traceback" not in self.log


@pytest.fixture
def stand_ins(tmp_path) -> Path:
    """Return a prefix in which rviz2 and twist_mux are programs that keep what they are called with."""
    prefix = tmp_path / "prefix"
    for name in ("rviz2", "twist_mux"):
        marker = prefix / "share/ament_index/resource_index/packages" / name
        program = prefix / "lib" / name / name
        for path in (marker, program):
            path.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        program.write_text(STAND_IN)
        program.chmod(0o755)
    return prefix


@pytest.fixture
def start_launch(tmp_path, stand_ins) -> Iterator[Callable[..., Launch]]:
    """Return what launches a file with arguments, in a process that ends with the test."""
    launches: list[Launch] = []

    def start(path: Path, *arguments: str) -> Launch:
        launches.append(Launch(path, arguments, tmp_path / f"launch{len(launches)}.log", stand_ins))
        return launches[-1]

    yield start
    for launch in launches:
        if launch.process.poll() is None:
            launch.process.send_signal(signal.SIGINT)
            try:
                launch.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                launch.process.kill()
                launch.process.wait()


def parameters_of(probe, node: str, *names: str) -> dict:
    """Return parameters of a running node by name."""
    from rcl_interfaces.srv import GetParameters
    from rclpy.parameter import parameter_value_to_python

    answer = probe.call(GetParameters, f"{node}/get_parameters", GetParameters.Request(names=list(names)))
    return dict(zip(names, map(parameter_value_to_python, answer.values)))


def types_published(probe, topic: str) -> list[str]:
    return [publisher.topic_type for publisher in probe.node.get_publishers_info_by_topic(topic)]


@needs_launch_ros
@pytest.mark.parametrize("transport", ["raw", "compressed"])
def test_a_real_launch_drives_the_simulated_robot(transport, tiny_checkpoint, probe, start_launch):
    from geometry_msgs.msg import Twist
    from ros_graph import RELIABLE, is_zero
    from std_msgs.msg import String

    launch = start_launch(
        MOBILE_VLA,
        f"checkpoint:={tiny_checkpoint}",
        "sim:=true",
        "namespace:=lab",
        "image_topic:=front/image",
        f"image_transport:={transport}",
        "cmd_vel_topic:=cmd_vel_policy",
    )
    commands: list[Twist] = []
    instructions = probe.node.create_publisher(String, "/lab/instruction", RELIABLE)
    probe.node.create_subscription(Twist, "/lab/cmd_vel_policy", commands.append, 10)
    probe.wait_for("the node", lambda: instructions.get_subscription_count() > 0 or launch.process.poll() is not None)
    assert launch.process.poll() is None, launch.log
    instructions.publish(String(data="go to the cup"))
    probe.wait_for("motion", lambda: commands and not is_zero(commands[-1]), timeout_s=60.0)
    launch.stop()


@needs_launch_ros
def test_every_argument_arrives_and_an_empty_one_leaves_the_files_alone(
    tiny_checkpoint, probe, start_launch, stand_ins, tmp_path
):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("/**/vla_node: {ros__parameters: {max_linear_x_mps: 0.1, image_transport: compressed}}\n")
    second.write_text("/**/vla_node: {ros__parameters: {max_linear_x_mps: 0.25, max_restarts: 1}}\n")
    launch = start_launch(
        MOBILE_VLA,
        f"params_file:={first},{second}",
        f"checkpoint:={tiny_checkpoint}",
        f"processors:={tmp_path}",
        "namespace:=lab",
        "image_topic:=/front/image",
        "cmd_vel_topic:=cmd_vel_policy",
        "stamped:=true",
        "use_sim_time:=true",
        "autostart:=false",
        "log_level:=debug",
        "rviz:=true",
    )
    topic = "/lab/cmd_vel_policy"
    probe.wait_for("the node", lambda: types_published(probe, topic) or launch.process.poll() is not None)
    assert launch.process.poll() is None, launch.log
    assert types_published(probe, topic) == ["geometry_msgs/msg/TwistStamped"]
    assert parameters_of(
        probe,
        "/lab/vla_node",
        *("checkpoint", "processors", "stamped", "use_sim_time", "autostart"),
        *("image_transport", "max_linear_x_mps", "max_restarts"),
    ) == {
        "checkpoint": str(tiny_checkpoint),
        "processors": str(tmp_path),
        "stamped": True,
        "use_sim_time": True,
        "autostart": False,
        "image_transport": "compressed",
        "max_linear_x_mps": 0.25,
        "max_restarts": 1,
    }
    probe.wait_for("the camera's subscriber", lambda: probe.node.count_subscribers("/front/image/compressed") == 1)
    called = stand_ins / "lib/rviz2/rviz2.arguments"
    probe.wait_for("RViz", called.exists)
    for expected in ("mobile_vla.rviz", "__ns:=/lab", "image_raw:=/front/image", "use_sim_time: true"):
        assert expected in called.read_text()
    launch.stop()
    assert "DEBUG" in launch.log


@needs_launch_ros
def test_a_wrong_value_is_refused_before_anything_starts(start_launch):
    launch = start_launch(MOBILE_VLA, "log_level:=loud")
    assert launch.process.wait(timeout=30) != 0
    assert "log_level" in launch.log


@needs_launch_ros
def test_twist_mux_stands_between_the_policy_and_the_base(tiny_checkpoint, probe, start_launch, stand_ins):
    launch = start_launch(
        TWIST_MUX,
        f"checkpoint:={tiny_checkpoint}",
        "namespace:=lab",
        "cmd_vel_topic:=/base/cmd_vel",
        "stamped:=true",
        "autostart:=false",
    )
    topic = "/lab/cmd_vel_policy"
    probe.wait_for("the node", lambda: types_published(probe, topic) or launch.process.poll() is not None)
    assert launch.process.poll() is None, launch.log
    assert types_published(probe, topic) == ["geometry_msgs/msg/TwistStamped"]
    called = stand_ins / "lib/twist_mux/twist_mux.arguments"
    probe.wait_for("twist_mux", called.exists)
    for expected in ("__ns:=/lab", "cmd_vel_out:=/base/cmd_vel", "use_stamped: true", "topic: cmd_vel_policy"):
        assert expected in called.read_text()
    launch.stop()
