"""The world in real time, for a robot that a caller drives: it advances by the caller's clock.

Commands expire after a timeout, as on a real base. The outcome of an episode is set once; after that the robot stays
where it is and can be driven on until `reset`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mobile_vla_inference.action import STANDSTILL, VelocityCommand
from mobile_vla_inference.sim.expert import Expert, path_length_m
from mobile_vla_inference.sim.layout import draw_layout
from mobile_vla_inference.sim.renderer import Renderer
from mobile_vla_inference.sim.robot import Pose
from mobile_vla_inference.sim.world import PHYSICS_STEP_S, REACH_M, Motion, World


class LiveWorld:
    """One world after the other.

    Attributes:
        world: the present one.
        episode: the present episode, JSON-ready: `scenario`, `seed`, `number` (counted from 1), `outcome` (None until
            it is known), `time_s`, `path_m`, `expert_path_m`.
    """

    def __init__(self, scenario: str, seed: int, base: str = "differential", command_timeout_s: float = 0.5) -> None:
        """Begin the first episode; raise SimulatorError where it can't be drawn, ValueError for unknown names."""
        self._base = base
        self._command_timeout_s = command_timeout_s
        self._renderer = Renderer()
        self._scene = None
        self.episode: dict[str, Any] = {"number": 0}
        self.reset(scenario, seed)

    def reset(self, scenario: str, seed: int) -> None:
        """Put the robot at the start of a world; raise ValueError, and change nothing, for an unknown scenario."""
        world = World(draw_layout(scenario, seed), self._base)
        if self._scene is not None:
            self._scene.close()
        self.world = world
        self._scene = self._renderer.scene(world.layout)
        self._started_s: float | None = None
        self._expires_s = -math.inf
        self._is_stopped = True
        self.episode = {
            "scenario": scenario,
            "seed": seed,
            "number": self.episode["number"] + 1,
            "outcome": None,
            "time_s": 0.0,
            "path_m": 0.0,
            "expert_path_m": path_length_m(Expert(world).path()) - REACH_M,
        }

    @property
    def motion(self) -> Motion:
        """Velocities of the robot."""
        return self.world.motion

    def command(self, command: VelocityCommand, now_s: float) -> None:
        """Execute a command until its timeout or the next one; raise ValueError where a velocity is not finite."""
        self.step(now_s)
        self.world.command(command)
        self._expires_s = now_s + self._command_timeout_s
        self._is_stopped = False

    def step(self, now_s: float) -> Pose:
        """Advance to `now_s` (seconds of a clock that never goes back), in physics steps; return the pose."""
        if self._started_s is None:
            self._started_s = now_s
        while self._started_s + self.world.time_s + PHYSICS_STEP_S <= now_s:
            if not self._is_stopped and self._started_s + self.world.time_s >= self._expires_s:
                self.world.command(STANDSTILL)
                self._is_stopped = True
            self.world.step(PHYSICS_STEP_S)
            self._set_outcome()
        return self.world.pose

    def frame(self, pose: Pose) -> np.ndarray:
        """Return the camera's image from a pose, uint8 RGB [side, side, 3]."""
        return self._scene.frame(pose)

    def _set_outcome(self) -> None:
        if self.episode["outcome"] is None and self.world.outcome is not None:
            self.episode |= {
                "outcome": self.world.outcome,
                "time_s": self.world.time_s,
                "path_m": self.world.path_m,
            }
