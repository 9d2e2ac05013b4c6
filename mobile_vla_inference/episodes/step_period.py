"""The times of an HDF5 episode: `stamps_s` [steps], or the attribute `total_duration`, first step to last."""

from __future__ import annotations

import h5py
import numpy as np

from mobile_vla_inference.bags.step_period import StepPeriod, period_of_duration, period_of_stamps
from mobile_vla_inference.episodes.files import Episode, EpisodeError


def episode_stamps(episode: Episode) -> np.ndarray | None:
    """Return when each step was, seconds, float64 [steps]; None where the episode has no stamps.

    Raises:
        EpisodeError: its stamps can't be read, or are not one number for each step.
    """
    steps = len(episode.commands)
    try:
        with h5py.File(episode.path, "r") as file:
            group = file[episode.group]
            if "stamps_s" not in group:
                return None
            stored = group["stamps_s"]
            shape, kind = list(getattr(stored, "shape", ())), getattr(stored, "dtype", "a group")
            if shape != [steps] or kind.kind not in "iuf":
                raise EpisodeError(
                    f"{named(episode)} has stamps_s {kind} {shape}, expected [{steps}] numbers, seconds; "
                    "record it again"
                )
            return stored[()].astype(np.float64)
    except OSError as error:
        raise EpisodeError(f"{episode.path}: stamps_s can't be read ({error}); copy the file again") from error


def episode_period(episode: Episode) -> StepPeriod | None:
    """Return the time from step to step of an episode, by its stamps, else by its duration; None where neither is told.

    Raises:
        EpisodeError: its stamps can't be read.
        StepPeriodError: its times can't be.
    """
    stamps_s = episode_stamps(episode)
    if stamps_s is not None:
        return period_of_stamps(stamps_s, named(episode))
    return period_of_duration(episode.duration_s, len(episode.commands), named(episode))


def named(episode: Episode) -> str:
    """Return the file, and the place in it where it holds several."""
    return str(episode.path) if episode.group == "/" else f"{episode.path}{episode.group}"
