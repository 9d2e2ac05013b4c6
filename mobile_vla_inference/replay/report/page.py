"""The report of a replay: one HTML file that needs no network, with images, plots, errors and how it was made.

Page, style and scripts are files in replay/report_page/; they are filled in here. What a table or a still plot can show
is written as HTML and SVG; the scripts draw what moves with the cursor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.replay.report import sections
from mobile_vla_inference.replay.report.drives import Drive, drive_of, drives_section
from mobile_vla_inference.replay.report.labels import labels
from mobile_vla_inference.replay.report.page_data import page_data, pictures
from mobile_vla_inference.replay.result import ReplayResult
from mobile_vla_inference.replay.training_record import read_training_record, seen_frames

_PAGE = Path(__file__).resolve().parent.parent / "report_page"
#: In the order in which the page runs them.
_SCRIPTS = ("data.js", "plots.js", "frame.js", "player.js")


def write_report(
    result: ReplayResult, path: Path, against: ReplayResult | None = None, more: Sequence[Drive] = ()
) -> None:
    """Write the report of a replay; show progress. The arguments are those of `report_html`."""
    write_text_atomically(path, report_html(result, against, more))


def report_html(result: ReplayResult, against: ReplayResult | None = None, more: Sequence[Drive] = ()) -> str:
    """Return the page as text; the bag is read again for its images.

    Args:
        result: the replay.
        against: a second one over the same bag, on the same plots.
        more: other drives, shown next to this one on the same scales.
    """
    results = [result] if against is None else [result, against]
    seen = seen_frames(read_training_record(Path(result.policy.checkpoint)), result.bag, len(result.frames))
    parts = {
        "title": escape(f"{result.bag.name}, replayed with {' and '.join(labels(results))}"),
        "subtitle": escape(_subtitle(result)),
        "style": _file("page.css"),
        "script": "\n".join(map(_file, _SCRIPTS)),
        "notes": "\n".join(f'<p class="note">{escape(note)}</p>' for note in _notes(results)),
        "tiles": sections.tiles(result, seen),
        "path": sections.path_section(result, against),
        "drives": _drives(result, more),
        "errors": sections.errors_section(results, seen),
        "histograms": sections.histograms_section(results),
        "limits": sections.limits_section(results),
        "timing": sections.timing_section(results),
        "counts": sections.counts_section(results),
        "training": sections.training_section(seen),
        "events": sections.events_section(result),
        "made": sections.made_section(results),
        "data": _script_json(page_data(result, against, seen.seen)),
        "pictures": _script_json(pictures(result)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("page.html"))


def _file(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8").rstrip("\n")


def _script_json(content: Any) -> str:
    """Return JSON that can stand inside a script element: nothing in it can close the element."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _subtitle(result: ReplayResult) -> str:
    stepped = sum(frame.stepped for frame in result.frames)
    parts = [f"{len(result.frames)} images of {result.image_topic}, {stepped} stepped ({result.pace})"]
    if result.instructions:
        parts.append("instruction: " + "; ".join(result.instructions))
    return " · ".join(parts)


def _notes(results: Sequence[ReplayResult]) -> list[str]:
    if len(results) == 1:
        return list(results[0].notes)
    named = zip(labels(results), results)
    return list(dict.fromkeys(f"{name}: {note}" for name, each in named for note in each.notes))


def _drives(result: ReplayResult, more: Sequence[Drive]) -> str:
    if not more:
        return ""
    return (
        "<section>\n<h2>Drives side by side</h2>\n<p>Every plot of one kind has the same scales.</p>\n"
        f"{drives_section([drive_of(result), *more])}\n</section>"
    )
