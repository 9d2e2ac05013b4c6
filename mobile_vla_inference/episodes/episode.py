"""One recorded episode, whatever the format of its file: the type that readers return and everything else takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_vla_inference.bags.step_period import StepPeriod, period_of_duration, period_of_stamps
from mobile_vla_inference.errors import MobileVlaError


class EpisodeError(MobileVlaError):
    """Episodes can't be read or written."""


@dataclass(frozen=True)
class SimulationRecord:
    """What only episodes of the simulated world contain.

    Attributes:
        seed: of the world; None where the file gives none.
        outcome: how the episode ended; empty where the file gives none.
        auxiliary_targets: see sim.auxiliary_targets, float32 [steps, numbers]; None where the file has none.
    """

    seed: int | None = None
    outcome: str = ""
    auxiliary_targets: np.ndarray | None = None


@dataclass(frozen=True)
class Episode(ABC):
    """One drive. Its commands are in memory; its images stay in the file until they are read.

    Attributes:
        path: the file, or the folder of its format.
        name: its own name.
        scenario: such as `1box_vert_left`, or scenario_instructions.NO_SCENARIO.
        instruction: what the robot was instructed to do; empty where neither file nor scenario gives it.
        commands: linear x, linear y (m/s), angular z (rad/s), float64 [steps, 3].
        events: one label per step; empty where the file has none.
        size_px: width and height of its images.
        duration_s: from the first step to the last; None where the file doesn't give it.
    """

    path: Path
    name: str
    scenario: str
    instruction: str
    commands: np.ndarray
    events: tuple[str, ...]
    size_px: tuple[int, int]
    duration_s: float | None

    @property
    @abstractmethod
    def where(self) -> str:
        """The file, and the place in it where it holds several episodes: for messages."""

    @abstractmethod
    def frames(self) -> Iterator[np.ndarray]:
        """Yield the images in order as uint8 RGB [height, width, 3]; raise EpisodeError where one can't be read."""

    @abstractmethod
    def stamps_s(self) -> np.ndarray | None:
        """Return the time of each step, seconds, float64 [steps]; None where the file has no stamps.

        Raises:
            EpisodeError: the stamps can't be read, or are not one number for each step.
        """

    @abstractmethod
    def simulation(self) -> SimulationRecord:
        """Return what the file contains about the simulated world; raise EpisodeError where it can't be read."""

    def period(self) -> StepPeriod | None:
        """Return the time between steps, by the stamps or else by the duration; None where the file has neither.

        Raises:
            EpisodeError: the stamps can't be read.
            StepPeriodError: the times can't be used.
        """
        stamps_s = self.stamps_s()
        if stamps_s is not None:
            return period_of_stamps(stamps_s, self.where)
        return period_of_duration(self.duration_s, len(self.commands), self.where)
