"""The start of a node: arguments, parameter files, the log folder, and the process that it ends with."""

from __future__ import annotations

import itertools
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import rclpy
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter
from ros_graph import environment_with
from rosgraph_msgs.msg import Clock as ClockMessage

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.ros.clock import missing_clock
from mobile_vla_inference.ros.overrides import given_parameters
from mobile_vla_inference.ros.parameter_files import file_parameters
from mobile_vla_inference.ros.startup import full_name, start_ros

NODES = ("node", "sim_robot")

#: A parent that starts a node which ends with it, and prints the process id of the node.
PARENT = """
import os, subprocess, sys
prefix = sys.argv[1].split(" ") if sys.argv[1] else []
node = [sys.executable, "-m", "mobile_vla_inference.ros.node", "--end-with", str(os.getpid())]
child = subprocess.Popen([*prefix, *node, *sys.argv[2:]])
print(child.pid, flush=True)
child.wait()
"""


@contextmanager
def node_with(*ros_arguments: str, name: str = "vla_node") -> Iterator[Node]:
    """Make a node as rclpy does it with ROS arguments, in a context of its own."""
    context = Context()
    context.init(["test", "--ros-args", *ros_arguments])
    try:
        yield rclpy.create_node(name, context=context)
    finally:
        context.try_shutdown()


def run_node(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"mobile_vla_inference.ros.{module}", *arguments],
        env=environment_with(**environment),
        capture_output=True,
        text=True,
        timeout=60,
    )


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", NODES)
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--ros-args", "-p", "max_linear_x_mps=0.1"],
            "-p max_linear_x_mps=0.1 can't be used, expected -p NAME:=VALUE",
        ),
        (
            ["--ros-args", "-r", "cmd_vel:=/base/cmd-vel"],
            "-r cmd_vel:=/base/cmd-vel can't be used, expected -r FROM:=TO",
        ),
        (["--ros-args", "--params-file", "not_there.yaml"], "not_there.yaml does not exist"),
        (["-p", "max_linear_x_mps:=0.1"], "-p max_linear_x_mps:=0.1 is unknown, expected -p NAME:=VALUE"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_exit_status_2(module, arguments, expected):
    result = run_node(module, *arguments)
    assert result.returncode == 2
    (sentence,) = result.stderr.splitlines()
    assert expected in sentence


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--log-level", "loud"], "expected debug, info, warn, error or fatal"),
        (["-p", "action_scale:=[2, 2.5]"], "a list with values of one type"),
        (["-r", "__ns:=/lab/"], "namespace /lab/ can't be used"),
        (["-r", "cmd_vel:=a//b"], "-r cmd_vel:=a//b can't be used"),
        (["-p", "other_node:max_linear_x_mps:=0.1"], "is for other_node, expected /vla_node"),
        (["--wrong", "x"], "ROS argument --wrong x is unknown"),
    ],
)
def test_what_else_can_be_wrong_with_ros_arguments(arguments, expected):
    with pytest.raises(MobileVlaError) as refused:
        start_ros("vla_node", "", ["vla_node", "--ros-args", *arguments])
    assert expected in str(refused.value)
    assert "/src/" not in str(refused.value)


@pytest.mark.parametrize(
    "remaps",
    [
        [],
        ["__ns:=/lab"],
        ["__ns:=/lab/left", "__ns:=/other"],
        ["__node:=driver", "__name:=other"],
        ["vla_node:__ns:=/mine", "__ns:=/lab"],
        ["another:__ns:=/not_mine", "another:__node:=not_mine"],
    ],
)
def test_the_full_name_is_the_one_that_rcl_gives(remaps):
    given_arguments = [("-r", remap) for remap in remaps]
    with node_with(*itertools.chain.from_iterable(given_arguments)) as node:
        assert full_name("vla_node", given_arguments) == node.get_fully_qualified_name()


# ---- parameter files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("/lab/vla_node: {ros__parameters: {max_linear_x_mps: 0.1}}\n", "only for /lab/vla_node"),
        ("/**/vla: {ros__parameters: {max_linear_x_mps: 0.1}}\n", "only for /**/vla"),
        ("/**/vla_node: {ros__parameters: {}}\n", "contains no parameter of /vla_node"),
        ("/**/vla_node: {max_linear_x_mps: 0.1}\n", "contains 0.1 under /**/vla_node/max_linear_x_mps"),
        ("max_linear_x_mps: 0.1\n", "expected NODE: ros__parameters"),
        ("- 1\n", "expected NODE: ros__parameters"),
        ("a: [1\n", "is not YAML"),
    ],
)
def test_a_file_that_says_nothing_for_the_node_is_refused(tmp_path, text, expected):
    file = write(tmp_path / "parameters.yaml", text)
    with pytest.raises(MobileVlaError) as refused:
        start_ros("vla_node", "", ["vla_node", "--ros-args", "--params-file", file])
    assert expected in str(refused.value)
    assert file in str(refused.value)


def test_a_file_that_can_not_be_read_is_refused(tmp_path):
    with pytest.raises(MobileVlaError, match="can't be read"):
        file_parameters(tmp_path, "/vla_node")
    (tmp_path / "latin.yaml").write_bytes("/**/vla_node: {ros__parameters: {checkpoint: \xe9}}".encode("latin-1"))
    with pytest.raises(MobileVlaError, match="not UTF-8"):
        file_parameters(tmp_path / "latin.yaml", "/vla_node")


NAMES = st.sampled_from(["vla_node", "lab", "left"])
PARTS = st.lists(st.sampled_from(["vla_node", "lab", "left", "*", "**"]), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PARTS, st.booleans(), st.booleans(), st.lists(NAMES, max_size=2))
def test_a_file_gives_a_node_what_rcl_makes_of_it(tmp_path, parts, leading_slash, nested, namespace):
    parameters: dict = {"ros__parameters": {"a": 1, "b": {"c": 2.5, "d": ["x"]}}}
    if nested:
        content = parameters
        for part in reversed(parts):
            content = {part: content}
    else:
        content = {"/" * leading_slash + "/".join(parts): parameters}
    file = write(tmp_path / "parameters.yaml", yaml.dump(content))
    with node_with("--params-file", file, "-r", f"__ns:=/{'/'.join(namespace)}") as node:
        expected = {name: parameter.value for name, parameter in given_parameters(node).items()}
        if expected:
            assert file_parameters(file, node.get_fully_qualified_name()) == expected
        else:
            with pytest.raises(MobileVlaError, match="contains nothing for"):
                file_parameters(file, node.get_fully_qualified_name())


# ---- the log folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["ROS_LOG_DIR", "ROS_HOME", "HOME"])
def test_a_log_folder_that_can_not_be_written_is_a_warning_and_the_node_goes_on(tmp_path, variable):
    write(tmp_path / "file", "")
    environment = {"ROS_LOG_DIR": "", "ROS_HOME": "", variable: str(tmp_path / "file/below")}
    result = run_node("node", "--ros-args", "-p", "checkpoint:=/not/there.pth", **environment)
    assert "log folder" in result.stderr
    assert str(tmp_path / "file/below") in result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == 2
    assert "/not/there.pth does not exist" in result.stderr + result.stdout


# ---- ending with the launch ------------------------------------------------------------------------------------------


#: A shell that stays between its parent and what it runs.
SHELL = r"""sh -c "$@";: shell"""


@pytest.fixture(params=["", SHELL], ids=["direct", "behind_a_shell"])
def parent(request, tiny_checkpoint, tmp_path) -> Iterator[tuple[subprocess.Popen, int]]:
    """Return a process and the id of the node that it has started and that ends with it."""
    with (tmp_path / "parent.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT, request.param, "--ros-args", "-p", f"checkpoint:={tiny_checkpoint}"],
            stdout=subprocess.PIPE,
            stderr=log,
        )
    node_pid = int(process.stdout.readline())
    while request.param and not (children := psutil.Process(node_pid).children()):
        assert process.poll() is None
    node_pid = children[0].pid if request.param else node_pid
    yield process, node_pid
    process.kill()
    process.wait()
    process.stdout.close()
    if Path(f"/proc/{node_pid}").exists():
        os.kill(node_pid, signal.SIGKILL)


def test_a_node_stops_and_ends_when_its_launch_is_killed(probe, parent):
    process, node_pid = parent
    node = os.pidfd_open(node_pid)  # it is no child of this process
    probe.drive()
    process.kill()
    probe.wait_for("standstill", lambda: not probe.is_moving())
    ended, _, _ = select.select([node], [], [], 30.0)
    os.close(node)
    assert ended, "the node lives on"
    assert not probe.is_moving()


def test_a_node_whose_launch_has_ended_already_does_not_start():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    result = run_node("node", "--end-with", str(ended.pid))
    assert result.returncode == 2
    assert f"process {ended.pid} has ended" in result.stderr


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_a_clock_that_is_not_published_is_reported_and_one_that_runs_is_not(probe):
    assert missing_clock(probe.node.get_clock()) == ""
    probe.node.set_parameters([Parameter("use_sim_time", value=True)])
    probe.wait_for("the sentence", lambda: "no node publishes /clock" in missing_clock(probe.node.get_clock()))
    clock = probe.node.create_publisher(ClockMessage, "/clock", 1)
    message = ClockMessage()
    message.clock.nanosec = 10
    probe.wait_for("time source", lambda: clock.get_subscription_count() > 0)
    clock.publish(message)
    probe.wait_for("the clock", lambda: missing_clock(probe.node.get_clock()) == "")
