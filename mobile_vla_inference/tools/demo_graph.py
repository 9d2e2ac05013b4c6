"""The demo's own node: it tells vla_node what to do, sim_robot which world comes next, and watches both."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Twist
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String
from std_srvs.srv import Trigger

from mobile_vla_inference.sim.closed_loop import EpisodeTask

_INSTRUCTION_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
_COMMAND_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
_LATCHED_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class DemoGraph:
    """Publish one instruction after the other to a node and keep its newest diagnostics and commands.

    Attributes:
        facts: what the node's DiagnosticArray says, as texts by key.
        diagnostics_count: arrays received so far.
        reason: what the gate says of itself, by `~/status`: "moving" or why not.
        advice: the same as a sentence.
        moving_since_s: when the first command of motion arrived, steady clock; None before.
        last_command: the newest velocity.
        instruction: what the node is told now; empty while the next world is made.
        episodes: what sim_robot said of each episode that has ended, with the `instruction` that was given.
    """

    def __init__(self, node_name: str, instruction: str, tour: Sequence[EpisodeTask] = ()) -> None:
        """Join the graph that the environment names.

        Args:
            node_name: of vla_node.
            instruction: what it is told.
            tour: worlds for sim_robot, over and over, the first of which it has begun in; empty: it stays where it is.
        """
        self.facts: dict[str, str] = {}
        self.diagnostics_count = 0
        self.reason = ""
        self.advice = "it has not been heard of"
        self.moving_since_s: float | None = None
        self.last_command: Twist | None = None
        self._last_command_s = 0.0
        self._commands_since_moving = 0
        self.instruction = instruction
        self.episodes: list[dict[str, Any]] = []
        self._node_name = node_name
        self._tour = tour
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node("demo")
        self._instructions = self._node.create_publisher(String, "instruction", _INSTRUCTION_QOS)
        self._node.create_subscription(Twist, "cmd_vel", self._on_command, _COMMAND_QOS)
        self._node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._node.create_subscription(DiagnosticStatus, f"{node_name}/status", self._on_status, _LATCHED_QOS)
        self._told = False
        if tour:
            self._parameters = self._node.create_client(SetParameters, "sim_robot/set_parameters")
            self._reset = self._node.create_client(Trigger, "sim_robot/reset")
            self._node.create_subscription(String, "sim_robot/episode", self._on_episode, _LATCHED_QOS)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)

    def spin(self, timeout_s: float) -> None:
        """Handle what arrives within `timeout_s`, and tell the instruction once somebody listens."""
        deadline_s = time.monotonic() + timeout_s
        while (remaining_s := deadline_s - time.monotonic()) > 0.0:
            self._executor.spin_once(timeout_sec=remaining_s)
        if not self._told and self._instructions.get_subscription_count() > 0:
            self._tell(self.instruction)
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

    def _tell(self, instruction: str) -> None:
        self.instruction = instruction
        self._instructions.publish(String(data=instruction))

    def _on_episode(self, message: String) -> None:
        """Go on to the next world when one has ended, and tell the node what to do there once it has begun."""
        episode = json.loads(message.data)
        if episode["outcome"] is None:
            if self._told and not self.instruction:
                self._tell(self._tour[len(self.episodes) % len(self._tour)].instruction)
        elif len(self.episodes) < episode["number"]:
            self.episodes.append({**episode, "instruction": self.instruction})
            self._tell("")
            following = self._tour[len(self.episodes) % len(self._tour)]
            chosen = [Parameter("scenario", value=following.scenario), Parameter("seed", value=following.seed)]
            request = SetParameters.Request(parameters=[each.to_parameter_msg() for each in chosen])
            self._parameters.call_async(request).add_done_callback(lambda _: self._reset.call_async(Trigger.Request()))

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
