"""Figures of predicted against recorded commands of episodes: errors, directions, a confusion table. Pure numpy.

Every error is reported next to three baselines that need no camera: always zero, always the mean of the recordings, and
the command recorded at the step before in the same episode (zero at its first step).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobile_vla_inference.action import AXES, AXIS_UNITS, training_values
from mobile_vla_inference.episodes.comparison import baselines, error_table

#: Speed of a pressed key in the original data, m/s and rad/s; commands are 0 or plus or minus this.
KEY_SPEED = 1.15

#: Names of the signs of each axis: forward and back, left and right, turn left and right (REP-103).
_WORDS = {"linear.x": ("back", "forward"), "linear.y": ("right", "left"), "angular.z": ("turn right", "turn left")}
_STOP = "stop"


@dataclass(frozen=True)
class Prediction:
    """The commands of a policy for one episode.

    Attributes:
        scenario: of the episode.
        predicted: commands of the policy over its axes, in command units, float [steps, axes].
        recorded: the same, of the recording.
    """

    scenario: str
    predicted: np.ndarray
    recorded: np.ndarray


def figures(
    predictions: Sequence[Prediction],
    axes: Sequence[str],
    scale: Sequence[float],
    offset: Sequence[float],
    key_speed: float = KEY_SPEED,
) -> dict[str, Any]:
    """Sum up predictions, JSON-ready: `all`, and under `scenarios` the same per scenario.

    Each has `episodes`, `steps`, `command_units` and `normalised_units` ({`policy`, `zero`, `mean`, `previous`} ->
    {axis or `all`} -> {`mae`, `rmse`}), `direction_accuracy`, `directions` per axis, and `confusion` ({recorded:
    {predicted: steps}}). The normalised units are those of training: recorded commands are clipped to [-1, 1].
    """

    def summed(part: Sequence[Prediction]) -> dict[str, Any]:
        return _summary(part, axes, scale, offset, key_speed)

    names = sorted({prediction.scenario for prediction in predictions})
    return {
        "units": {axis: AXIS_UNITS[AXES.index(axis)] for axis in axes},
        "all": summed(predictions),
        "scenarios": {name: summed([each for each in predictions if each.scenario == name]) for name in names},
    }


def _summary(
    predictions: Sequence[Prediction],
    axes: Sequence[str],
    scale: Sequence[float],
    offset: Sequence[float],
    key_speed: float,
) -> dict[str, Any]:
    predicted = np.concatenate([each.predicted for each in predictions])
    recorded = np.concatenate([each.recorded for each in predictions])
    candidates = {"policy": predicted, **baselines(recorded)}
    candidates["previous"] = np.concatenate([baselines(each.recorded)["previous"] for each in predictions])
    goal = training_values(recorded, scale, offset)
    scales = np.where(np.asarray(scale, dtype=np.float64) == 0.0, 1.0, scale)
    unclipped = {name: (values - np.asarray(offset)) / scales for name, values in candidates.items()}
    predicted_keys, recorded_keys = directions(predicted, key_speed), directions(recorded, key_speed)
    same = predicted_keys == recorded_keys
    return {
        "episodes": len(predictions),
        "steps": len(recorded),
        "command_units": {name: error_table(values, recorded, axes) for name, values in candidates.items()},
        "normalised_units": {name: error_table(values, goal, axes) for name, values in unclipped.items()},
        "direction_accuracy": float(same.all(axis=1).mean()),
        "directions": {axis: float(same[:, column].mean()) for column, axis in enumerate(axes)},
        "confusion": confusion(predicted_keys, recorded_keys, axes),
    }


def directions(commands: np.ndarray, key_speed: float) -> np.ndarray:
    """Return the nearest of -1, 0 and 1 keys for each value of commands [steps, axes]."""
    return np.clip(np.rint(commands / key_speed), -1, 1).astype(int)


def confusion(predicted: np.ndarray, recorded: np.ndarray, axes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count {recorded direction: {predicted direction: steps}}; both levels have every direction that occurs."""
    rows, columns = ([direction_name(keys, axes) for keys in each] for each in (recorded, predicted))
    names = sorted({*rows, *columns}, key=lambda name: (name.count("+"), name))
    counts = Counter(zip(rows, columns))
    return {row: {column: counts[row, column] for column in names} for row in names}


def direction_name(keys: Sequence[int], axes: Sequence[str]) -> str:
    """Return the words for one key per axis (-1, 0, 1), such as `forward + turn left`."""
    pressed = {axis: key for axis, key in zip(axes, keys) if key}
    words = [_WORDS[axis][int(pressed[axis] > 0)] for axis in AXES if axis in pressed]
    return " + ".join(words) or _STOP
