"""Pieces of HTML that the sections of the report share; every text from outside is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

_NUMBER = re.compile(r"[+-]?[\d.,]+( (ms|MiB|%|s))?%?|-")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return a table of plain texts; columns of numbers are aligned at the right. An empty head shows none."""
    rows = [list(row) for row in rows]
    numeric = [bool(rows) and all(_NUMBER.fullmatch(row[column]) for row in rows) for column in range(len(head))]
    classes = [" class=number" if each else "" for each in numeric]
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    heads = "".join(f'<th scope="col"{kind}>{escape(text)}</th>' for text, kind in zip(head, classes))
    heads = f"<thead><tr>{heads}</tr></thead>" if any(head) else ""
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{escape(text)}</td>' for text, kind in zip(row, classes))}</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table>{title}{heads}<tbody>\n{body}</tbody></table></div>'


def tile(name: str, value: str, more: str) -> str:
    """Return one figure of the summary: its name, its value, and a sentence."""
    return f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(more)}</span></div>'
