"""The node of `mobile_vla replay --node`: it hears what vla_node says of its steps, its gate and its frames."""

from __future__ import annotations

import time

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String

from mobile_vla_inference.control.memory import MemorySample
from mobile_vla_inference.ros.step_message import NodeStep

_RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
_STEPS = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class ReplayGraph:
    """Listen to a vla_node.

    Attributes:
        node: the rclpy node, for a player to publish by.
        facts: what the node's DiagnosticArray says, as texts by key.
        diagnostics_count: arrays received so far.
        steps: every step told so far.
        memory: the worker's memory, by the diagnostics.
        reason: what the gate says of itself by `~/status`; empty before it is heard of.
        advice: the same as a sentence.
    """

    def __init__(self, node_name: str) -> None:
        """Join the graph that the environment names."""
        self.facts: dict[str, str] = {}
        self.diagnostics_count = 0
        self.steps: list[NodeStep] = []
        self.memory: list[MemorySample] = []
        self.reason = ""
        self.advice = "it has not been heard of"
        self._node_name = node_name
        self._started_s = time.monotonic()
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node("replay")
        self._instructions = self.node.create_publisher(String, "instruction", _RELIABLE)
        self.node.create_subscription(DiagnosticStatus, f"{node_name}/step", self._on_step, _STEPS)
        self.node.create_subscription(DiagnosticStatus, f"{node_name}/status", self._on_status, LATCHED)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)

    def spin(self, timeout_s: float) -> None:
        """Handle what arrives within `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while (remaining_s := deadline_s - time.monotonic()) > 0.0:
            self._executor.spin_once(timeout_sec=remaining_s)

    def instruct(self, text: str) -> None:
        """Tell the node what to do."""
        self._instructions.publish(String(data=text))

    def is_settled(self) -> bool:
        """Whether every frame that the node counted is done with, and every step that counts was heard."""
        received, dropped, stepped = (self._fact(key) for key in ("frames_received", "frames_dropped", "steps"))
        return received == dropped + stepped and len(self.steps) == stepped - self._fact("discarded_results")

    def counts_sentence(self) -> str:
        """Say what the node counted."""
        dropped = ", ".join(
            f"{value} {key.removeprefix('dropped_')}" for key, value in self.facts.items() if key.startswith("dropped_")
        )
        return (
            f"vla_node counted {self.facts['frames_received']} images received, {self.facts['steps']} stepped; "
            f"dropped: {dropped or 'none'}"
        )

    def close(self) -> None:
        """Leave the graph."""
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.try_shutdown()

    def _fact(self, key: str) -> int:
        return int(self.facts.get(key, 0))

    def _on_step(self, message: DiagnosticStatus) -> None:
        self.steps.append(NodeStep.from_values(message.message, {pair.key: pair.value for pair in message.values}))

    def _on_status(self, message: DiagnosticStatus) -> None:
        self.reason = next(value.value for value in message.values if value.key == "reason")
        self.advice = message.message

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        own = [status for status in message.status if status.name.startswith(f"{self._node_name}: ")]
        if not own:
            return
        for status in own:
            self.facts.update({value.key: value.value for value in status.values})
        self.diagnostics_count += 1
        self.memory.append(
            MemorySample(
                elapsed_s=time.monotonic() - self._started_s,
                frame=0,
                rss_mib=float(self.facts["worker_rss_mib"]),
                gpu_allocated_mib=float(self.facts["gpu_allocated_mib"]),
            )
        )
