"""vla_node as a user starts it: a real process on real topics, with a real (tiny) checkpoint."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from lifecycle_msgs.msg import Transition
from ros_graph import NodeProcess, is_zero
from std_msgs.msg import Bool
from std_srvs.srv import Trigger

from mobile_vla_inference.units import MIB


def worker_of(node: NodeProcess) -> psutil.Process:
    (worker,) = psutil.Process(node.process.pid).children()
    return worker


def test_it_drives_with_images_and_an_instruction_and_stops_cleanly_on_sigint(probe, start_node):
    node = start_node()
    probe.drive("박스를 왼쪽으로 돌아서 컵까지 가세요")
    probe.wait_for("steps in the diagnostics", lambda: int(probe.value("policy", "steps") or 0) >= 3)
    memory = probe.diagnostics["memory"]
    assert 0 < float(memory["node_rss_mib"]) < 150
    assert float(memory["worker_rss_mib"]) > float(memory["node_rss_mib"])
    worker = worker_of(node)
    assert node.interrupt(signal.SIGINT) == 0, node.output()
    probe.wait_for("a last zero", lambda: is_zero(probe.commands[-1][1]))
    assert "Traceback" not in node.output()
    assert not worker.is_running()


def test_the_node_process_never_loads_torch(probe, start_node):
    node = start_node()
    probe.drive()
    mapped = {Path(region.path).name for region in psutil.Process(node.process.pid).memory_maps()}
    assert not [name for name in mapped if "torch" in name]
    assert psutil.Process(node.process.pid).memory_info().rss < 150 * MIB
    worker_score = int(Path(f"/proc/{worker_of(node).pid}/oom_score_adj").read_text())
    assert worker_score > int(Path(f"/proc/{node.process.pid}/oom_score_adj").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_moving_ends_with_zero_and_status_0(probe, start_node, number):
    node = start_node()
    probe.drive()
    assert node.interrupt(number) == 0, node.output()
    probe.wait_for("a last zero", lambda: is_zero(probe.commands[-1][1]))


def test_images_that_stop_stop_the_robot_and_later_ones_need_enable(probe, start_node):
    start_node("-p", "resume_within_s:=0.6")
    probe.drive()
    probe.stop_images()
    probe.wait_for_standstill("image_stale")
    probe.wait_for("the latch", lambda: probe.value("gate", "latched") == "True")
    probe.start_images()
    stepped = int(probe.value("policy", "steps"))
    probe.wait_for("steps again", lambda: int(probe.value("policy", "steps")) > stepped + 2)
    assert probe.value("gate", "reason") == "image_stale"
    answer = probe.enable()
    assert answer.success
    probe.wait_for("motion after enable", probe.is_moving)


def test_disable_stop_topic_and_empty_instruction_each_stop_it(probe, start_node):
    start_node()
    probe.drive()
    probe.enable(False)
    probe.wait_for_standstill("disabled")
    probe.enable()
    probe.wait_for("motion", probe.is_moving)
    stop = probe.node.create_publisher(Bool, "stop", 1)
    probe.wait_for("the stop subscription", lambda: stop.get_subscription_count() > 0)
    stop.publish(Bool(data=True))
    probe.wait_for_standstill("stop_requested")
    stop.publish(Bool(data=False))
    probe.enable()
    probe.wait_for("motion", probe.is_moving)
    probe.instruct("  ")
    probe.wait_for_standstill("no_instruction")


def test_a_killed_worker_stops_the_robot_until_enabled_and_is_replaced(probe, start_node):
    node = start_node()
    probe.drive()
    first = worker_of(node)
    first.kill()
    probe.wait_for_standstill("worker_fault")
    probe.wait_for("another worker", lambda: probe.value("policy", "state") == "ready", timeout_s=60.0)
    assert worker_of(node).pid != first.pid
    assert "SIGKILL" in probe.value("policy", "last_error")
    probe.enable()
    probe.wait_for("motion after enable", probe.is_moving)


def test_reset_clears_the_state_and_goes_on(probe, start_node):
    start_node()
    probe.drive()
    assert probe.call(Trigger, "vla_node/reset", Trigger.Request()).success
    probe.wait_for("the reset in the diagnostics", lambda: probe.value("policy", "state_resets_request") == "1")
    probe.wait_for("motion", probe.is_moving)


@pytest.mark.parametrize(("offset_s", "cause"), [(-10.0, "stale_stamp"), (10.0, "future_stamp")])
def test_images_with_wrong_stamps_never_move_it(probe, start_node, offset_s, cause):
    start_node()
    probe.wait_until_loaded()
    probe.start_images(stamp_offset_s=offset_s)
    probe.instruct("go")
    probe.wait_for("the cause", lambda: int(probe.value("image", f"dropped_{cause}") or 0) > 5)
    assert all(is_zero(command) for _, command in probe.commands)
    assert probe.value("gate", "reason") == "image_refused"


def test_limits_change_live_and_bad_values_are_refused_by_name(probe, start_node):
    start_node()
    probe.drive()

    for name, value in (("max_linear_x_mps", float("nan")), ("image_timeout_s", 0.0), ("max_angular_z_radps", -1.0)):
        result = probe.set_parameter(name, value)
        assert not result.successful
        assert name in result.reason
    assert probe.set_parameter("max_linear_x_mps", 0.0).successful
    assert probe.set_parameter("max_angular_z_radps", 0.0).successful
    probe.wait_for("zero speed by the limits", lambda: is_zero(probe.commands[-1][1]))


@pytest.fixture
def unconfirmed_checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """Return a copy of the tiny checkpoint without its policy.json: every setting is only assumed."""
    folder = tmp_path / "unconfirmed"
    folder.mkdir()
    for path in tiny_checkpoint.parent.iterdir():
        if path.suffix != ".json":
            (folder / path.name).symlink_to(path)
    return folder / tiny_checkpoint.name


def test_assumed_settings_can_be_configured_but_never_activated(probe, start_node, unconfirmed_checkpoint):
    node = start_node("-p", "autostart:=false", checkpoint=unconfirmed_checkpoint)
    assert probe.lifecycle_state() == "unconfigured"
    assert probe.change_state(Transition.TRANSITION_CONFIGURE)
    assert probe.lifecycle_state() == "inactive"
    probe.start_images()
    probe.instruct("go")
    assert not probe.change_state(Transition.TRANSITION_ACTIVATE)
    assert probe.lifecycle_state() == "inactive"
    probe.wait_for("the reason", lambda: probe.value("gate", "reason") == "inactive")
    assert not probe.is_moving()
    assert "mobile_vla inspect CHECKPOINT --confirm" in node.output()


def test_with_autostart_assumed_settings_end_the_node_with_a_sentence(start_node, unconfirmed_checkpoint):
    node = start_node(checkpoint=unconfirmed_checkpoint)
    assert node.process.wait(timeout=60) == 2
    assert "activation refused: settings" in node.output()
    assert "are assumed, expected confirmed ones" in node.output()
    assert "policy.json" in node.output()
    assert "Traceback" not in node.output()


def test_without_autostart_it_waits_unconfigured(probe, start_node):
    start_node("-p", "autostart:=false")
    assert probe.lifecycle_state() == "unconfigured"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-p", "image_timeout_s:=0.0"), "image_timeout_s"),
        (("-p", "chekpoint:=x"), "chekpoint"),
        (("-p", "device:=gpu"), "device"),
        (("-p", "publish_rate_hz:=fast"), "publish_rate_hz"),
    ],
)
def test_a_bad_parameter_ends_it_with_one_sentence(start_node, arguments, expected):
    node = start_node(*arguments)
    assert node.process.wait(timeout=30) == 2
    assert expected in node.output()
    assert "Traceback" not in node.output()


def test_a_missing_checkpoint_ends_it_with_one_sentence_and_no_motion(probe, start_node, tmp_path):
    node = start_node(checkpoint=tmp_path / "missing.pth")
    assert node.process.wait(timeout=60) == 2
    assert "missing.pth" in node.output()
    assert "Traceback" not in node.output()
    assert all(is_zero(command) for _, command in probe.commands)


def test_killing_the_node_also_ends_the_worker(probe, start_node):
    node = start_node()
    probe.drive()
    worker = worker_of(node)
    os.kill(node.process.pid, signal.SIGKILL)
    worker.wait(timeout=10)
    moment_s = time.monotonic()
    assert not probe.commands_since(moment_s)
