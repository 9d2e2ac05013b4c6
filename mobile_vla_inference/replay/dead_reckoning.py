"""Dead reckoning: the path that velocities over time would drive, from the origin and without wheel slip.

Poses are by REP-103: x ahead, y to the left, yaw counter-clockwise. A differential base has no linear.y; for an
omnidirectional one all three velocities count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mobile_vla_inference.replay.result import Velocity

#: No command counts for longer than this, seconds: the recording, or the policy, was silent.
MAX_GAP_S = 2.0


def integrate(
    stamps_s: Sequence[float], velocities: Sequence[Velocity | None], max_gap_s: float = MAX_GAP_S
) -> np.ndarray:
    """Return the pose at each stamp: x (m), y (m), yaw (rad), float64 [stamps, 3]; the first one is the origin.

    A velocity counts from its stamp to the next one, along an arc. None and values that are not finite are standstill,
    and so are gaps longer than `max_gap_s` and time that runs backwards.
    """
    count = len(stamps_s)
    poses = np.zeros((count, 3))
    if count < 2:
        return poses
    twists = np.array([(0.0, 0.0, 0.0) if value is None else value for value in velocities[: count - 1]])
    twists[~np.isfinite(twists).all(axis=1)] = 0.0
    elapsed_s = np.diff(np.asarray(stamps_s, dtype=np.float64))
    elapsed_s[(elapsed_s < 0.0) | (elapsed_s > max_gap_s)] = 0.0
    x, y, turn = (twists * elapsed_s[:, None]).T
    # The exponential map of SE(2): sin(turn) / turn and (1 - cos(turn)) / turn, also where turn is 0.
    along = np.sinc(turn / np.pi)
    across = np.sinc(turn / (2.0 * np.pi)) * np.sin(turn / 2.0)
    ahead, left = along * x - across * y, across * x + along * y
    yaw = np.concatenate([[0.0], np.cumsum(turn)])
    cos, sin = np.cos(yaw[:-1]), np.sin(yaw[:-1])
    poses[1:, 0] = np.cumsum(cos * ahead - sin * left)
    poses[1:, 1] = np.cumsum(sin * ahead + cos * left)
    poses[:, 2] = yaw
    return poses


def held(
    stamps_s: Sequence[float], commands: Sequence[Velocity | None], max_gap_s: float = MAX_GAP_S
) -> list[Velocity | None]:
    """Return the command in force at each stamp: the last one that was given, for at most `max_gap_s`."""
    found: list[Velocity | None] = []
    last, since_s = None, 0.0
    for stamp_s, command in zip(stamps_s, commands):
        if command is not None:
            last, since_s = command, stamp_s
        found.append(last if stamp_s - since_s <= max_gap_s else None)
    return found
