"""The demo's own node: it instructs vla_node, chooses sim_robot's worlds, and watches both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from geometry_msgs.msg import Twist

from mobile_vla_inference.harness.node_listener import NodeListener
from mobile_vla_inference.harness.world_client import WorldClient
from mobile_vla_inference.sim.closed_loop import EpisodeTask


class DemoGraph(NodeListener):
    """A NodeListener that gives one instruction after the other, each in its own world.

    Attributes:
        moving_since_s: when the first velocity of a moving robot arrived, steady clock; None before.
        instruction: the instruction in force; empty while the next world starts.
        instructed_s: when it was given, steady clock; None before the first one.
        episodes: sim_robot's message on each episode that has ended, with the `instruction` that was given.
    """

    def __init__(self, node_name: str, instruction: str, tour: Sequence[EpisodeTask] = ()) -> None:
        """Join the graph that the environment names.

        Args:
            node_name: of vla_node.
            instruction: the first instruction.
            tour: the worlds of sim_robot, over and over; it has begun in the first one. Empty: it stays where it is.
        """
        self.moving_since_s: float | None = None
        self.instruction = instruction
        self.instructed_s: float | None = None
        self.episodes: list[dict[str, Any]] = []
        self._last_command_s = 0.0
        self._commands_since_moving = 0
        self._tour = tour
        super().__init__("demo", node_name)
        self._world = WorldClient(self.node, "sim_robot", self._on_episode) if tour else None

    def begin(self) -> None:
        """Give the instruction in force; call it once vla_node has subscribed."""
        self._give(self.instruction)

    def command_rate_hz(self) -> float | None:
        """Return the mean rate of velocities since the first of a moving robot; None for fewer than two."""
        if self._commands_since_moving < 2 or self._last_command_s <= self.moving_since_s:
            return None
        return (self._commands_since_moving - 1) / (self._last_command_s - self.moving_since_s)

    def unfinished_s(self) -> float | None:
        """Return how long the instruction of the tour's unfinished episode is in force; None without one."""
        if not self._tour or not self.instruction or self.instructed_s is None:
            return None
        return time.monotonic() - self.instructed_s

    def on_command(self, message: Twist) -> None:
        """Keep a velocity, and count it once the robot moves."""
        super().on_command(message)
        self._last_command_s = time.monotonic()
        if self.moving_since_s is None and self.reason == "moving":
            self.moving_since_s = self._last_command_s
        if self.moving_since_s is not None:
            self._commands_since_moving += 1

    def _give(self, instruction: str) -> None:
        self.instruction = instruction
        self.instructed_s = self.instruct(instruction)

    def _task(self) -> EpisodeTask:
        """Return the present world of the tour."""
        return self._tour[len(self.episodes) % len(self._tour)]

    def _on_episode(self, episode: dict[str, Any]) -> None:
        """Go on to the next world when an episode has ended, and instruct the node once that world has begun."""
        if episode["outcome"] is None:
            if not self.instruction:
                self._give(self._task().instruction)
        elif len(self.episodes) < episode["number"]:
            self.episodes.append({**episode, "instruction": self.instruction})
            self._give("")
            task = self._task()
            self._world.choose(task.scenario, task.seed).add_done_callback(lambda _: self._world.reset())
