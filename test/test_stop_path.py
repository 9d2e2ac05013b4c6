"""Nothing delays a stop: attacks on the path from a stop to its zero, on the real node and real topics."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from ros_graph import Probe, is_zero
from std_msgs.msg import Bool, String

#: The limit is 100 ms (the drill measures it); here the machine can be busy, and "never" means far more than that.
NEVER_S = 2.0


def wait_for_zero(probe: Probe, since_s: float) -> None:
    """Wait for a zero that was sent after a moment."""
    probe.wait_for("zero", lambda: any(map(is_zero, probe.commands_since(since_s))), timeout_s=NEVER_S)


def stop_publisher(probe: Probe, **qos):
    publisher = probe.node.create_publisher(Bool, "stop", QoSProfile(depth=10, **qos))
    probe.wait_for("the stop subscription", lambda: publisher.get_subscription_count() > 0)
    # The node can match the publisher a moment later; it does not receive what is sent before.
    probe.wait_for(
        "the publisher in the node's diagnostics",
        lambda: probe.value("gate", "stop_publishers") == str(probe.node.count_publishers("stop")),
        timeout_s=60.0,
    )
    return publisher


@pytest.fixture
def start_with_blocked_output(tiny_checkpoint) -> Iterator[Callable[..., subprocess.Popen]]:
    """Return a function that starts vla_node with an output that is full from the start and that nobody reads."""
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        read_fd, write_fd = os.pipe()
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
        os.write(write_fd, bytes(4096))
        command = [sys.executable, "-m", "mobile_vla_inference.ros.node", "--ros-args"]
        command += ["-p", f"checkpoint:={tiny_checkpoint}", *arguments]
        started.append((subprocess.Popen(command, stdout=write_fd, stderr=write_fd), read_fd))
        os.close(write_fd)
        return started[-1][0]

    yield start
    for process, read_fd in started:
        process.kill()
        process.wait()
        os.close(read_fd)


@pytest.mark.parametrize("attack", ["stop", "sigterm"])
def test_an_output_that_nobody_reads_delays_neither_a_stop_nor_the_exit(probe, start_with_blocked_output, attack):
    node = start_with_blocked_output()
    stops = stop_publisher(probe)
    probe.drive()
    began_s = time.monotonic()
    if attack == "stop":
        stops.publish(Bool(data=True))
        wait_for_zero(probe, began_s)
    else:
        node.send_signal(signal.SIGTERM)
        wait_for_zero(probe, began_s)
        assert node.wait(timeout=20) == 0


def test_a_stop_is_never_overwritten_by_what_follows_it(probe, start_node):
    start_node()
    stops = stop_publisher(probe)
    probe.drive()
    for _ in range(20):
        began_s = time.monotonic()
        stops.publish(Bool(data=True))
        stops.publish(Bool(data=False))
        wait_for_zero(probe, began_s)
        probe.wait_for_standstill("stop_requested")
        probe.enable()
        probe.wait_for("motion", probe.is_moving)
    for _ in range(5):
        began_s = time.monotonic()
        probe.instructions.publish(String(data=""))
        probe.instructions.publish(String(data="go around the box on the left to the cup"))
        wait_for_zero(probe, began_s)
        probe.wait_for("motion", probe.is_moving)


def test_a_stop_is_received_at_any_qos_of_its_publisher(probe, start_node):
    start_node()
    probe.drive()
    for reliability in (ReliabilityPolicy.BEST_EFFORT, ReliabilityPolicy.RELIABLE):
        for durability in (DurabilityPolicy.VOLATILE, DurabilityPolicy.TRANSIENT_LOCAL):
            stops = stop_publisher(probe, reliability=reliability, durability=durability)
            began_s = time.monotonic()
            stops.publish(Bool(data=True))
            wait_for_zero(probe, began_s)
            probe.wait_for_standstill("stop_requested")

            def moves_again(stops=stops) -> bool:
                stops.publish(Bool(data=False))  # each time: best effort can lose one
                return probe.enable().success and probe.is_moving()

            probe.wait_for("motion after the release and ~/enable", moves_again)
            probe.node.destroy_publisher(stops)


def test_a_stop_from_before_the_start_counts_and_a_release_from_then_does_not(probe, start_node):
    latched = {"durability": DurabilityPolicy.TRANSIENT_LOCAL, "reliability": ReliabilityPolicy.RELIABLE}
    stops = probe.node.create_publisher(Bool, "stop", QoSProfile(depth=1, **latched))
    stops.publish(Bool(data=True))
    start_node()
    probe.wait_until_loaded()
    probe.start_images()
    probe.instruct("go")
    probe.wait_for("the reason", lambda: probe.value("gate", "reason") == "stop_requested")
    assert all(is_zero(command) for _, command in probe.commands)
    stops.publish(Bool(data=False))
    other = stop_publisher(probe)
    other.publish(Bool(data=True))
    probe.node.destroy_publisher(stops)
    late = probe.node.create_publisher(Bool, "stop", QoSProfile(depth=1, **latched))
    late.publish(Bool(data=False))  # sent now: this one does release
    probe.wait_for("motion", lambda: probe.enable() and probe.is_moving())


def test_a_publisher_on_the_stop_topic_that_can_not_be_received_means_no_motion(probe, start_node):
    start_node()
    probe.drive()
    began_s = time.monotonic()
    unmatched = probe.node.create_publisher(String, "stop", 10)
    wait_for_zero(probe, began_s)
    probe.wait_for_standstill("stop_unheard")
    assert "std_msgs/msg/String" in probe.value("gate", "warnings")
    probe.node.destroy_publisher(unmatched)
    probe.wait_for("motion", probe.is_moving)


@pytest.mark.parametrize("attack", ["parameter_flood", "slow_rate"])
def test_no_parameter_delays_the_zero_of_a_silent_camera(probe, start_node, attack):
    start_node()
    probe.drive()
    if attack == "slow_rate":
        assert probe.set_parameter("publish_rate_hz", 1.0).successful
    probe.stop_images()
    stopped_s = time.monotonic()
    while attack == "parameter_flood" and time.monotonic() < stopped_s + 1.0:
        assert probe.set_parameter("publish_rate_hz", 20.0).successful
    wait_for_zero(probe, stopped_s)
    zeros = [arrived_s for arrived_s, command in list(probe.commands) if arrived_s > stopped_s and is_zero(command)]
    assert zeros[0] - stopped_s < 0.5 + 0.5, "image_timeout_s, and what a busy machine takes"
    count = len(probe.commands_since(stopped_s))
    probe.wait_for("standstill that is repeated", lambda: len(probe.commands_since(stopped_s)) >= count + 5)


def test_another_publisher_on_cmd_vel_is_named_and_stops_an_exclusive_node(probe, start_node):
    from geometry_msgs.msg import Twist

    start_node()
    probe.drive()
    other = probe.node.create_publisher(Twist, "cmd_vel", 1)
    probe.wait_for("the warning", lambda: "/probe publishes on /cmd_vel" in (probe.value("gate", "warnings") or ""))
    assert probe.is_moving()
    assert probe.set_parameter("exclusive_cmd_vel", True).successful
    probe.wait_for_standstill("cmd_vel_shared")
    probe.node.destroy_publisher(other)
    probe.wait_for("motion", probe.is_moving)
    start_node("-p", "autostart:=false")
    probe.wait_for("the namesake", lambda: "2 nodes have the name /vla_node" in (probe.value("gate", "warnings") or ""))


def test_a_base_that_can_not_receive_the_commands_is_named(probe, start_node):
    start_node("-p", "autostart:=false", "-p", "stamped:=true")  # the probe expects Twist
    probe.wait_for(
        "the warning",
        lambda: "/probe expects geometry_msgs/msg/Twist on" in (probe.value("gate", "warnings") or ""),
    )


def test_subscribers_that_do_not_read_delay_nothing(probe, start_node, tmp_path):
    script = textwrap.dedent(
        """
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
        from geometry_msgs.msg import Twist
        from rcl_interfaces.msg import Log
        rclpy.init()
        node = rclpy.create_node("listener")
        for kind, topic in (
            (Twist, "cmd_vel"), (DiagnosticStatus, "vla_node/status"), (DiagnosticStatus, "vla_node/step"),
            (DiagnosticArray, "/diagnostics"), (Log, "/rosout"),
        ):
            node.create_subscription(kind, topic, lambda _: None, 100)
        print("ready", flush=True)
        rclpy.spin(node)
        """
    )
    start_node()
    stops = stop_publisher(probe)
    listener = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout.readline() == "ready\n"
        probe.drive()
        psutil.Process(listener.pid).suspend()
        steps = int(probe.value("policy", "steps"))
        probe.wait_for("many steps", lambda: int(probe.value("policy", "steps")) > steps + 20, timeout_s=60.0)
        began_s = time.monotonic()
        stops.publish(Bool(data=True))
        wait_for_zero(probe, began_s)
    finally:
        listener.kill()
        listener.wait()


def test_the_diagnostics_count_what_was_dropped(probe, start_node):
    start_node("-p", "autostart:=false")
    probe.wait_for("the counts", lambda: probe.value("gate", "log_lines_dropped") == "0")
    assert probe.value("gate", "reports_dropped") == "0"
