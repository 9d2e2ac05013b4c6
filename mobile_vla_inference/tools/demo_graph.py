"""The demo's own node: it tells vla_node what to do and watches what it publishes."""

from __future__ import annotations

import time

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Twist
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String

_INSTRUCTION_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
_COMMAND_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
_LATCHED_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class DemoGraph:
    """Publish one instruction to a node and keep its newest diagnostics and commands.

    Attributes:
        facts: what the node's DiagnosticArray says, as texts by key.
        diagnostics_count: arrays received so far.
        reason: what the gate says of itself, by `~/status`: "moving" or why not.
        advice: the same as a sentence.
        moving_since_s: when the first command of motion arrived, steady clock; None before.
        last_command: the newest velocity.
    """

    def __init__(self, node_name: str, instruction: str) -> None:
        """Join the graph that the environment names."""
        self.facts: dict[str, str] = {}
        self.diagnostics_count = 0
        self.reason = ""
        self.advice = "it has not been heard of"
        self.moving_since_s: float | None = None
        self.last_command: Twist | None = None
        self._last_command_s = 0.0
        self._commands_since_moving = 0
        self._node_name = node_name
        self._instruction = instruction
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node("demo")
        self._instructions = self._node.create_publisher(String, "instruction", _INSTRUCTION_QOS)
        self._node.create_subscription(Twist, "cmd_vel", self._on_command, _COMMAND_QOS)
        self._node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._node.create_subscription(DiagnosticStatus, f"{node_name}/status", self._on_status, _LATCHED_QOS)
        self._told = False
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)

    def spin(self, timeout_s: float) -> None:
        """Handle what arrives within `timeout_s`, and tell the instruction once somebody listens."""
        deadline_s = time.monotonic() + timeout_s
        while (remaining_s := deadline_s - time.monotonic()) > 0.0:
            self._executor.spin_once(timeout_sec=remaining_s)
        if not self._told and self._instructions.get_subscription_count() > 0:
            self._instructions.publish(String(data=self._instruction))
            self._told = True

    def command_rate_hz(self) -> float | None:
        """Return the mean rate of commands since the first of motion; None where fewer than two arrived."""
        if self._commands_since_moving < 2 or self._last_command_s <= self.moving_since_s:
            return None
        return (self._commands_since_moving - 1) / (self._last_command_s - self.moving_since_s)

    def close(self) -> None:
        """Leave the graph."""
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.try_shutdown()

    def _on_command(self, message: Twist) -> None:
        now_s = time.monotonic()
        if self.moving_since_s is None and self.reason == "moving":
            self.moving_since_s = now_s
        if self.moving_since_s is not None:
            self._commands_since_moving += 1
        self.last_command, self._last_command_s = message, now_s

    def _on_status(self, message: DiagnosticStatus) -> None:
        self.reason = next(value.value for value in message.values if value.key == "reason")
        self.advice = message.message

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        own = [status for status in message.status if status.name.startswith(f"{self._node_name}: ")]
        for status in own:
            self.facts.update({value.key: value.value for value in status.values})
        self.diagnostics_count += bool(own)
