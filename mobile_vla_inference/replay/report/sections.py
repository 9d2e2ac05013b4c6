"""The sections of the report that are tables and still plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from mobile_vla_inference.action import AXES, AXIS_UNITS
from mobile_vla_inference.episodes.comparison import BASELINES
from mobile_vla_inference.replay.report import plots
from mobile_vla_inference.replay.report.html import table, tile
from mobile_vla_inference.replay.report.labels import labels
from mobile_vla_inference.replay.report.limits import limit_shares
from mobile_vla_inference.replay.report.page_data import MOVING, NO_LOSS, paths
from mobile_vla_inference.replay.result import ReplayFrame, ReplayResult
from mobile_vla_inference.replay.summary import difference, limits_sentence
from mobile_vla_inference.replay.training_record import SeenFrames
from mobile_vla_inference.units import shown

#: Longer lists of events are cut; the JSON file of the replay has all.
EVENTS_MOST = 500

#: What `policy` holds that another place of the page shows.
_SHOWN_ELSEWHERE = ("settings", "warnings")


def tiles(result: ReplayResult, seen: SeenFrames) -> str:
    """Return the figures at the top of the page."""
    found = []
    comparison = result.comparison
    if comparison is not None:
        for axis, unit in comparison["units"].items():
            errors = {name: comparison["command_units"][name][axis]["mae"] for name in ("policy", *BASELINES)}
            normalised = comparison["normalised_units"]["policy"][axis]["mae"]
            baselines = ", ".join(f"{name} {shown(errors[name], '.3f')}" for name in BASELINES)
            value = f"{shown(errors['policy'], '.3f')} {unit}"
            found.append(
                tile(
                    f"mean error of {axis}",
                    value,
                    f"{shown(normalised, '.3f')} normalised; without a camera: {baselines}",
                )
            )
    latency = result.timing.latency_ms
    if latency:
        found.append(tile("policy step, median", f"{latency['p50']:.1f} ms", f"95 % within {latency['p95']:.1f} ms"))
    frames, moving = len(result.frames), result.reasons.get(MOVING, 0)
    found.append(
        tile("the gate lets the robot move", _share(moving, frames), f"{moving} of {frames} images"),
    )
    gate = result.gate
    found.append(
        tile("changed by the gate's limits", _share(gate["changed"], gate["moving"]), limits_sentence(gate)),
    )
    lost = sum(count for cause, count in result.drops.items() if cause not in NO_LOSS)
    found.append(tile("lost images", str(lost), f"LSTM state resets: {sum(result.resets.values())}"))
    if seen.seen is None:
        found.append(tile("seen in training", "not recorded", "see “Training” below"))
    else:
        count = sum(seen.seen)
        by_name = f"{count} of {frames} images, by the name of the drive"
        found.append(tile("seen in training", _share(count, frames), by_name))
    return "\n".join(found)


def _share(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else "-"


def path_section(result: ReplayResult, against: ReplayResult | None) -> str:
    """Return the paths from above, with a dot for each that follows the cursor."""
    found = paths(result, against)
    if not found:
        return "<p>The stamps of the images are not in order: no path can be computed.</p>"
    return plots.from_above(found, plots.path_extent(list(found.values())), cursor=True)


def errors_section(results: Sequence[ReplayResult], seen: SeenFrames) -> str:
    """Return the tables of errors: against the record, on images in and out of training, and between two replays."""
    parts = []
    for name, result in zip(labels(results), results):
        comparison = result.comparison
        if comparison is None:
            parts.append(f"<p>{escape(name)}: the bag contains no recorded command to compare with.</p>")
            continue
        caption = f"{name} against {result.command_topic}, {comparison['frames']} images"
        parts.append(table(("axis", "units", "error", "policy", *BASELINES), _error_rows(comparison), caption))
        facts = [
            [
                axis,
                shown(fact["sign_agreement"], ".0%"),
                str(fact["sign_frames"]),
                shown(fact["lag_s"], "+.2f"),
                shown(fact["lag_correlation"], ".2f"),
            ]
            for axis, fact in comparison["axes"].items()
        ]
        head = ("axis", "same sign", "of images", "lag (s), positive: late", "correlation at this lag")
        parts.append(table(head, facts))
    if seen.seen is not None:
        parts.append(_seen_table(results[0], seen.seen))
    if len(results) == 2 and (apart := difference(*results)) is not None:
        rows = [
            [axis, unit, f"{apart['mae'][axis]:.4f}", f"{apart['max'][axis]:.4f}"]
            for axis, unit in zip(AXES, AXIS_UNITS)
        ]
        caption = f"difference of the two predictions, over {apart['frames']} images that both stepped"
        parts.append(table(("axis", "units", "mean", "largest"), rows, caption))
    return "\n".join(parts)


def _error_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """Return MAE and RMSE per axis; in normalised units only where they differ from the command units."""
    rows = []
    for axis, unit in comparison["units"].items():
        for error in ("mae", "rmse"):
            in_units = {
                units: [shown(comparison[units][name][axis][error], ".4f") for name in ("policy", *BASELINES)]
                for units in ("command_units", "normalised_units")
            }
            same = in_units["command_units"] == in_units["normalised_units"]
            label = f"{unit} (= normalised)" if same else unit
            rows.append([axis, label, error.upper(), *in_units["command_units"]])
            if not same:
                rows.append([axis, "normalised", error.upper(), *in_units["normalised_units"]])
    return rows


def _seen_table(result: ReplayResult, seen: Sequence[bool]) -> str:
    """Return the errors on images that training saw, and on the others."""
    rows = []
    for column, (axis, unit) in enumerate(zip(AXES, AXIS_UNITS)):
        if axis not in result.policy.action_axes:
            continue
        for name, wanted in (("seen in training", True), ("not seen", False)):
            errors = axis_errors(result, column, [each == wanted for each in seen])
            mean = shown(float(np.abs(errors).mean()) if errors.size else None, ".4f")
            rows.append([axis, unit, name, str(errors.size), mean])
    return table(("axis", "units", "images", "count", "MAE"), rows, "errors on images that training saw, and on others")


def axis_errors(result: ReplayResult, column: int, wanted: Sequence[bool] | None = None) -> np.ndarray:
    """Return prediction minus record of one axis over the images that have both, of those wanted; finite ones only."""
    errors = np.array(
        [
            frame.command[column] - frame.recorded[column]
            for index, frame in enumerate(result.frames)
            if frame.command is not None and frame.recorded is not None and (wanted is None or wanted[index])
        ],
        dtype=np.float64,
    )
    return errors[np.isfinite(errors)]


def histograms_section(results: Sequence[ReplayResult]) -> str:
    """Return a histogram of the errors for each axis that a policy drives."""
    figures = []
    for column, (axis, unit) in enumerate(zip(AXES, AXIS_UNITS)):
        errors = [axis_errors(result, column) for result in results if axis in result.policy.action_axes]
        errors = [each for each in errors if each.size]
        if errors:
            figures.append(plots.histogram(axis, unit, errors))
    return "\n".join(figures) or "<p>There is nothing to compare.</p>"


def limits_section(results: Sequence[ReplayResult]) -> str:
    """Return how often and how long each limit of the gate changed the command."""
    parts = []
    for name, result in zip(labels(results), results):
        stamps_s = [frame.stamp_s for frame in result.frames]
        rows = [
            [
                share.name,
                _limit_value(share.name, result.gate["limits"]),
                str(share.frames),
                f"{share.frame_share:.1%}",
                f"{share.time_s:.2f} s",
                f"{share.time_share:.1%}",
            ]
            for share in limit_shares(stamps_s, result.gate["frames"])
            if share.frames or share.name.removeprefix("speed of ") not in _undriven(result)
        ]
        head = ("limit", "value", "images", "share", "time", "share of time")
        parts.append(table(head, rows, f"{name}: of {result.gate['moving']} images at which the robot moves"))
    return "\n".join(parts)


def _undriven(result: ReplayResult) -> set[str]:
    return set(AXES) - set(result.policy.action_axes)


def _limit_value(name: str, limits: Mapping[str, Any]) -> str:
    speeds = {
        "speed of linear.x": ("max_linear_x_mps", "m/s"),
        "speed of linear.y": ("max_linear_y_mps", "m/s"),
        "speed of angular.z": ("max_angular_z_radps", "rad/s"),
    }
    if name in speeds and speeds[name][0] in limits:
        field, unit = speeds[name]
        return f"{limits[field]:g} {unit}"
    if name == "acceleration" and "max_linear_acceleration_mps2" in limits:
        linear, angular = limits["max_linear_acceleration_mps2"], limits["max_angular_acceleration_radps2"]
        return f"{linear:g} m/s², {angular:g} rad/s²"
    return ""


def timing_section(results: Sequence[ReplayResult]) -> str:
    """Return the times of a step and of the work around it, and the memory over the replay."""
    names, rows = labels(results), []
    for name, result in zip(names, results):
        for what, figures in (("policy step", result.timing.latency_ms), ("the rest", result.timing.overhead_ms)):
            cells = [f"{figures[key]:.2f}" if key in figures else "-" for key in ("p50", "p95", "p99", "max", "mean")]
            rows.append([name, what, *cells])
    parts = [table(("checkpoint", "time of an image (ms)", "p50", "p95", "p99", "max", "mean"), rows)]
    parts += [
        f"<p>{escape(name)}: {each.timing.wall_s:.1f} s in all, {each.timing.frames_per_s:.1f} images/s"
        f"{_most_memory(each)}.</p>"
        for name, each in zip(names, results)
    ]
    runs = [each.timing.memory for each in results]
    if any(runs):
        parts.append(f'<div class="pair">{"".join(plots.memory([run for run in runs if run]))}</div>')
    return "\n".join(parts)


def _most_memory(result: ReplayResult) -> str:
    samples = result.timing.memory
    return f", at most {max(sample.rss_mib for sample in samples):.0f} MiB of memory" if samples else ""


def counts_section(results: Sequence[ReplayResult]) -> str:
    """Return what was dropped, what cleared the LSTM state and what the gate decided, one column for each replay."""
    counted = [
        {
            (what, cause): count
            for what, counts in (
                ("image not stepped", result.drops),
                ("LSTM state reset", result.resets),
                ("gate", result.reasons),
            )
            for cause, count in counts.items()
        }
        for result in results
    ]
    rows = [[*key, *(str(each.get(key, 0)) for each in counted)] for key in names_of(counted)]
    heads = ("images",) if len(results) == 1 else labels(results)
    return table(("what", "cause", *heads), rows) if rows else "<p>none</p>"


def training_section(seen: SeenFrames) -> str:
    """Return what is known of the images that training saw."""
    return f"<p>{escape(seen.sentence)}</p>"


def events(frames: Sequence[ReplayFrame]) -> list[tuple[int, str]]:
    """Return what changed, as (index of the image, sentence): instruction, cleared state, drops and the gate."""
    found: list[tuple[int, str]] = []
    instruction = drop = reason = ""
    for frame in frames:
        if frame.instruction != instruction:
            found.append((frame.index, f"instruction: {frame.instruction or 'none'}"))
        if frame.reset:
            found.append((frame.index, f"the LSTM state was reset: {frame.reset}"))
        if frame.drop not in ("", *NO_LOSS, drop):
            found.append((frame.index, f"dropped from here: {frame.drop}"))
        if frame.reason != reason:
            found.append((frame.index, f"gate: {frame.reason}"))
        instruction, reason = frame.instruction, frame.reason
        drop = drop if frame.drop in NO_LOSS else frame.drop
    return found


def events_section(result: ReplayResult) -> str:
    """Return the events, each with a button that jumps to its image."""
    found = events(result.frames)
    if not found:
        return "<p>none</p>"
    start_s = result.frames[0].stamp_s
    rows = "".join(
        f'<tr><td class="number">{result.frames[index].stamp_s - start_s:+.2f} s</td>'
        f'<td><button type="button" data-frame="{index}">image {index}</button></td><td>{escape(text)}</td></tr>\n'
        for index, text in found[:EVENTS_MOST]
    )
    cut = f"<p>The first {EVENTS_MOST} of {len(found)}.</p>" if len(found) > EVENTS_MOST else ""
    return f'{cut}<div class="events" tabindex="0" aria-label="events"><table><tbody>\n{rows}</tbody></table></div>'


def made_section(results: Sequence[ReplayResult]) -> str:
    """Return the command, the bag, the policies and the versions: what is needed to do it again."""
    first = results[0]
    policies = [each.policy.to_json() for each in results]
    rows = [
        [name, *(_plain(policy.get(name)) for policy in policies)]
        for name in names_of(policies)
        if name not in _SHOWN_ELSEWHERE
    ]
    names = labels(results)
    rows = [row for row in rows if row != ["checkpoint", *names]]
    bag = [["bag", str(first.bag)], ["images", first.image_topic], ["recorded commands", first.command_topic or "-"]]
    return "\n".join(
        [
            f"<pre>{escape(first.command_line)}</pre>",
            table(("", ""), bag),
            table(("policy", *names), rows),
            table(("software", "version"), [[name, version] for name, version in first.versions.items()]),
        ]
    )


def names_of(tables: Iterable[Mapping[Any, Any]]) -> list[Any]:
    """Return the keys of some mappings, each once, in order of first use."""
    return list(dict.fromkeys(name for each in tables for name in each))


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)
