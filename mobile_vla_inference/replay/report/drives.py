"""Several drives in one report: a small table for each, and its plots on the same scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mobile_vla_inference.action import AXES, AXIS_UNITS
from mobile_vla_inference.bags.reader import BagError
from mobile_vla_inference.outside_files import read_json
from mobile_vla_inference.replay.dead_reckoning import held, integrate
from mobile_vla_inference.replay.report import plots
from mobile_vla_inference.replay.report.html import table
from mobile_vla_inference.replay.result import ReplayResult, Velocity
from mobile_vla_inference.units import shown

#: Of a replay's JSON file; one of 100,000 frames has a tenth.
_MAX_BYTES = 1 << 29

_LEGEND = "".join(
    f'<span class="key"><svg viewBox="0 0 28 10" aria-hidden="true"><path class="line-{key}" d="M0 5H28"/></svg>'
    f"{name}</span>"
    for key, name in (("recorded", "recorded"), ("predicted", "predicted"), ("gated", "after the gate"))
)


@dataclass(frozen=True)
class Drive:
    """What is compared of a replay.

    Attributes:
        name: of the bag.
        checkpoint: its file or folder.
        instructions: the texts that were in force.
        axes: those that the policy drives.
        stamps_s: one per image.
        recorded, predicted, gated: one velocity (m/s, m/s, rad/s) or None per image.
        comparison: of prediction and recording; None without recorded commands.
        moving, changed: images at which the gate let the robot move, and at which its limits changed the command.
    """

    name: str
    checkpoint: str
    instructions: tuple[str, ...]
    axes: tuple[str, ...]
    stamps_s: tuple[float, ...]
    recorded: tuple[Velocity | None, ...]
    predicted: tuple[Velocity | None, ...]
    gated: tuple[Velocity | None, ...]
    comparison: Mapping[str, Any] | None
    moving: int
    changed: int

    @property
    def in_order(self) -> bool:
        """Whether no image is older than the one before."""
        return bool((np.diff(self.stamps_s) >= 0.0).all())

    def velocities(self) -> dict[str, list[Velocity | None]]:
        """Return the velocities in force at each image, by the key of their colour."""
        lists = {
            "recorded": list(self.recorded),
            "predicted": held(self.stamps_s, self.predicted),
            "gated": list(self.gated),
        }
        return {key: values for key, values in lists.items() if any(value is not None for value in values)}


def drive_of(result: ReplayResult) -> Drive:
    """Return a replay as a drive to compare."""
    frames = result.frames
    return Drive(
        name=result.bag.name,
        checkpoint=result.policy.checkpoint,
        instructions=result.instructions,
        axes=result.policy.action_axes,
        stamps_s=tuple(frame.stamp_s for frame in frames),
        recorded=tuple(frame.recorded for frame in frames),
        predicted=tuple(frame.command for frame in frames),
        gated=tuple(frame.gated for frame in frames),
        comparison=result.comparison,
        moving=result.gate["moving"],
        changed=result.gate["changed"],
    )


def read_drive(path: Path) -> Drive:
    """Read the JSON file of a replay; raise BagError where it is none."""
    try:
        content = read_json(path, "the JSON file of a replay", _MAX_BYTES, error=BagError)
        stamps_s = tuple(float(stamp) for stamp in content["stamps_s"])
        drive = Drive(
            name=Path(content["bag"]).name,
            checkpoint=str(content["policy"]["checkpoint"]),
            instructions=tuple(str(text) for text in content["instructions"]),
            axes=tuple(axis for axis in AXES if axis in content["policy"]["action_axes"]),
            stamps_s=stamps_s,
            recorded=_read_velocities(content["recorded"], len(stamps_s)),
            predicted=_read_velocities(content["commands"], len(stamps_s)),
            gated=_read_velocities(content["gated"], len(stamps_s)),
            comparison=content["comparison"],
            moving=int(content["gate"]["moving"]),
            changed=int(content["gate"]["changed"]),
        )
        _rows(drive)  # the errors that the table shows are there, and numbers
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BagError(
            f"{path} is not a result of a replay, expected a JSON file of `mobile_vla replay --json`; check the path"
        ) from error
    if not stamps_s or not all(map(math.isfinite, stamps_s)):
        raise BagError(f"{path} contains no images with a time, expected at least one; replay again")
    return drive


def _read_velocities(values: Sequence[Any], count: int) -> tuple[Velocity | None, ...]:
    found = tuple(None if value is None else _read_velocity(value) for value in values)
    if len(found) != count:
        raise ValueError(f"{len(found)} velocities for {count} images")
    return found


def _read_velocity(value: Sequence[Any]) -> Velocity:
    x, y, z = (float(each) for each in value)
    return x, y, z


def drives_section(drives: Sequence[Drive]) -> str:
    """Return the drives next to each other, every plot of one kind on the same scales."""
    paths = [
        {key: integrate(drive.stamps_s, values) for key, values in drive.velocities().items()} if drive.in_order else {}
        for drive in drives
    ]
    extent = plots.path_extent([path for each in paths for path in each.values()])
    span_s = (0.0, max((drive.stamps_s[-1] - drive.stamps_s[0] for drive in drives), default=0.0) or 1.0)
    shown_axes = [column for column, axis in enumerate(AXES) if any(axis in drive.axes for drive in drives)]
    ranges = {column: _range(drives, column) for column in shown_axes}
    parts = []
    for drive, path in zip(drives, paths):
        figures = [plots.from_above(path, extent)] if path else ["<p>Its stamps are not in order: no path.</p>"]
        if drive.in_order:
            times_s = [stamp_s - drive.stamps_s[0] for stamp_s in drive.stamps_s]
            figures += [
                plots.over_time(
                    times_s,
                    {key: _column(values, column) for key, values in drive.velocities().items()},
                    (span_s, ranges[column]),
                    AXES[column],
                    AXIS_UNITS[column],
                )
                for column in shown_axes
            ]
        parts.append(
            f'<article class="drive"><h3>{escape(drive.name)}, {escape(Path(drive.checkpoint).name)}</h3>'
            f"{table(('', ''), _rows(drive))}{''.join(figures)}</article>"
        )
    return f'<p class="legend">{_LEGEND}</p>\n<div class="drives">{"".join(parts)}</div>'


def _rows(drive: Drive) -> list[list[str]]:
    stepped = sum(command is not None for command in drive.predicted)
    rows = [
        ["images", f"{len(drive.stamps_s)}, {stepped} stepped"],
        ["length", f"{drive.stamps_s[-1] - drive.stamps_s[0]:.1f} s" if drive.stamps_s else "-"],
        ["instruction", "; ".join(drive.instructions) or "none"],
    ]
    if drive.comparison is None:
        rows.append(["error", "no recorded commands"])
    else:
        for axis, unit in drive.comparison["units"].items():
            errors = drive.comparison["command_units"]
            rows.append(
                [
                    f"MAE of {axis}",
                    f"{shown(errors['policy'][axis]['mae'], '.3f')} {unit} "
                    f"(always zero: {shown(errors['zero'][axis]['mae'], '.3f')})",
                ]
            )
    share = f"{drive.changed / drive.moving:.1%} of {drive.moving} images with motion" if drive.moving else "-"
    rows.append(["changed by limits", share])
    return rows


def _column(values: Sequence[Velocity | None], column: int) -> list[float | None]:
    return [None if value is None or not math.isfinite(value[column]) else value[column] for value in values]


def _range(drives: Sequence[Drive], column: int) -> tuple[float, float]:
    values = [
        value
        for drive in drives
        for velocities in drive.velocities().values()
        for value in _column(velocities, column)
        if value is not None
    ]
    low, high = min([0.0, *values]), max([0.0, *values])
    margin = (high - low) * 0.05 or 0.1
    return low - margin, high + margin
