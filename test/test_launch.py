"""The launch files: described arguments always, and real launches with every argument where launch_ros is installed."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCH_FILES = sorted((REPOSITORY / "launch").glob("*.launch.py"))
MOBILE_VLA = REPOSITORY / "launch" / "mobile_vla.launch.py"
CAMERA = REPOSITORY / "launch" / "camera.launch.py"
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
    assert [CAMERA, MOBILE_VLA, TWIST_MUX] == LAUNCH_FILES


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
def test_every_argument_is_used_and_what_is_used_is_an_argument(path):
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    read = [call.args[0] for call in calls if getattr(call.func, "id", "") == "value"]
    named = {argument.value for argument in read if isinstance(argument, ast.Constant)}
    # The rest are read in a loop over their names.
    in_loops = {
        constant.value
        for loop in ast.walk(tree)
        if isinstance(loop, (ast.For, ast.comprehension)) and isinstance(loop.iter, ast.Tuple)
        for constant in loop.iter.elts
        if isinstance(constant, ast.Constant)
    }
    declared = set(declared_arguments(path))
    assert named <= declared <= named | in_loops


EXECUTABLES = {"vla_node": "node", "sim_robot": "sim_robot"}
#: Runs a node of this checkout, whatever is installed.
EXECUTABLE = """#!{python}
import sys
from mobile_vla_inference.ros.{module} import main
sys.exit(main())
"""


class Launch:
    """A launch in a process of its own; its log is kept."""

    def __init__(self, path: Path, arguments: tuple[str, ...], log: Path, prefix: Path) -> None:
        self._log = log
        prefixes = os.pathsep.join([str(prefix), *filter(None, [os.environ.get("AMENT_PREFIX_PATH")])])
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(path), *arguments],
                env={
                    **os.environ,
                    "AMENT_PREFIX_PATH": prefixes,
                    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
                    "ROS_LOG_DIR": str(log.parent / "ros_log"),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def refuses(self, *expected: str) -> None:
        """Require that it ends with a failure that says what is expected, and has started nothing."""
        assert self.process.wait(timeout=30) == 1, self.log
        for text in expected:
            assert text in self.log
        assert "process started" not in self.log
        assert "Traceback" not in self.log

    def started(self, name: str) -> int:
        """Return the process id of a node that it has started."""
        return int(re.search(rf"\[{name}-\d+\]: process started with pid \[(\d+)\]", self.log)[1])

    def stop(self) -> None:
        """End it as Ctrl-C does and require that it ends well."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(timeout=30) == 0, self.log
        assert "Traceback" not in self.log


@pytest.fixture
def stand_ins(tmp_path) -> Path:
    """Return a prefix with this checkout, and with rviz2 and twist_mux that only keep what they are called with."""
    prefix = tmp_path / "prefix"
    ours = {name: EXECUTABLE.format(python=sys.executable, module=module) for name, module in EXECUTABLES.items()}
    for package, programs in {
        "rviz2": {"rviz2": STAND_IN},
        "twist_mux": {"twist_mux": STAND_IN},
        "mobile_vla_inference": ours,
    }.items():
        marker = prefix / "share/ament_index/resource_index/packages" / package
        folder = prefix / "lib" / package
        for path in (marker.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        marker.touch()
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
    share = prefix / "share/mobile_vla_inference"
    share.mkdir()
    for folder in ("launch", "config"):
        (share / folder).symlink_to(REPOSITORY / folder)
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
@pytest.mark.parametrize(
    ("path", "argument", "expected"),
    [
        (MOBILE_VLA, "log_level:=loud", "log_level"),
        (MOBILE_VLA, "stamped:=maybe", "stamped:=maybe can't be used, expected true or false"),
        (MOBILE_VLA, "use_sim_time:=1", "use_sim_time:=1 can't be used"),
        (MOBILE_VLA, "namespace:=a-b", "namespace:=a-b can't be used"),
        (MOBILE_VLA, "image_topic:=/front/the-image", "image_topic:=/front/the-image can't be used"),
        (MOBILE_VLA, "cmd_vel_topic:=/base/", "cmd_vel_topic:=/base/ can't be used"),
        (MOBILE_VLA, "max_linear_x_mps:=0.1", "a parameter of vla_node goes into a file for params_file"),
        (MOBILE_VLA, "param_file:=slow.yaml", "has no argument 'param_file', expected autostart, checkpoint"),
        (CAMERA, "width:=abc", "width:=abc can't be used, expected a whole number above 0"),
        (CAMERA, "frame_rate_hz:=fast", "frame_rate_hz:=fast can't be used, expected a number above 0"),
        (CAMERA, "image_topic:=a-b", "image_topic:=a-b can't be used"),
        (TWIST_MUX, "cmd_vel_topic:=a-b", "cmd_vel_topic:=a-b can't be used"),
        (TWIST_MUX, "mux_params_file:=/not/there.yaml", "/not/there.yaml does not exist"),
        (TWIST_MUX, "params_file:=/not/there.yaml", "/not/there.yaml does not exist"),
        (TWIST_MUX, "paramsfile:=/not/there.yaml", "has no argument 'paramsfile'"),
    ],
)
def test_a_wrong_value_is_refused_by_name_before_anything_starts(start_launch, path, argument, expected):
    start_launch(path, argument).refuses(expected)


@needs_launch_ros
@pytest.mark.parametrize(
    ("path", "arguments", "missing"),
    [(MOBILE_VLA, ["rviz:=true", "sim:=true"], "rviz2"), (TWIST_MUX, ["sim:=true"], "twist_mux")],
)
def test_a_program_that_is_not_installed_is_reported_before_anything_starts(
    start_launch, stand_ins, tiny_checkpoint, path, arguments, missing
):
    (stand_ins / "lib" / missing / missing).unlink()
    launch = start_launch(path, f"checkpoint:={tiny_checkpoint}", *arguments)
    launch.refuses(f"package {missing}, which is not installed", "sudo apt install")


@needs_launch_ros
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        (
            "/vla_node: {ros__parameters: {max_linear_x_mps: 0.1}}\n",
            "contains nothing for /lab/vla_node, only for /vla_node",
        ),
    ],
)
def test_a_parameter_file_that_reaches_no_node_is_refused_before_anything_starts(
    start_launch, tiny_checkpoint, tmp_path, text, expected
):
    file = tmp_path / "slow.yaml"
    if text is not None:
        file.write_text(text)
    launch = start_launch(MOBILE_VLA, f"checkpoint:={tiny_checkpoint}", "namespace:=lab", f"params_file:={file}")
    launch.refuses(str(file), expected)


@needs_launch_ros
def test_a_launch_fails_and_ends_the_others_where_the_node_fails(start_launch):
    launch = start_launch(MOBILE_VLA, "checkpoint:=/not/there.pth", "sim:=true")
    assert launch.process.wait(timeout=60) == 1, launch.log
    assert "/not/there.pth does not exist" in launch.log
    assert "vla_node ended with exit status 2" in launch.log
    assert not Path(f"/proc/{launch.started('sim_robot')}").exists()


@needs_launch_ros
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_robot_stops_and_the_nodes_end_however_the_launch_ends(probe, start_launch, tiny_checkpoint, number):
    # The probe could send images, too: two cameras on one topic stop the robot.
    launch = start_launch(MOBILE_VLA, f"checkpoint:={tiny_checkpoint}", "sim:=true", "image_topic:=front/image")
    probe.instruct("go to the cup")
    probe.wait_for("motion", probe.is_moving, timeout_s=60.0)
    nodes = [os.pidfd_open(launch.started(name)) for name in ("vla_node", "sim_robot")]
    launch.process.send_signal(number)
    probe.wait_for("standstill", lambda: not probe.is_moving(), timeout_s=3.0)
    for node in nodes:
        ended, _, _ = select.select([node], [], [], 30.0)
        os.close(node)
        assert ended, launch.log
    assert not probe.is_moving()


@needs_launch_ros
def test_the_simulated_robot_gets_the_parameters_of_the_file(probe, start_launch, tiny_checkpoint, tmp_path):
    from geometry_msgs.msg import TwistStamped
    from ros_graph import is_zero

    file = tmp_path / "simulated.yaml"
    file.write_text("/**/vla_node: {ros__parameters: {use_sim_time: true, stamped: true}}\n")
    names = ("image_topic:=front/image", "cmd_vel_topic:=base/cmd_vel")
    start_launch(MOBILE_VLA, f"checkpoint:={tiny_checkpoint}", "sim:=true", f"params_file:={file}", *names)
    commands: list[TwistStamped] = []
    probe.node.create_subscription(TwistStamped, "base/cmd_vel", commands.append, 10)
    probe.instruct("go to the cup")
    probe.wait_for("motion", lambda: commands and not is_zero(commands[-1].twist), timeout_s=60.0)
    listeners = probe.node.get_subscriptions_info_by_topic("base/cmd_vel")
    types = {each.topic_type for each in listeners if each.node_name == "sim_robot"}
    assert types == {"geometry_msgs/msg/TwistStamped"}
    assert probe.node.count_publishers("/clock") == 1


@needs_launch_ros
def test_the_home_folder_may_be_written_as_a_tilde(probe, start_launch, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_checkpoint.parent))
    file = tiny_checkpoint.parent / "slow.yaml"
    file.write_text("/**/vla_node: {ros__parameters: {max_linear_x_mps: 0.125}}\n")
    start_launch(MOBILE_VLA, "checkpoint:=~/tiny.pth", "params_file:=~/slow.yaml")
    probe.wait_until_loaded()
    assert parameters_of(probe, "/vla_node", "max_linear_x_mps") == {"max_linear_x_mps": 0.125}


def test_the_unit_starts_a_launch_that_failed_again():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(REPOSITORY / "docker/mobile-vla.service")
    assert unit["Service"]["Restart"] == "on-failure"


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
