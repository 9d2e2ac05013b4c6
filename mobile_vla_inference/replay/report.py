"""The report of a replay: one HTML file that needs no network, with the frames, plots, errors and how it was made.

Page, style and script are files in report_page/; here they are filled in. What a table or a still picture can show is
written as HTML and SVG; report_page/page.js draws what moves with the cursor.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mobile_vla_inference.action import AXES, AXIS_UNITS
from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.control.memory import MemorySample
from mobile_vla_inference.episodes.comparison import BASELINES
from mobile_vla_inference.replay.result import ReplayFrame, ReplayResult, Velocity
from mobile_vla_inference.replay.summary import difference, limits_sentence

#: A report over a long drive shows a picture for every n-th image, so that a browser opens it at once: at most so many.
PICTURES_MOST = 1200
PICTURE_WIDTH_PX = 320
#: Longer lists of events are cut; the JSON file of the replay has all.
EVENTS_MOST = 500

_PAGE = Path(__file__).resolve().parent / "report_page"
#: Values further apart than this are not joined by a line: the node forgets its state after such a gap.
_GAP_S = 2.0
_LEAST_VIEW_S = 0.5
#: Images per second where the stamps can't tell.
_NOMINAL_RATE_HZ = 20.0
_BINS = 41
_REASON_COLORS = ("c0", "c1", "c2", "c3", "c4", "c5")
_MOVING = "moving"
#: Drops that are no loss: the policy takes no more than its period, or than the steps that are told.
_NO_LOSS = ("not_due", "not_stepped")


def write_report(result: ReplayResult, path: Path, against: ReplayResult | None = None) -> None:
    """Write the report of a replay, and of a second one over the same bag where there is one; show progress."""
    write_text_atomically(path, report_html(result, against))


def report_html(result: ReplayResult, against: ReplayResult | None = None) -> str:
    """Return the page as text; the bag is read again for its pictures."""
    results = [result] if against is None else [result, against]
    parts = {
        "title": escape(f"{result.bag.name}, replayed with {_label(result)}"),
        "subtitle": escape(_subtitle(result)),
        "style": _file("page.css"),
        "script": _file("page.js"),
        "notes": "\n".join(f'<p class="note">{escape(note)}</p>' for note in _notes(results)),
        "tiles": "\n".join(_tiles(result)),
        "errors": _errors(results),
        "histograms": _histograms(results),
        "timing": _timing(results),
        "counts": _counts(results),
        "events": _events(result),
        "made": _made(results),
        "data": _script_json(page_data(result, against)),
        "pictures": _script_json(_pictures(result)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("page.html"))


def _file(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8").rstrip("\n")


def _script_json(content: Any) -> str:
    """Return JSON that can stand inside a script element: nothing in it can close the element."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _label(result: ReplayResult) -> str:
    return result.policy.checkpoint


def _subtitle(result: ReplayResult) -> str:
    stepped = sum(frame.stepped for frame in result.frames)
    parts = [f"{len(result.frames)} images of {result.image_topic}, {stepped} stepped ({result.pace})"]
    if result.instructions:
        parts.append("told: " + "; ".join(result.instructions))
    return " · ".join(parts)


def _notes(results: Sequence[ReplayResult]) -> list[str]:
    if len(results) == 1:
        return list(results[0].notes)
    return list(dict.fromkeys(f"{_label(each)}: {note}" for each in results for note in each.notes))


# ---- what the script draws -------------------------------------------------------------------------------------------


def page_data(result: ReplayResult, against: ReplayResult | None = None) -> dict[str, Any]:
    """Return what report_page/page.js draws, JSON-ready: columns with one value per image of the first replay.

    Words (reasons, drops, resets, instructions) are lists of which the columns hold the positions. Where the stamps are
    in order, `times` are seconds since the first one, else positions of images.
    """
    frames = result.frames
    stamps = np.array([frame.stamp_s for frame in frames])
    in_order = bool((np.diff(stamps) >= 0.0).all()) and len(stamps) > 0
    times = np.round(stamps - stamps[0], 4).tolist() if in_order else list(range(len(frames)))
    others = () if against is None else against.frames[: len(frames)]
    lists: dict[str, tuple[str, list[Velocity | None]]] = {
        "recorded": ("recorded", [frame.recorded for frame in frames]),
        "predicted": (f"predicted, {_label(result)}", [frame.command for frame in frames]),
        "gated": ("what the gate lets through", [frame.gated for frame in frames]),
    }
    if against is not None:
        missing = [None] * (len(frames) - len(others))
        lists["against"] = (f"predicted, {_label(against)}", [frame.command for frame in others] + missing)
    lists = {key: entry for key, entry in lists.items() if any(value is not None for value in entry[1])}
    reason_words, reason = _coded(frame.reason for frame in frames)
    drop_words, drop = _coded(frame.drop for frame in frames)
    reset_words, reset = _coded(frame.reset for frame in frames)
    told_words, told = _coded(frame.instruction for frame in frames)
    limit_words, limit = _coded(", ".join(names or ()) for names in result.gate["frames"])
    axes = _shown_axes(result, [values for _, values in lists.values()])
    rate = 1.0 if in_order else _NOMINAL_RATE_HZ
    return {
        "times": times,
        "time_unit": "s" if in_order else "image",
        "units_per_s": rate,
        "max_gap": _GAP_S * rate,
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
        "lost": [int(frame.drop not in ("", *_NO_LOSS)) for frame in frames],
        "resets": reset_words,
        "reset": reset,
        "instructions": told_words,
        "instruction": told,
        "marks": _marks(frames),
    }


def _coded(words: Iterable[str]) -> tuple[list[str], list[int]]:
    """Return the different words in order of first use, and the position of each word among them."""
    positions: dict[str, int] = {}
    codes = [positions.setdefault(word, len(positions)) for word in words]
    return list(positions), codes


def _colored(reasons: Sequence[str]) -> list[dict[str, str]]:
    """Return each reason with the name of its colour: one for moving, the others in turn."""
    still = [reason for reason in reasons if reason != _MOVING]
    colors = {reason: _REASON_COLORS[index % len(_REASON_COLORS)] for index, reason in enumerate(still)}
    return [{"name": reason, "color": colors.get(reason, "good")} for reason in reasons]


def _shown_axes(result: ReplayResult, lists: Sequence[Sequence[Velocity | None]]) -> list[dict[str, Any]]:
    """Return the axes that the policy drives or that somebody moved along, with the largest speed as `limit`."""
    axes = []
    for column, (name, unit) in enumerate(zip(AXES, AXIS_UNITS)):
        speeds = [abs(value[column]) for values in lists for value in values if value is not None]
        limit = max((speed for speed in speeds if math.isfinite(speed)), default=0.0)
        if limit > 0.0 or name in result.policy.action_axes:
            axes.append({"name": name, "unit": unit, "column": column, "limit": limit or 1.0})
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


def _pictures(result: ReplayResult) -> dict[str, list[Any]]:
    from tqdm import tqdm

    indices = picture_indices(len(result.frames))
    pictures = tqdm(
        result.frames_jpeg(PICTURE_WIDTH_PX, indices), "pictures", len(indices), unit="frame", delay=1, disable=None
    )
    shown = [(index, base64.b64encode(jpeg).decode("ascii")) for index, jpeg in pictures]
    return {"frames": [index for index, _ in shown], "jpeg": [jpeg for _, jpeg in shown]}


# ---- tables and still pictures ---------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return a table of plain texts; cells that hold a number stand at the right."""
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>{told}<thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _cell(text: str) -> str:
    number = re.fullmatch(r"[+-]?[\d.,]+( (ms|MiB|%))?|-", text)
    return f"<td{' class=number' if number else ''}>{escape(text)}</td>"


def _shown(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _tiles(result: ReplayResult) -> list[str]:
    tiles = []
    comparison = result.comparison
    if comparison is not None:
        for axis, unit in comparison["units"].items():
            errors = {name: comparison["command_units"][name][axis]["mae"] for name in ("policy", *BASELINES)}
            normalised = comparison["normalised_units"]["policy"][axis]["mae"]
            told = ", ".join(f"{name} {_shown(errors[name], '.3f')}" for name in BASELINES)
            tiles.append(
                _tile(
                    f"MAE of {axis}",
                    f"{_shown(errors['policy'], '.3f')} {unit}",
                    f"{_shown(normalised, '.3f')} normalised; without a camera: {told}",
                )
            )
    latency = result.timing.latency_ms
    if latency:
        tiles.append(_tile("policy step, p50", f"{latency['p50']:.1f} ms", f"p95 {latency['p95']:.1f} ms"))
    frames = len(result.frames)
    moving = result.reasons.get(_MOVING, 0)
    lost = sum(count for cause, count in result.drops.items() if cause not in _NO_LOSS)
    tiles.append(
        _tile("the gate lets move", f"{moving / frames:.1%}" if frames else "-", f"{moving} of {frames} images")
    )
    tiles.append(_limits_tile(result.gate))
    tiles.append(_tile("lost images", str(lost), f"the state was cleared before {sum(result.resets.values())}"))
    return tiles


def _limits_tile(gate: Mapping[str, Any]) -> str:
    """Tell how much of what moves is what the policy wanted, and how much the gate's limits made of it."""
    moving, changed = gate["moving"], gate["changed"]
    return _tile("its limits change", f"{changed / moving:.1%}" if moving else "-", limits_sentence(gate))


def _tile(name: str, value: str, more: str) -> str:
    return f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(more)}</span></div>'


def _errors(results: Sequence[ReplayResult]) -> str:
    parts = []
    for result in results:
        comparison = result.comparison
        if comparison is None:
            parts.append(f"<p>{escape(_label(result))}: the bag holds no recorded command to compare with.</p>")
            continue
        rows = [
            [axis, label, error.upper()]
            + [_shown(comparison[units][name][axis][error], ".4f") for name in ("policy", *BASELINES)]
            for axis, unit in comparison["units"].items()
            for units, label in (("command_units", unit), ("normalised_units", "normalised"))
            for error in ("mae", "rmse")
        ]
        caption = f"{_label(result)} against {result.command_topic}, {comparison['frames']} images"
        parts.append(_table(("axis", "units", "error", "policy", *BASELINES), rows, caption))
        facts = [
            [
                axis,
                _shown(fact["sign_agreement"], ".0%"),
                str(fact["sign_frames"]),
                _shown(fact["lag_s"], "+.2f"),
                _shown(fact["lag_correlation"], ".2f"),
            ]
            for axis, fact in comparison["axes"].items()
        ]
        parts.append(_table(("axis", "signs agree", "of images", "lag (s), positive: late", "its correlation"), facts))
    if len(results) == 2 and (apart := difference(*results)) is not None:
        rows = [[axis, unit, f"{apart['mae'][axis]:.4f}", f"{apart['max'][axis]:.4f}"] for axis, unit in _units()]
        caption = f"how far the two are apart, over {apart['frames']} images that both stepped"
        parts.append(_table(("axis", "units", "mean", "largest"), rows, caption))
    return "\n".join(parts)


def _units() -> list[tuple[str, str]]:
    return list(zip(AXES, AXIS_UNITS))


def _histograms(results: Sequence[ReplayResult]) -> str:
    figures = []
    for column, (axis, unit) in enumerate(_units()):
        errors = [_axis_errors(result, column) for result in results if axis in result.policy.action_axes]
        errors = [each for each in errors if each.size]
        if errors:
            figures.append(_histogram(f"{axis} ({unit})", errors))
    return "\n".join(figures) or "<p>There is nothing to compare.</p>"


def _axis_errors(result: ReplayResult, column: int) -> np.ndarray:
    errors = np.array(
        [
            frame.command[column] - frame.recorded[column]
            for frame in result.frames
            if frame.command is not None and frame.recorded is not None
        ]
    )
    return errors[np.isfinite(errors)]


def _histogram(title: str, errors: Sequence[np.ndarray]) -> str:
    """Return the errors of one axis as bars, and those of a second replay as a line over them."""
    reach = max(float(np.percentile(np.abs(np.concatenate(errors)), 99)), 1e-3)
    edges = np.linspace(-reach, reach, _BINS + 1)
    counts = [np.histogram(np.clip(each, -reach, reach), edges)[0] for each in errors]
    most = max(int(each.max()) for each in counts)
    width, height, left, bottom = 360.0, 170.0, 34.0, 22.0
    step = (width - left - 6.0) / _BINS

    def x(value: float) -> float:
        return left + (value + reach) / (2.0 * reach) * step * _BINS

    def y(count: float) -> float:
        return height - bottom - (height - bottom - 12.0) * count / most

    drawn = [
        f'<rect class="fill-predicted" x="{left + index * step:.1f}" y="{y(count):.1f}" width="{step - 1:.1f}" '
        f'height="{height - bottom - y(count):.1f}"/>'
        for index, count in enumerate(counts[0])
        if count
    ]
    for more in counts[1:]:
        points = " ".join(f"{left + (index + 0.5) * step:.1f},{y(count):.1f}" for index, count in enumerate(more))
        drawn.append(f'<polyline class="line-against" points="{points}"/>')
    drawn += [f'<path class="axis" d="M{left} {height - bottom}H{width - 6}M{x(0):.1f} 8V{height - bottom}"/>']
    for value, anchor in ((-reach, "start"), (0.0, "middle"), (reach, "end")):
        drawn.append(f'<text x="{x(value):.1f}" y="{height - 7}" text-anchor="{anchor}">{value:+.2f}</text>')
    drawn.append(f'<text x="{left - 4}" y="18" text-anchor="end">{most}</text>')
    told = f"{title}: images by prediction minus record" + (", the line is the second replay" if counts[1:] else "")
    return _figure(told, width, height, drawn)


def _figure(caption: str, width: float, height: float, drawn: Sequence[str]) -> str:
    return (
        f'<figure><svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(caption)}">'
        f"{''.join(drawn)}</svg><figcaption>{escape(caption)}</figcaption></figure>"
    )


def _timing(results: Sequence[ReplayResult]) -> str:
    rows = []
    for result in results:
        for name, figures in (("policy step", result.timing.latency_ms), ("beyond", result.timing.overhead_ms)):
            cells = [f"{figures[key]:.2f}" if key in figures else "-" for key in ("p50", "p95", "p99", "max", "mean")]
            rows.append([_label(result), name, *cells])
    parts = [_table(("checkpoint", "of an image (ms)", "p50", "p95", "p99", "max", "mean"), rows)]
    parts += [
        f"<p>{escape(_label(each))}: {each.timing.wall_s:.1f} s in all, {each.timing.frames_per_s:.1f} images/s.</p>"
        for each in results
    ]
    memory = [each.timing.memory for each in results]
    if any(memory):
        parts.append(f'<div class="pair">{_memory(memory)}</div>')
    return "\n".join(parts)


def _memory(runs: Sequence[Sequence[MemorySample]]) -> str:
    """Return the memory of the process, and of torch on the GPU where it used one, over the replay."""
    series = {
        "resident memory of the process (MiB)": "rss_mib",
        "memory of torch on the GPU (MiB)": "gpu_allocated_mib",
    }
    figures = []
    width, height, left, bottom = 360.0, 150.0, 44.0, 22.0
    for title, field in series.items():
        most = max(getattr(sample, field) for run in runs for sample in run)
        if most <= 0.0:
            continue
        end_s = max(sample.elapsed_s for run in runs for sample in run) or 1.0
        drawn = [f'<path class="axis" d="M{left} 8V{height - bottom}H{width - 6}"/>']
        for run, style in zip(runs, ("line-predicted", "line-against")):
            points = " ".join(
                f"{left + sample.elapsed_s / end_s * (width - left - 6):.1f},"
                f"{height - bottom - getattr(sample, field) / (most * 1.1) * (height - bottom - 8):.1f}"
                for sample in run
            )
            drawn.append(f'<polyline class="{style}" points="{points}"/>')
        drawn.append(
            f'<text x="{left - 4}" y="{8 + (height - bottom - 8) / 11 + 4:.1f}" text-anchor="end">{most:.0f}</text>'
        )
        drawn.append(f'<text x="{left - 4}" y="{height - bottom}" text-anchor="end">0</text>')
        drawn.append(f'<text x="{width - 6}" y="{height - 7}" text-anchor="end">{end_s:.1f} s</text>')
        figures.append(_figure(title, width, height, drawn))
    return "\n".join(figures)


def _counts(results: Sequence[ReplayResult]) -> str:
    rows = []
    for result in results:
        for what, counts in (("dropped", result.drops), ("cleared", result.resets), ("gate", result.reasons)):
            rows += [[_label(result), what, cause, str(count)] for cause, count in counts.items()]
        rows += [[_label(result), "changed by", limit, str(count)] for limit, count in result.gate["by"].items()]
    return _table(("checkpoint", "what", "cause", "images"), rows) if rows else "<p>none</p>"


def events(frames: Sequence[ReplayFrame]) -> list[tuple[int, str]]:
    """Return what changed, as (index of the image, sentence): instruction, cleared state, drops and the gate."""
    found: list[tuple[int, str]] = []
    instruction = drop = reason = ""
    for frame in frames:
        if frame.instruction != instruction:
            found.append((frame.index, f"instruction: {frame.instruction or 'none'}"))
        if frame.reset:
            found.append((frame.index, f"the state was cleared: {frame.reset}"))
        if frame.drop not in ("", *_NO_LOSS, drop):
            found.append((frame.index, f"dropped from here: {frame.drop}"))
        if frame.reason != reason:
            found.append((frame.index, f"gate: {frame.reason}"))
        instruction, reason = frame.instruction, frame.reason
        drop = drop if frame.drop in _NO_LOSS else frame.drop
    return found


def _events(result: ReplayResult) -> str:
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


def _made(results: Sequence[ReplayResult]) -> str:
    first = results[0]
    tables = [each.policy.to_json() for each in results]
    policies = [[name, *(_plain(table[name]) for table in tables)] for name in tables[0]]
    return "\n".join(
        [
            f"<pre>{escape(first.command_line)}</pre>",
            _table(
                ("bag", "images", "recorded commands"),
                [[str(first.bag), first.image_topic, first.command_topic or "-"]],
            ),
            _table(("policy", *(_label(each) for each in results)), policies),
            _table(("version of", ""), [[name, version] for name, version in first.versions.items()]),
        ]
    )


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)
