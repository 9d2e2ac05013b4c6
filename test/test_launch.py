"""The launch files: described arguments always, and a real launch that drives where launch_ros is installed."""

from __future__ import annotations

import ast
import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCH_FILES = sorted((REPOSITORY / "launch").glob("*.launch.py"))

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


def declared_arguments(path: Path) -> dict[str, dict[str, ast.expr]]:
    """Return the keywords of every DeclareLaunchArgument in a launch file, by the argument's name."""
    return {
        call.args[0].value: {keyword.arg: keyword.value for keyword in call.keywords}
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "DeclareLaunchArgument"
    }


def test_there_are_launch_files():
    assert REPOSITORY / "launch/mobile_vla.launch.py" in LAUNCH_FILES


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


@pytest.mark.skipif(importlib.util.find_spec("launch_ros") is None, reason="launch_ros comes with a full ROS 2 only")
@pytest.mark.parametrize("transport", ["raw", "compressed"])
def test_a_real_launch_drives_the_simulated_robot(transport, tiny_checkpoint, tmp_path):
    from geometry_msgs.msg import Twist
    from ros_graph import RELIABLE, Probe, is_zero
    from std_msgs.msg import String

    arguments = (
        f"checkpoint:={tiny_checkpoint}",
        "sim:=true",
        "namespace:=lab",
        "image_topic:=front/image",
        f"image_transport:={transport}",
        "cmd_vel_topic:=cmd_vel_policy",
    )
    log = tmp_path / "launch.log"
    with log.open("wb") as output:
        launched = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(LAUNCH_FILES[0]), *arguments], stdout=output, stderr=subprocess.STDOUT
        )
    probe = Probe()
    try:
        commands: list[Twist] = []
        instructions = probe.node.create_publisher(String, "/lab/instruction", RELIABLE)
        probe.node.create_subscription(Twist, "/lab/cmd_vel_policy", commands.append, 10)
        probe.wait_for("the node", lambda: instructions.get_subscription_count() > 0 or launched.poll() is not None)
        assert launched.poll() is None, log.read_text()
        instructions.publish(String(data="go to the cup"))
        probe.wait_for("motion", lambda: commands and not is_zero(commands[-1]), timeout_s=60.0)
        launched.send_signal(signal.SIGINT)
        assert launched.wait(timeout=30) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        launched.kill()
        launched.wait()
        probe.close()
