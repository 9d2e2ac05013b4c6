"""The message about tensors that are missing, unexpected or of a wrong shape, with a table of them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from mobile_vla_inference.policy.storage.layout import HEAD, PARTS, Shape, Shapes
from mobile_vla_inference.policy.storage.tensor_names import shown_name

_MAX_TABLE_ROWS = 40


@dataclass(frozen=True)
class _Row:
    """One line of the table. If several layers share it, `name` has ranges such as `0-3,5` for the layer's number."""

    problem: str  # "missing", "unexpected" or "wrong shape"
    name: str
    found: Shape | None
    expected: Shape | None
    tensors: int


def _misfits(shapes: Shapes, expected: Shapes) -> list[_Row]:
    """Compare a file's tensors with the expected ones; layers with the same misfit share a row."""
    wrong = [
        (name, tuple(shapes[name]), shape)
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    missing = [(name, None, shape) for name, shape in expected.items() if name not in shapes]
    unexpected = [(name, tuple(shape), None) for name, shape in shapes.items() if name not in expected]

    def has(names: Shapes, part: str) -> bool:
        return any(name.startswith(part) for name in names)

    lost_parts = [part for part in PARTS if has(expected, part) and not has(shapes, part)]
    rows = []
    for part in lost_parts:
        count = sum(name.startswith(part) for name, _, _ in missing)
        rows.append(_Row("missing", f"{part}* (all {count} tensors)", None, None, count))
    missing = [entry for entry in missing if not entry[0].startswith(tuple(lost_parts))]
    for problem, entries in (("wrong shape", wrong), ("missing", missing), ("unexpected", unexpected)):
        rows.extend(_grouped(problem, entries))
    return rows


_FIRST_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=_l)\d+$")


def _grouped(problem: str, entries: list[tuple[str, Shape | None, Shape | None]]) -> list[_Row]:
    groups: dict[tuple, list[int | None]] = defaultdict(list)
    for name, found, expected in entries:
        number = _FIRST_NUMBER.search(name)
        in_head = name.startswith(HEAD)  # its numbers are positions, not repeated layers
        if number is None or in_head:
            groups[name, "", found, expected].append(None)
        else:
            groups[name[: number.start()], name[number.end() :], found, expected].append(int(number[0]))
    return [
        _Row(problem, before + _ranges(numbers) + after, found, expected, len(numbers))
        for (before, after, found, expected), numbers in groups.items()
    ]


def _ranges(numbers: list[int | None]) -> str:
    """Write layer numbers as `0-3,5`; nothing for a name without one."""
    values = sorted(number for number in numbers if number is not None)
    spans: list[list[int]] = []
    for value in values:
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def misfit_message(shapes: Shapes, expected: Shapes, source: str, nearest: str) -> str:
    """Return a sentence and a table about the tensors that differ; empty if none does.

    Args:
        shapes: shape of each tensor in the file.
        expected: those of the architecture that fits best.
        source: name of the file.
        nearest: name of the named configuration that is most like it.
    """
    rows = _misfits(shapes, expected)
    if not rows:
        return ""
    counts = Counter()
    for row in rows:
        counts[row.problem] += row.tensors
    summary = ", ".join(f"{counts[problem]} {problem}" for problem in ("missing", "unexpected", "wrong shape"))
    first = (
        f"{source} fits no architecture variant: {summary} tensors (table below), expected those of a policy, such as "
        f"the nearest, the {nearest}; check that it is the right file and complete"
    )
    lines = [f"  {'problem':<12} {'tensor':<72} {'found':<20} expected"]
    lines += [
        f"  {row.problem:<12} {shown_name(row.name):<72} {_shape(row.found):<20} {_shape(row.expected)}".rstrip()
        for row in rows[:_MAX_TABLE_ROWS]
    ]
    if len(rows) > _MAX_TABLE_ROWS:
        lines.append(f"  ... and {len(rows) - _MAX_TABLE_ROWS} more rows")
    return "\n".join([first, *lines])


def _shape(shape: Shape | None) -> str:
    return "-" if shape is None else str(list(shape))
