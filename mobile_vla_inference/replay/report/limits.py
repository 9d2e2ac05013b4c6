"""How much of a drive the limits of the gate changed, by limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mobile_vla_inference.replay.dead_reckoning import MAX_GAP_S
from mobile_vla_inference.replay.gate_model import LIMITS

ANY_LIMIT = "any of them"


@dataclass(frozen=True)
class LimitShare:
    """What one limit changed.

    Attributes:
        name: one of gate_model.LIMITS, or ANY_LIMIT.
        frames: images at which it changed the command.
        frame_share: of the images at which the robot moves, 0 to 1.
        time_s: how long it did.
        time_share: of the time in which the robot moves, 0 to 1.
    """

    name: str
    frames: int
    frame_share: float
    time_s: float
    time_share: float


def limit_shares(stamps_s: Sequence[float], limited: Sequence[Sequence[str] | None]) -> list[LimitShare]:
    """Return the share of each limit, and of any limit; an image can count for several limits.

    Args:
        stamps_s: of the images.
        limited: per image the names of the limits that changed its command, None where the robot didn't move.
    """
    durations_s = _durations_s(stamps_s)
    moving = np.array([names is not None for names in limited], dtype=bool)
    moving_s = float(durations_s[moving].sum())

    def share(name: str, changed: Sequence[bool]) -> LimitShare:
        mask = np.array(changed, dtype=bool)
        frames, time_s = int(mask.sum()), float(durations_s[mask].sum())
        frame_share = frames / int(moving.sum()) if moving.any() else 0.0
        return LimitShare(name, frames, frame_share, time_s, time_s / moving_s if moving_s > 0.0 else 0.0)

    shares = [share(limit, [limit in (names or ()) for names in limited]) for limit in LIMITS]
    return [*shares, share(ANY_LIMIT, [bool(names) for names in limited])]


def _durations_s(stamps_s: Sequence[float]) -> np.ndarray:
    """Return the time from each image to the next; 0 for gaps and for time that runs backwards."""
    if len(stamps_s) == 0:
        return np.zeros(0)
    steps = np.diff(np.asarray(stamps_s, dtype=np.float64))
    steps[(steps < 0.0) | (steps > MAX_GAP_S)] = 0.0
    last = float(np.median(steps[steps > 0.0])) if (steps > 0.0).any() else 0.0
    return np.append(steps, last)
