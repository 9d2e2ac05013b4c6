"""Compare predicted with recorded commands: errors, baselines, signs and lag. Pure numpy.

Every error is reported next to three baselines that need no camera: always zero, always the mean of the recording, and
the action recorded at the frame before. A policy that is not better than these has learned nothing from images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BASELINES = ("zero", "mean", "previous")

#: Smaller recorded values (normalised units) have no direction to compare.
SIGN_DEADBAND = 0.05

#: Largest shift of the prediction in the search for its lag, seconds, in both directions.
MAX_LAG_S = 2.0

#: Least number of samples for a lag.
_LEAST_LAG_SAMPLES = 16


def compare(
    stamps_s: Sequence[float],
    predicted: np.ndarray,
    recorded: np.ndarray,
    axes: Sequence[str],
    scale: Sequence[float],
    offset: Sequence[float],
) -> dict[str, Any]:
    """Compare predicted with recorded commands, per axis and over all axes.

    Args:
        stamps_s: time of each pair, seconds [n].
        predicted: commands in m/s and rad/s, float [n, axes].
        recorded: the same, of the recording, float [n, axes].
        axes: names of the axes, such as `linear.x`.
        scale: command units per normalised unit, per axis.
        offset: command units at normalised zero, per axis.

    Returns:
        JSON-ready: `frames`, and under `command_units` and `normalised_units` a table
        {`policy`, `zero`, `mean`, `previous`} -> {axis or `all`} -> {`mae`, `rmse`}; under `axes`, per axis,
        `sign_agreement` (0 to 1, or None), `sign_frames`, `lag_s` (positive: the prediction is late; or None) and
        `lag_correlation`. Pairs with a value that is not finite are left out and counted in `not_finite`.

    Raises:
        ValueError: the shapes don't fit together.
    """
    times = np.asarray(stamps_s, dtype=np.float64)
    predicted = np.asarray(predicted, dtype=np.float64).reshape(len(times), len(axes))
    recorded = np.asarray(recorded, dtype=np.float64).reshape(len(times), len(axes))
    finite = np.isfinite(predicted).all(axis=1) & np.isfinite(recorded).all(axis=1)
    times, predicted, recorded = times[finite], predicted[finite], recorded[finite]
    scales, offsets = np.asarray(scale, np.float64), np.asarray(offset, np.float64)
    if scales.shape != (len(axes),) or offsets.shape != (len(axes),):
        raise ValueError(f"scale and offset have {scales.size} and {offsets.size} values, expected {len(axes)} each")
    divisor = np.where(scales == 0.0, 1.0, scales)  # an axis with scale 0 has no normalised unit
    candidates = {"policy": predicted, **baselines(recorded)}
    normalised = {name: (values - offsets) / divisor for name, values in candidates.items()}
    goal = (recorded - offsets) / divisor
    return {
        "frames": len(times),
        "not_finite": int((~finite).sum()),
        "command_units": {name: error_table(values, recorded, axes) for name, values in candidates.items()},
        "normalised_units": {name: error_table(values, goal, axes) for name, values in normalised.items()},
        "axes": {
            axis: {
                **sign_agreement(normalised["policy"][:, column], goal[:, column]),
                **lag(times, predicted[:, column], recorded[:, column]),
            }
            for column, axis in enumerate(axes)
        },
    }


def baselines(recorded: np.ndarray) -> dict[str, np.ndarray]:
    """Return the baselines, each [n, axes] in command units: standstill, the mean, the recording one frame late.

    The frame before the first one counts as standstill.
    """
    previous = np.zeros_like(recorded)
    previous[1:] = recorded[:-1]
    mean = recorded.mean(axis=0, keepdims=True) if len(recorded) else np.zeros((1, recorded.shape[1]))
    return {"zero": np.zeros_like(recorded), "mean": np.broadcast_to(mean, recorded.shape), "previous": previous}


def error_table(values: np.ndarray, goal: np.ndarray, axes: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Return {axis: {mae, rmse}} and the same over `all` values; None where there is nothing to compare."""
    error = values - goal
    columns = {axis: error[:, column] for column, axis in enumerate(axes)}
    return {name: _mae_rmse(part) for name, part in {**columns, "all": error}.items()}


def _mae_rmse(error: np.ndarray) -> dict[str, float | None]:
    if error.size == 0:
        return {"mae": None, "rmse": None}
    return {"mae": float(np.abs(error).mean()), "rmse": float(np.sqrt(np.square(error).mean()))}


def sign_agreement(predicted: np.ndarray, goal: np.ndarray) -> dict[str, float | int | None]:
    """Return how often both have the same sign, where the goal (normalised units, [n]) is beyond the deadband."""
    decided = np.abs(goal) > SIGN_DEADBAND
    count = int(decided.sum())
    agreeing = np.sign(predicted[decided]) == np.sign(goal[decided])
    return {"sign_agreement": float(agreeing.mean()) if count else None, "sign_frames": count}


def lag(times_s: np.ndarray, predicted: np.ndarray, recorded: np.ndarray) -> dict[str, float | None]:
    """Find the delay of the prediction by the peak of the normalised cross-correlation within MAX_LAG_S.

    Both series are interpolated linearly at the median period of the stamps. Positive: the prediction is late.
    None for both where the series are too short or not in order, or one of them never changes.
    """
    unknown = {"lag_s": None, "lag_correlation": None}
    periods = np.diff(times_s)
    if len(times_s) < _LEAST_LAG_SAMPLES or (periods <= 0.0).any():
        return unknown
    period_s = float(np.median(periods))
    count = int((times_s[-1] - times_s[0]) / period_s) + 1
    grid = times_s[0] + period_s * np.arange(min(count, 4 * len(times_s)))
    late = _centred(np.interp(grid, times_s, predicted))
    goal = _centred(np.interp(grid, times_s, recorded))
    if late is None or goal is None:
        return unknown
    # Half of the series must overlap: otherwise a few samples at the ends would decide.
    most = min(int(MAX_LAG_S / period_s + 1e-6), len(grid) // 2)
    shifts = sorted(range(-most, most + 1), key=abs)  # the smallest lag of equal peaks
    correlations = [_correlation(late, goal, shift) for shift in shifts]
    best = int(np.argmax(np.round(correlations, 12)))
    return {"lag_s": round(shifts[best] * period_s, 6), "lag_correlation": round(correlations[best], 6)}


def _centred(values: np.ndarray) -> np.ndarray | None:
    """Return the values without their mean; None where they never change."""
    centred = values - values.mean()
    return None if np.abs(centred).max() <= 1e-9 * max(1.0, np.abs(values).max()) else centred


def _correlation(late: np.ndarray, goal: np.ndarray, shift: int) -> float:
    """Return the correlation of `late` read `shift` samples later with `goal`, over the overlap."""
    size = len(goal) - abs(shift)
    a = late[max(shift, 0) : max(shift, 0) + size]
    b = goal[max(-shift, 0) : max(-shift, 0) + size]
    norm = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum() / norm) if norm > 0.0 else 0.0
