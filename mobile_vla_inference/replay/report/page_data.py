"""What the script of the report draws, JSON-ready: columns with one value per image, and the images themselves."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mobile_vla_inference.action import AXES, AXIS_UNITS
from mobile_vla_inference.replay.dead_reckoning import MAX_GAP_S, held, integrate
from mobile_vla_inference.replay.report.labels import labels
from mobile_vla_inference.replay.result import ReplayFrame, ReplayResult, Velocity

#: A report on a long drive shows a picture for every n-th image, so that a browser opens it at once: at most so many.
PICTURES_MOST = 1200
PICTURE_WIDTH_PX = 320
#: Drops that are expected: the policy takes no more than its period, or than the steps that are given.
NO_LOSS = ("not_due", "not_stepped")
MOVING = "moving"

_LEAST_VIEW_S = 0.5
#: Images per second where the stamps are out of order.
_NOMINAL_RATE_HZ = 20.0
_REASON_COLORS = ("c0", "c1", "c2", "c3", "c4", "c5")


def page_data(
    result: ReplayResult, against: ReplayResult | None = None, seen: Sequence[bool] | None = None
) -> dict[str, Any]:
    """Return what report_page/*.js draw, with one value per image of the first replay in each column.

    Words (reasons, drops, resets, instructions) are lists of which the columns hold the positions. Where the stamps are
    in order, `times` are seconds since the first one, else positions of images; `paths` (m) are given only with times.

    Args:
        result: the replay.
        against: a second one over the same bag.
        seen: per image, whether training saw it; None: not recorded.
    """
    frames = result.frames
    times = seconds(frames)
    in_order = times is not None
    others = () if against is None else against.frames[: len(frames)]
    lists = _velocities(result, against)
    reason_words, reason = _coded(frame.reason for frame in frames)
    drop_words, drop = _coded(frame.drop for frame in frames)
    reset_words, reset = _coded(frame.reset for frame in frames)
    instruction_words, instruction = _coded(frame.instruction for frame in frames)
    limit_words, limit = _coded(", ".join(names or ()) for names in result.gate["frames"])
    axes = _shown_axes(result, [values for _, values in lists.values()])
    rate = 1.0 if in_order else _NOMINAL_RATE_HZ
    return {
        "times": times if in_order else list(range(len(frames))),
        "time_unit": "s" if in_order else "image",
        "units_per_s": rate,
        "max_gap": MAX_GAP_S * rate,
        "least_view": _LEAST_VIEW_S * rate,
        "axes": axes,
        "series": [
            {
                "key": key,
                "name": name,
                "values": [[_rounded(each, axis["column"]) for each in values] for axis in axes],
            }
            for key, (name, values) in lists.items()
        ],
        "paths": {key: np.round(path[:, :2], 3).tolist() for key, path in paths(result, against).items()},
        "step_ms": [
            {"key": "predicted", "values": [_milliseconds(frame.latency_s) for frame in frames]},
            *([{"key": "against", "values": [_milliseconds(frame.latency_s) for frame in others]}] if others else []),
        ],
        "reasons": _colored(reason_words),
        "reason": reason,
        "limits": limit_words,
        "limit": limit,
        "drops": drop_words,
        "drop": drop,
        "lost": [int(frame.drop not in ("", *NO_LOSS)) for frame in frames],
        "resets": reset_words,
        "reset": reset,
        "instructions": instruction_words,
        "instruction": instruction,
        "marks": _marks(frames),
        "seen": None if seen is None else [int(each) for each in seen],
    }


def seconds(frames: Sequence[ReplayFrame]) -> list[float] | None:
    """Return the seconds since the first image; None where the stamps are not in order."""
    stamps = np.array([frame.stamp_s for frame in frames])
    if len(stamps) == 0 or (np.diff(stamps) < 0.0).any():
        return None
    return np.round(stamps - stamps[0], 4).tolist()


def paths(result: ReplayResult, against: ReplayResult | None = None) -> dict[str, np.ndarray]:
    """Return the path that each list of velocities would drive, [images, 3]; empty where stamps are out of order."""
    times = seconds(result.frames)
    if times is None:
        return {}
    return {
        key: integrate(times, values if key in ("recorded", "gated") else held(times, values))
        for key, (_, values) in _velocities(result, against).items()
    }


def _velocities(result: ReplayResult, against: ReplayResult | None) -> dict[str, tuple[str, list[Velocity | None]]]:
    """Return key -> (name, one velocity per image), without the lists that hold nothing."""
    frames = result.frames
    names = labels([result] if against is None else [result, against])
    lists: dict[str, tuple[str, list[Velocity | None]]] = {
        "recorded": ("recorded", [frame.recorded for frame in frames]),
        "predicted": (f"predicted, {names[0]}", [frame.command for frame in frames]),
        "gated": ("after the gate", [frame.gated for frame in frames]),
    }
    if against is not None:
        others = against.frames[: len(frames)]
        missing = [None] * (len(frames) - len(others))
        lists["against"] = (f"predicted, {names[1]}", [frame.command for frame in others] + missing)
    return {key: entry for key, entry in lists.items() if any(value is not None for value in entry[1])}


def _coded(words: Iterable[str]) -> tuple[list[str], list[int]]:
    """Return the different words in order of first use, and the position of each word among them."""
    positions: dict[str, int] = {}
    codes = [positions.setdefault(word, len(positions)) for word in words]
    return list(positions), codes


def _colored(reasons: Sequence[str]) -> list[dict[str, str]]:
    """Return each reason with the name of its colour: one for moving, the others in turn."""
    still = [reason for reason in reasons if reason != MOVING]
    colors = {reason: _REASON_COLORS[index % len(_REASON_COLORS)] for index, reason in enumerate(still)}
    return [{"name": reason, "color": colors.get(reason, "good")} for reason in reasons]


def _shown_axes(result: ReplayResult, lists: Sequence[Sequence[Velocity | None]]) -> list[dict[str, Any]]:
    """Return the axes that the policy drives, and those along which any of the lists moves."""
    axes = []
    for column, (name, unit) in enumerate(zip(AXES, AXIS_UNITS)):
        moves = any(value[column] for values in lists for value in values if value is not None)
        if moves or name in result.policy.action_axes:
            axes.append({"name": name, "unit": unit, "column": column})
    return axes


def _rounded(velocity: Velocity | None, column: int) -> float | None:
    return None if velocity is None or not math.isfinite(velocity[column]) else round(velocity[column], 4)


def _milliseconds(latency_s: float | None) -> float | None:
    return None if latency_s is None else round(latency_s * 1000.0, 3)


def _marks(frames: Sequence[ReplayFrame]) -> list[str]:
    marks, former = [], ""
    for frame in frames:
        marks.append(("◆" if frame.instruction != former else "") + ("▲" if frame.reset else ""))
        former = frame.instruction
    return marks


def picture_indices(count: int, most: int = PICTURES_MOST) -> list[int]:
    """Return which of `count` images are shown: all, or `most` of them at even distances, the ends included."""
    if count <= most:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


def pictures(result: ReplayResult) -> dict[str, list[Any]]:
    """Read the bag again for the images that are shown: `frames` (their positions) and `jpeg` (base64)."""
    from tqdm import tqdm

    indices = picture_indices(len(result.frames))
    jpegs = tqdm(
        result.frames_jpeg(PICTURE_WIDTH_PX, indices), "pictures", len(indices), unit="frame", delay=1, disable=None
    )
    shown = [(index, base64.b64encode(jpeg).decode("ascii")) for index, jpeg in jpegs]
    return {"frames": [index for index, _ in shown], "jpeg": [jpeg for _, jpeg in shown]}
