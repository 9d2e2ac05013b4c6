"""A node of a tool's own that receives what vla_node publishes: `~/status`, diagnostics, `~/step` and `cmd_vel`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Twist
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String

from mobile_vla_inference.control.memory import MemorySample
from mobile_vla_inference.ros.step_message import NodeStep

RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
_COMMANDS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
_STEPS = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)

_POLL_S = 0.05


class NodeListener:
    """A node that listens to a vla_node and gives it instructions; it works while `wait_until` runs.

    A subclass extends `on_status`, `on_diagnostics`, `on_command` and `on_step`, and calls them on the base class.

    Attributes:
        node: the rclpy node.
        facts: the values of the node's DiagnosticArray, as texts by key.
        diagnostics_count: arrays received so far.
        reason: why the robot stands or that it moves, by `~/status`; empty before the first status.
        advice: the same as a sentence.
        is_latched: whether `~/status` asks for `~/enable`.
        command: the newest velocity; None before the first one.
    """

    def __init__(self, own_name: str, node_name: str, *, namespace: str = "", cmd_vel: str = "cmd_vel") -> None:
        """Join the graph that the environment names.

        Args:
            own_name: of this node.
            node_name: of vla_node.
            namespace: of both.
            cmd_vel: the velocity topic.
        """
        self.facts: dict[str, str] = {}
        self.diagnostics_count = 0
        self.reason = ""
        self.advice = "no status was received"
        self.is_latched = False
        self.command: Twist | None = None
        self._subject_prefix = f"{namespace}/{node_name}: ".lstrip("/")
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node(own_name, namespace=namespace)
        self._instructions = self.node.create_publisher(String, "instruction", RELIABLE)
        self.node.create_subscription(DiagnosticStatus, f"{node_name}/status", self.on_status, LATCHED)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._receive_diagnostics, 10)
        self.node.create_subscription(Twist, cmd_vel, self.on_command, _COMMANDS)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)

    def wait_until(self, condition: Callable[[], bool], limit_s: float, poll_s: float = _POLL_S) -> bool:
        """Receive messages until a condition holds, and return True; return False after `limit_s`.

        The condition is looked at after each message, and at least every `poll_s`.
        """
        deadline_s = time.monotonic() + limit_s
        while not condition():
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0.0:
                return False
            self.spin_once(min(remaining_s, poll_s))
        return True

    def spin_once(self, timeout_s: float) -> None:
        """Handle one message, or return after `timeout_s`."""
        self._executor.spin_once(timeout_sec=timeout_s)

    def instruct(self, text: str) -> float:
        """Send an instruction; return when, on the steady clock."""
        return self.send_instruction(String(data=text))

    def send_instruction(self, message: String | bytes) -> float:
        """Send a message, or its serialised form, as an instruction; return when, on the steady clock."""
        sent_s = time.monotonic()
        self._instructions.publish(message)
        return sent_s

    def can_instruct(self) -> bool:
        """Whether a node has subscribed to the instruction."""
        return self._instructions.get_subscription_count() > 0

    def is_moving(self) -> bool:
        """Whether the node moves the robot, and a velocity has arrived."""
        return self.reason == "moving" and self.command is not None

    def close(self) -> None:
        """Leave the graph."""
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.try_shutdown()

    def on_status(self, message: DiagnosticStatus) -> None:
        """Keep a message of `~/status`."""
        values = {entry.key: entry.value for entry in message.values}
        self.is_latched = values.get("latched") == "True"
        self.advice = message.message
        self.reason = values["reason"]

    def on_diagnostics(self, statuses: Sequence[DiagnosticStatus]) -> None:
        """Keep the node's part of a DiagnosticArray."""
        for status in statuses:
            self.facts.update({entry.key: entry.value for entry in status.values})
        self.diagnostics_count += 1

    def on_command(self, message: Twist) -> None:
        """Keep a velocity."""
        self.command = message

    def _receive_diagnostics(self, message: DiagnosticArray) -> None:
        own = [status for status in message.status if status.name.startswith(self._subject_prefix)]
        if own:
            self.on_diagnostics(own)


class StepListener(NodeListener):
    """A NodeListener that also keeps every step, and the worker's memory.

    Attributes:
        steps: every step so far, by `~/step`.
        memory: the worker's memory, by the diagnostics.
    """

    def __init__(self, own_name: str, node_name: str) -> None:
        """Join the graph that the environment names."""
        self.steps: list[NodeStep] = []
        self.memory: list[MemorySample] = []
        self._started_s = time.monotonic()
        super().__init__(own_name, node_name)
        self.node.create_subscription(DiagnosticStatus, f"{node_name}/step", self.on_step, _STEPS)

    def is_settled(self) -> bool:
        """Whether the node is done with every frame that it counted, and every step that counts has arrived."""
        received, dropped, stepped = (self._fact(key) for key in ("frames_received", "frames_dropped", "steps"))
        return received == dropped + stepped and len(self.steps) == stepped - self._fact("discarded_results")

    def counts_sentence(self) -> str:
        """Return what the node counted, as a sentence."""
        dropped = ", ".join(
            f"{value} {key.removeprefix('dropped_')}" for key, value in self.facts.items() if key.startswith("dropped_")
        )
        return (
            f"vla_node counted {self.facts['frames_received']} images received, {self.facts['steps']} stepped; "
            f"dropped: {dropped or 'none'}"
        )

    def on_step(self, message: DiagnosticStatus) -> None:
        """Keep a message of `~/step`."""
        self.steps.append(NodeStep.from_values(message.message, {pair.key: pair.value for pair in message.values}))

    def on_diagnostics(self, statuses: Sequence[DiagnosticStatus]) -> None:
        """Keep the node's part of a DiagnosticArray, and the worker's memory."""
        super().on_diagnostics(statuses)
        self.memory.append(
            MemorySample(
                elapsed_s=time.monotonic() - self._started_s,
                frame=0,
                rss_mib=float(self.facts["worker_rss_mib"]),
                gpu_allocated_mib=float(self.facts["gpu_allocated_mib"]),
            )
        )

    def _fact(self, key: str) -> int:
        return int(self.facts.get(key, 0))
