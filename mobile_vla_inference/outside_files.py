"""Read small files that come from outside: regular files only, of a bounded size, as text or JSON.

A path that a user gives, or a file in a copied folder, can be anything: a named pipe that blocks for ever, a device, a
file of gigabytes, JSON that is nested deeper than the interpreter's stack. Every reader here refuses these with one
sentence before it allocates memory. Standard library only, so that every package can use it.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

#: Deepest nesting of objects and arrays that is accepted in JSON from outside.
MAX_JSON_DEPTH = 64

#: Longest whole number that is accepted in JSON from outside, in digits: it fits a float and is parsed at once.
_MAX_INT_DIGITS = 40

_CHUNK_BYTES = 1 << 20

#: Makes an exception from a sentence, such as CheckpointError.
ErrorFactory = Callable[[str], Exception]

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}

#: A string (an unterminated one reaches to the end, so that no text is scanned twice), or a bracket.
_JSON_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_regular(path: Path | str, what: str, *, error: ErrorFactory) -> int:
    """Return the size of a file in bytes, following links; for libraries that open a path themselves.

    Args:
        path: the file.
        what: what it should contain, for the message, such as `the settings of a checkpoint`.
        error: makes the exception.

    Raises:
        error: there is no such file, or it is a folder, named pipe, socket or device (which are not opened).
    """
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as reason:
        raise _unreadable(path, what, error, reason) from reason
    return _regular_size(path, what, error, found)


def open_regular(path: Path | str, what: str, *, error: ErrorFactory) -> BinaryIO:
    """Open a regular file to read bytes, unbuffered; arguments and errors as in check_regular."""
    check_regular(path, what, error=error)  # even opening a device can have an effect
    try:
        # Non-blocking, in case the path has become a named pipe since.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as reason:
        raise _unreadable(path, what, error, reason) from reason
    try:
        _regular_size(path, what, error, os.fstat(handle))
        return os.fdopen(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: Path | str, what: str, max_bytes: int, *, error: ErrorFactory) -> bytes:
    """Return the content of a regular file of at most `max_bytes`; errors as in read_text."""
    with open_regular(path, what, error=error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            parts, left = [], max_bytes + 1  # one byte more than allowed, for a file that grows meanwhile
            while size <= max_bytes and left and (part := file.read(min(left, _CHUNK_BYTES))):
                parts.append(part)
                left -= len(part)
        except OSError as reason:
            raise _unreadable(path, what, error, reason) from reason
    if size > max_bytes or not left:
        raise error(
            f"{path} is larger than {max_bytes} bytes ({max(size, max_bytes + 1)} or more), expected {what}; "
            f"check that it is the right file"
        )
    return b"".join(parts)


def read_text(path: Path | str, what: str, max_bytes: int, *, error: ErrorFactory) -> str:
    """Return the text of a regular file of at most `max_bytes`: UTF-8, or UTF-16 with a byte order mark.

    Args:
        path: the file.
        what: what it should contain, for the message.
        max_bytes: its largest size.
        error: makes the exception.

    Raises:
        error: there is no such file, it is not a regular file, can't be read, is too large, or is not UTF-8.
    """
    return _decoded(read_bytes(path, what, max_bytes, error=error), str(path), what, error)


def read_json(path: Path | str, what: str, max_bytes: int, *, error: ErrorFactory) -> Any:
    """Return the value in a JSON file; arguments and errors as in read_text and parse_json."""
    return parse_json(read_bytes(path, what, max_bytes, error=error), str(path), what, error=error)


def parse_json(data: bytes | str, where: str, what: str, *, error: ErrorFactory) -> Any:
    """Return the value of JSON text (strict RFC 8259; bytes are UTF-8). The caller has limited its size.

    Args:
        data: the text.
        where: what it came from, such as a path, for the message.
        what: what it should be, for the message.
        error: makes the exception.

    Raises:
        error: it is not JSON, is nested deeper than MAX_JSON_DEPTH, has a key twice, or contains NaN, Infinity, a
            number too large for a float, a whole number of very many digits, or half of a surrogate pair, which is not
            Unicode.
    """
    text = _decoded(data, where, what, error) if isinstance(data, bytes) else data
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _depth(text, MAX_JSON_DEPTH) > MAX_JSON_DEPTH:
        raise error(
            f"{where} is nested more than {MAX_JSON_DEPTH} levels deep, expected {what}; "
            "check that it is the right file"
        )
    try:
        value = json.loads(
            text,
            parse_constant=_no_constant,
            parse_float=_finite_float,
            parse_int=_short_int,
            object_pairs_hook=_without_duplicates,
        )
        if _LONE_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as reason:
        raise error(
            f"{where} holds half of a surrogate pair, which is not text, expected {what}; correct it"
        ) from reason
    except ValueError as reason:
        raise error(
            f"{where} can't be read as JSON ({reason}), expected {what}; correct it or copy it again"
        ) from reason
    return value


def _regular_size(path: Path | str, what: str, error: ErrorFactory, found: os.stat_result) -> int:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "not a regular file")
        raise error(f"{path} is {kind}, expected a file with {what}; check the path")
    return found.st_size


def _unreadable(path: Path | str, what: str, error: ErrorFactory, reason: Exception) -> Exception:
    if isinstance(reason, FileNotFoundError):
        return error(f"{path} does not exist, expected {what}; check the path")
    said = getattr(reason, "strerror", None) or reason
    return error(f"{path!s} can't be read ({said}), expected {what}; check the path and its permissions")


def _decoded(data: bytes, where: str, what: str, error: ErrorFactory) -> str:
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as reason:
        raise error(
            f"{where} is not UTF-8 text (byte {reason.start} is 0x{data[reason.start]:02x}), expected {what}; "
            f"save it as UTF-8, or copy it again"
        ) from reason


def _depth(text: str, limit: int) -> int:
    """Return the deepest nesting of brackets outside strings; counting ends above `limit`."""
    depth = deepest = 0
    for token in _JSON_TOKEN.finditer(text):
        first = token[0][0]
        if first in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > limit:
                break
        elif first in "]}":
            depth -= 1
    return deepest


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _short_int(text: str) -> int:
    if len(text) > _MAX_INT_DIGITS:
        raise ValueError(f"{text[:20]}... is a number of {len(text)} digits")
    return int(text)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice[:80]!r} is given twice")
    return value
