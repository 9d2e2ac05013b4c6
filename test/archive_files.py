"""Zip archives and pickles for tests of checkpoints."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

#: A pickle with a memo number of 4 billion: C's unpickler would allocate a place for each.
MEMO_BOMB = b"\x80\x02}r" + struct.pack("<I", 0xFFFFFFFE) + b"."


class Call:
    """Pickles as a call of a function, which plain unpickling would run."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced


def zipped(records: dict[str, bytes] | Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive of records by name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in dict(records).items():
            archive.writestr(name, data)
    return out.getvalue()


def records_of(archive: bytes) -> dict[str, bytes]:
    """Return the records of an archive by name."""
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        return {info.filename: source.read(info) for info in source.infolist()}
