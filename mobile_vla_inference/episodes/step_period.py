"""The times of an HDF5 episode: `stamps_s` [steps], or the attribute `total_duration`, first step to last."""

from __future__ import annotations

import numpy as np

from mobile_vla_inference.bags.step_period import StepPeriod, period_of_duration, period_of_stamps
from mobile_vla_inference.episodes.files import Episode, EpisodeError
from mobile_vla_inference.episodes.hdf5 import dataset, member, opened, read_small


def episode_stamps(episode: Episode) -> np.ndarray | None:
    """Return when each step was, seconds, float64 [steps]; None where the episode has no stamps.

    Raises:
        EpisodeError: its stamps can't be read, or are not one number for each step.
    """
    where, steps = named(episode), len(episode.commands)
    with opened(episode.path) as file:
        stored = dataset(member(file, episode.group, where), "stamps_s", where)
        if stored is None:
            return None
        if list(stored.shape or ()) != [steps] or stored.dtype.kind not in "iuf":
            raise EpisodeError(
                f"{where} has stamps_s {stored.dtype} {list(stored.shape or ())}, expected [{steps}] numbers, seconds; "
                "record it again"
            )
        return read_small(stored, "stamps_s", where).astype(np.float64)


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
