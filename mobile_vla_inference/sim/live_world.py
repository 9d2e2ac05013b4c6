"""The world in real time, for a robot that somebody else drives: it moves on by the caller's clock and ends no episode.

Commands cease to count after a timeout, as on a real base. What became of the episode is settled once, at its end;
the robot stays where it is and can go on driving until `reset`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mobile_vla_inference.action import STANDSTILL, VelocityCommand
from mobile_vla_inference.sim.expert import Expert, path_length_m
from mobile_vla_inference.sim.renderer import Renderer
from mobile_vla_inference.sim.robot import Pose
from mobile_vla_inference.sim.scenarios import draw_layout
from mobile_vla_inference.sim.world import PHYSICS_STEP_S, REACH_M, Motion, World


class LiveWorld:
    """One world after the other.

    Attributes:
        world: the present one.
        episode: which it is and what became of it, JSON-ready: `scenario`, `seed`, `number` (counted from 1), `outcome`
            (None until it is settled), `time_s`, `path_m`, `expert_path_m`.
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
        """Put the robot at the start of a world; raise ValueError for an unknown scenario, and change nothing then."""
        world = World(draw_layout(scenario, seed), self._base)
        if self._scene is not None:
            self._scene.close()
        self.world = world
        self._scene = self._renderer.scene(world.layout)
        self._started_s: float | None = None
        self._expires_s = -math.inf
        self._stands = True
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
        """How the robot moves now."""
        return self.world.motion

    def command(self, command: VelocityCommand, now_s: float) -> None:
        """Move so until the timeout or the next command; raise ValueError where a velocity is not finite."""
        self.step(now_s)
        self.world.command(command)
        self._expires_s = now_s + self._command_timeout_s
        self._stands = False

    def step(self, now_s: float) -> Pose:
        """Advance to `now_s` (seconds of a clock that never goes back), in steps of the physics; return the pose."""
        if self._started_s is None:
            self._started_s = now_s
        while self._started_s + self.world.time_s + PHYSICS_STEP_S <= now_s:
            if not self._stands and self._started_s + self.world.time_s >= self._expires_s:
                self.world.command(STANDSTILL)
                self._stands = True
            self.world.step(PHYSICS_STEP_S)
            self._settle()
        return self.world.pose

    def frame(self, pose: Pose) -> np.ndarray:
        """Return the camera's picture from a pose, uint8 RGB [side, side, 3]."""
        return self._scene.frame(pose)

    def _settle(self) -> None:
        if self.episode["outcome"] is None and self.world.outcome is not None:
            self.episode |= {
                "outcome": self.world.outcome,
                "time_s": self.world.time_s,
                "path_m": self.world.path_m,
            }
