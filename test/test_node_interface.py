"""vla_node's interface beyond the plain drive: transports, stamped commands, pictures, namespaces, time, lifecycle."""

from __future__ import annotations

import array
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from geometry_msgs.msg import TwistStamped
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import ParameterType, ParameterValue
from rcl_interfaces.srv import GetParameters, GetParameterTypes, ListParameters
from rclpy.parameter import parameter_value_to_python
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from ros_graph import BEST_EFFORT, Probe, is_zero
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from mobile_vla_inference.ros.conversions import image_to_rgb, rgb_to_compressed, rgb_to_image
from mobile_vla_inference.ros.parameters import NodeParameters, parameters_markdown

PICTURE = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)


@pytest.fixture
def probe_in() -> Iterator:
    """Return what makes a probe in a namespace."""
    probes: list[Probe] = []

    def make(namespace: str) -> Probe:
        probes.append(Probe(namespace))
        return probes[-1]

    yield make
    for probe in probes:
        probe.close()


def test_the_parameter_page_is_what_the_declarations_say():
    page = Path(__file__).parent.parent / "docs/parameters.md"
    assert page.read_text() == parameters_markdown(), (
        "write it anew: python -m mobile_vla_inference.ros.parameters > docs/parameters.md"
    )


def test_compressed_images_in_and_stamped_commands_out(probe, start_node):
    stamped: list[TwistStamped] = []
    start_node("-p", "image_transport:=compressed", "-p", "stamped:=true", "-r", "cmd_vel:=cmd_vel_stamped")
    probe.node.create_subscription(TwistStamped, "cmd_vel_stamped", stamped.append, 10)
    images = probe.node.create_publisher(CompressedImage, "image_raw/compressed", BEST_EFFORT)

    def publish() -> None:
        now = probe.node.get_clock().now().to_msg()
        images.publish(rgb_to_compressed(PICTURE, CompressedImage, now, "camera_optical_frame"))

    probe.node.create_timer(0.05, publish)
    probe.instruct("go")
    probe.wait_for("motion", lambda: bool(stamped) and not is_zero(stamped[-1].twist), timeout_s=60.0)
    assert stamped[-1].header.frame_id == "base_link"
    assert stamped[-1].header.stamp.sec > 0


def test_the_debug_image_shows_the_frame_and_the_command(probe, start_node):
    pictures: list[Image] = []
    start_node()
    probe.drive()
    probe.node.create_subscription(Image, "vla_node/debug_image", pictures.append, BEST_EFFORT)
    probe.wait_for("a picture", lambda: bool(pictures))
    shown = image_to_rgb(pictures[-1])
    assert shown.shape[1] >= PICTURE.shape[1]
    assert len(np.unique(shown)) > 2


def test_two_robots_on_one_graph_do_not_mix(probe_in, start_node):
    left, right = probe_in("/left"), probe_in("/right")
    start_node("-r", "__ns:=/left")
    start_node("-r", "__ns:=/right")
    left.drive()
    right.wait_for("the policy", lambda: right.value("policy", "state") == "ready", timeout_s=60.0)
    right.wait_for("a refusal", lambda: right.value("gate", "reason") == "no_instruction")
    assert all(is_zero(command) for _, command in right.commands)
    right.drive()
    left.instruct("")
    left.wait_for_standstill("no_instruction")
    assert right.is_moving()


def test_two_image_publishers_stop_it_until_one_leaves(probe, start_node):
    start_node()
    probe.drive()
    second = probe.node.create_publisher(Image, "image_raw", BEST_EFFORT)
    probe.wait_for_standstill("image_ambiguous")
    probe.node.destroy_publisher(second)
    probe.wait_for("motion", probe.is_moving)


def test_a_publisher_that_can_never_match_is_named(probe, start_node):
    start_node("-p", "image_reliability:=reliable")
    probe.node.create_publisher(Image, "image_raw", BEST_EFFORT)
    # A publisher may be seen before the node it belongs to.
    probe.wait_for("the mismatch", lambda: "/probe offers best effort" in (probe.value("image", "mismatch") or ""))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"encoding": "nonsense"}, "nonsense"),
        ({"step": 7}, "step"),
        ({"height": 0, "width": 0}, "0"),
        ({"height": 6000, "width": 8000, "step": 24000}, "8000"),
    ],
)
def test_an_image_that_lies_about_itself_stops_it_and_a_good_one_resumes(probe, start_node, changes, expected):
    start_node()
    probe.drive()
    probe.stop_images()
    message = rgb_to_image(PICTURE, Image, probe.node.get_clock().now().to_msg(), "camera_optical_frame")
    for field, value in changes.items():
        setattr(message, field, value)
    probe.images.publish(message)
    probe.wait_for("standstill", lambda: is_zero(probe.commands[-1][1]))
    probe.wait_for("the sentence", lambda: expected in (probe.value("image", "message") or ""))
    assert int(probe.value("image", "dropped_unreadable")) >= 1
    probe.start_images()
    probe.enable()
    probe.wait_for("motion", probe.is_moving)


def test_action_axes_change_live_and_a_wrong_number_is_refused(probe, start_node):
    start_node()
    probe.drive()

    def set_axes(*axes: str):
        value = ParameterValue(type=ParameterType.PARAMETER_STRING_ARRAY, string_array_value=axes)
        return probe.set_parameter("action_axes", value)

    refused = set_axes("linear.x")
    assert not refused.successful
    assert "action_axes" in refused.reason
    assert not set_axes("linear.x", "linear.q").successful
    assert set_axes("linear.x", "linear.y").successful
    probe.wait_for("sideways motion", lambda: probe.commands[-1][1].linear.y != 0.0)
    probe.wait_for("no turn any more", lambda: probe.commands[-1][1].angular.z == 0.0)


def dump(probe) -> dict:
    """Return every parameter of vla_node, as `ros2 param dump` asks for them and writes them."""
    names = probe.call(ListParameters, "vla_node/list_parameters", ListParameters.Request()).result.names
    answer = probe.call(GetParameters, "vla_node/get_parameters", GetParameters.Request(names=names))
    values = map(parameter_value_to_python, answer.values)
    return {name: list(value) if isinstance(value, array.array) else value for name, value in zip(names, values)}


def test_a_dump_of_the_parameters_can_be_started_with_again(probe, start_node, tmp_path):
    first = start_node("-p", "max_linear_x_mps:=0.125", "-p", "action_axes:=[linear.x, linear.y]")
    before = dump(probe)
    assert before["max_linear_x_mps"] == 0.125
    assert before["action_axes"] == ["linear.x", "linear.y"]
    assert before["action_scale"] == []
    assert {field.name for field in fields(NodeParameters)} < set(before)
    assert first.interrupt() == 0
    file = tmp_path / "dump.yaml"
    file.write_text(yaml.dump({"/vla_node": {"ros__parameters": before}}, default_flow_style=False))
    start_node("--params-file", str(file))
    assert dump(probe) == before


def test_an_empty_list_in_a_file_and_on_the_command_line_is_not_set(probe, start_node, tmp_path):
    file = tmp_path / "not_set.yaml"
    file.write_text("/**/vla_node: {ros__parameters: {action_axes: [], max_restarts: 1}}\n")
    start_node("--params-file", str(file), "-p", "action_scale:=[]", "-p", "autostart:=false")
    values = dump(probe)
    assert (values["action_axes"], values["action_scale"], values["max_restarts"]) == ([], [], 1)
    request = GetParameterTypes.Request(names=["action_axes", "action_scale"])
    types = probe.call(GetParameterTypes, "vla_node/get_parameter_types", request).types
    assert list(types) == [ParameterType.PARAMETER_STRING_ARRAY, ParameterType.PARAMETER_DOUBLE_ARRAY]


@pytest.mark.parametrize("name", ["action_axes", "action_scale"])
def test_an_array_can_be_set_back_to_not_set_live(probe, start_node, name):
    start_node("-p", "action_axes:=[linear.x, linear.y]", "-p", "action_scale:=[0.5, 0.5]")
    probe.drive()
    # `ros2 param set /vla_node action_axes "[]"` sends an empty array of bools.
    assert probe.set_parameter(name, ParameterValue(type=ParameterType.PARAMETER_BOOL_ARRAY)).successful
    assert dump(probe)[name] == []
    if name == "action_axes":
        probe.wait_for("a turn, as the policy says", lambda: probe.commands[-1][1].angular.z != 0.0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["max_linear_x_mps:=1"], "max_linear_x_mps is 1, expected a double from 0 to 5, write 1.0"),
        (["action_scale:=[2, 3]"], "action_scale is [2, 3], expected a double array, write [2.0, 3.0]"),
        (["max_linear_x_mps:=[]"], "max_linear_x_mps is [], expected a double from 0 to 5"),
        (["max_linear_x_mps:=-1.0"], "max_linear_x_mps is -1.0, expected a number from 0 to 5"),
        (["device:=[]"], "device is [], expected one of auto, cpu, cuda"),
        (["stamped:=1"], "stamped is 1, expected true or false"),
        (["max_linear_mps:=0.1"], "max_linear_x_mps, max_linear_acceleration_mps2"),
        (["max_linear_mps:=0.1"], "max_angular_z_radps"),
        (["max_linear_mps:=0.1"], "max_linear_y_mps"),
        (["chekpoint:=a", "autostrat:=b"], "'autostrat', 'chekpoint', expected autostart, checkpoint"),
    ],
)
def test_a_bad_parameter_is_one_sentence_that_says_what_to_write(start_node, arguments, expected):
    node = start_node(*(word for argument in arguments for word in ("-p", argument)))
    assert node.process.wait(timeout=30) == 2
    assert expected in node.output()
    assert "Traceback" not in node.output()


def test_the_home_folder_may_be_written_as_a_tilde(probe, start_node, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_checkpoint.parent))
    start_node("-p", "processors:=~/tiny.processors", checkpoint="~/tiny.pth")
    probe.wait_until_loaded()


def test_deactivate_stops_it_cleanup_ends_the_worker_and_it_can_be_brought_up_again(probe, start_node):
    start_node()
    probe.drive()

    assert probe.change_state(Transition.TRANSITION_DEACTIVATE)
    probe.wait_for_standstill("inactive")
    assert probe.change_state(Transition.TRANSITION_ACTIVATE)
    probe.wait_for("motion", probe.is_moving)
    assert probe.change_state(Transition.TRANSITION_DEACTIVATE)
    assert probe.change_state(Transition.TRANSITION_CLEANUP)
    probe.wait_for("no worker", lambda: probe.value("policy", "state") == "stopped")
    assert probe.change_state(Transition.TRANSITION_CONFIGURE)
    assert probe.change_state(Transition.TRANSITION_ACTIVATE)
    probe.wait_for("motion", probe.is_moving)


def test_a_failed_configure_leaves_it_unconfigured(probe, start_node, tmp_path):
    start_node("-p", "autostart:=false", checkpoint=tmp_path / "missing.pth")
    assert not probe.change_state(Transition.TRANSITION_CONFIGURE)
    assert probe.lifecycle_state() == "unconfigured"


def test_a_transition_that_is_not_allowed_is_refused_and_the_node_lives_on(probe, start_node):
    start_node()
    probe.drive()
    request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE))
    client = probe.node.create_client(ChangeState, "vla_node/change_state")
    assert client.wait_for_service(timeout_sec=20.0)
    client.call_async(request)  # up to Jazzy it is never answered
    assert probe.lifecycle_state() == "active"
    steps = int(probe.value("policy", "steps"))
    probe.wait_for("more steps", lambda: int(probe.value("policy", "steps")) > steps + 2)


def test_a_bag_that_loops_resets_the_state_in_simulated_time(probe, start_node):
    start_node("-p", "use_sim_time:=true")
    clock = probe.node.create_publisher(Clock, "/clock", 10)
    images = probe.node.create_publisher(Image, "image_raw", BEST_EFFORT)
    probe.node.destroy_publisher(probe.images)
    played = {"s": 100.0}

    def publish() -> None:
        # Two seconds of a recorded drive, again and again.
        played["s"] = 100.0 if played["s"] > 102.0 else played["s"] + 0.05
        message = Clock()
        message.clock.sec = int(played["s"])
        message.clock.nanosec = round(played["s"] % 1.0 * 1e9)
        clock.publish(message)
        images.publish(rgb_to_image(PICTURE, Image, message.clock, "camera_optical_frame"))

    probe.node.create_timer(0.05, publish)
    probe.instruct("go")
    probe.wait_for("motion", probe.is_moving, timeout_s=60.0)
    probe.wait_for("the loop", lambda: int(probe.value("policy", "state_resets_time_backwards") or 0) >= 2)
    probe.wait_for("motion after the loop", probe.is_moving)


def test_a_late_subscriber_receives_the_status(probe, start_node):
    from diagnostic_msgs.msg import DiagnosticStatus

    start_node()
    probe.wait_until_loaded()
    statuses: list[DiagnosticStatus] = []
    latched = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    probe.node.create_subscription(DiagnosticStatus, "vla_node/status", statuses.append, latched)
    probe.wait_for("the status", lambda: bool(statuses))
    assert statuses[0].message.startswith("no_instruction")


def test_frame_accounting_closes(probe, start_node):
    start_node()
    probe.drive()
    instructions = probe.node.create_publisher(String, "instruction", 10)
    for word in ("left", "right", "stop here", "go on"):
        instructions.publish(String(data=word))
    probe.wait_for("the new instruction", lambda: probe.value("gate", "instruction") == "go on")
    probe.wait_for("motion", probe.is_moving)
    probe.stop_images()
    probe.wait_for("the latch", lambda: probe.value("gate", "latched") == "True")

    def closes() -> bool:
        image = probe.diagnostics["image"]
        dropped = sum(int(count) for key, count in image.items() if key.startswith("dropped_"))
        assert dropped == int(image["frames_dropped"])
        return int(image["frames_received"]) == int(probe.value("policy", "steps")) + dropped

    probe.wait_for("received = stepped + dropped", closes)
