"""Closed-loop evaluation: a driver drives whole episodes in the world, and figures over many of them.

A driver gets what a robot gets, the camera's image and an instruction, and returns a velocity. The outcome is judged
with the map: success is to reach the cup, past the boxes on the instructed side, without touching anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from mobile_vla_inference.action import VelocityCommand
from mobile_vla_inference.sim.expert import Expert, path_length_m
from mobile_vla_inference.sim.layout import draw_layout
from mobile_vla_inference.sim.renderer import Renderer
from mobile_vla_inference.sim.scenarios import SCENARIOS
from mobile_vla_inference.sim.world import OUTCOMES, REACH_M, World

#: Cameras: as it is, its first image repeated, or black images.
CAMERAS = ("on", "frozen", "black")

_NORMAL_95 = 1.959964

#: Called after each step with the world, the image that the driver got and its command.
Watcher = Callable[[World, np.ndarray, VelocityCommand], None]


class Driver(Protocol):
    """A policy, or another way to drive, that is evaluated."""

    def begin(self, instruction: str) -> None:
        """Begin an episode with an instruction; nothing is kept from the one before."""

    def drive(self, frame: np.ndarray) -> VelocityCommand:
        """Return the command for an image, uint8 RGB [side, side, 3]."""


@dataclass(frozen=True)
class EpisodeTask:
    """One episode to drive.

    Attributes:
        scenario: one of SCENARIOS; the outcome is judged by its side.
        seed: of the world.
        instruction: that the driver gets.
    """

    scenario: str
    seed: int
    instruction: str


@dataclass(frozen=True)
class EpisodeResult:
    """The result of one episode.

    Attributes:
        scenario, seed, instruction: of the task.
        outcome: one of OUTCOMES.
        steps: number of commands.
        time_s: duration in the world.
        path_m: driven distance.
        expert_path_m: length of the expert's path from the start until the cup counts as reached.
    """

    scenario: str
    seed: int
    instruction: str
    outcome: str
    steps: int
    time_s: float
    path_m: float
    expert_path_m: float


def drive_episode(
    task: EpisodeTask,
    driver: Driver | None,
    renderer: Renderer,
    *,
    period_s: float,
    base: str = "differential",
    camera: str = "on",
    watcher: Watcher | None = None,
) -> EpisodeResult:
    """Drive one episode to its end.

    Args:
        task: the world and the instruction.
        driver: called once each period; None: the expert, which sees the map.
        renderer: draws the images.
        period_s: seconds of the world between two images.
        base: of the world, one of world.BASES.
        camera: one of CAMERAS.
        watcher: called after every step.
    """
    world = World(draw_layout(task.scenario, task.seed), base)
    expert = Expert(world)
    expert_path_m = path_length_m(expert.path()) - REACH_M
    scene = renderer.scene(world.layout)
    if driver is not None:
        driver.begin(task.instruction)
    steps, frame = 0, None
    while world.outcome is None:
        if frame is None or camera != "frozen":
            frame = scene.frame(world.pose)
        seen = np.zeros_like(frame) if camera == "black" else frame
        command = expert.command() if driver is None else driver.drive(seen)
        world.command(command)
        world.step(period_s)
        steps += 1
        if watcher is not None:
            watcher(world, seen, command)
    scene.close()
    return EpisodeResult(
        **asdict(task),
        outcome=world.outcome,
        steps=steps,
        time_s=world.time_s,
        path_m=world.path_m,
        expert_path_m=expert_path_m,
    )


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share (E. B. Wilson, 1927)."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = successes / count, _NORMAL_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def summarize(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Return the figures of some episodes, JSON-ready.

    Returns:
        `episodes`, `success_rate` with its `interval_95`, each other outcome's share, and `path_ratio`: the mean of
        driven distance over the expert's, of the episodes that succeeded; None where none did.
    """
    count = len(results)
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in OUTCOMES}
    ratios = [result.path_m / result.expert_path_m for result in results if result.outcome == "success"]
    return {
        "episodes": count,
        "success_rate": counts["success"] / count if count else 0.0,
        "interval_95": list(wilson_interval(counts["success"], count)),
        **{f"{name.replace(' ', '_')}_rate": counts[name] / count if count else 0.0 for name in OUTCOMES[1:]},
        "path_ratio": float(np.mean(ratios)) if ratios else None,
    }


def summarize_by_scenario(results: Sequence[EpisodeResult]) -> dict[str, dict[str, Any]]:
    """Return `summarize` for each scenario that occurs, in the order of SCENARIOS."""
    groups = {name: [result for result in results if result.scenario == name] for name in SCENARIOS}
    return {name: summarize(group) for name, group in groups.items() if group}
