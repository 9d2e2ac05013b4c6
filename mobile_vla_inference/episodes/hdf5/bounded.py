"""Read HDF5 from outside with bounds: nothing outside the file is opened, and nothing large is allocated unchecked.

An HDF5 file can declare 10^12 rows and store none, keep its values in another file (external and virtual data sets,
external links), pack a gigabyte into a megabyte, or need a filter that is not installed. The metadata shows all of
this; it is checked first, and the file is refused with one sentence.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mobile_vla_inference.episodes.episode import EpisodeError
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.outside_files import check_regular

try:
    import h5py
except ImportError as missing:
    raise MobileVlaError(
        f"episodes can't be read without h5py ({missing}), expected what requirements/workbench.txt names; "
        "run `pip install -r requirements/workbench.txt`"
    ) from missing

#: Largest part of a data set that is unpacked at once: the chunks that hold one image, or all of `actions`.
MAX_READ_BYTES = 256 << 20

#: Most chunks that hold one image.
MAX_READ_CHUNKS = 4096

#: Longest text of an attribute or an element, bytes.
MAX_TEXT_BYTES = 1 << 16

#: What h5py raises on damaged files (its documentation leaves the list open).
_DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError, zlib.error)

#: Most soft links that lead to one object.
_MAX_LINKS = 16

#: Most bytes that one byte of DEFLATE can unpack to.
_DEFLATE_RATIO = 1032

#: Names of known filters, for the message about a missing one.
_FILTER_NAMES = {32000: "lzf", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32015: "zstd", 32026: "blosc2"}


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a file to read. Damage becomes EpisodeError, also while the file is open."""
    check_regular(path, "episodes in HDF5", error=EpisodeError)
    try:
        file = h5py.File(path, "r")
    except _DAMAGED as error:
        raise EpisodeError(
            f"{path} can't be read as HDF5 ({_reason(error)}); check the path, or copy it again"
        ) from error
    with file, readable(str(path)):
        yield file


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn the exceptions of h5py on a damaged file into EpisodeError."""
    try:
        yield
    except _DAMAGED as error:
        raise EpisodeError(
            f"{where} is damaged ({_reason(error)}), expected complete episodes; copy it again, or leave it out"
        ) from error


def member(group: h5py.Group, name: str, where: str) -> h5py.Group | h5py.Dataset | None:
    """Return what a group holds under a name, None for nothing. Soft links are followed within the file.

    Raises:
        EpisodeError: it is a link to another file (which is not opened), a link whose target does not exist, or a
            circular link.
    """
    parts, at, links = name.encode("utf-8", "surrogateescape").split(b"/"), group, 0
    while parts:
        part = parts.pop(0)
        if part in (b"", b"."):
            continue
        if not isinstance(at, h5py.Group) or not at.id.links.exists(part):
            if not links:
                return None
            raise EpisodeError(f"{where}: {name} is a link whose target does not exist, expected data; record it again")
        kind = at.id.links.get_info(part).type
        if kind == h5py.h5l.TYPE_HARD:
            at = at[part]
            continue
        links += 1
        if kind != h5py.h5l.TYPE_SOFT:
            raise EpisodeError(
                f"{where}: {name} is a link to another file, expected it in this one; copy it in with h5copy"
            )
        if links > _MAX_LINKS:
            raise EpisodeError(f"{where}: {name} is a circular link, expected data; record it again")
        target = at.id.links.get_val(part)
        if target.startswith(b"/"):
            at = at.file["/"]
        parts[:0] = target.split(b"/")
    return at


def dataset(group: h5py.Group, name: str, where: str) -> h5py.Dataset | None:
    """Return a data set with all its values in this file, in filters that are installed; None where there is none.

    Raises:
        EpisodeError: it is something else, its values are elsewhere or missing, or a filter is not installed.
    """
    found = member(group, name, where)
    if found is None:
        return None
    if not isinstance(found, h5py.Dataset):
        raise EpisodeError(
            f"{where}: {name} is {_kind(found)}, expected one data set; {_REMEDY.get(name, _REMEDY[''])}"
        )
    try:
        found.dtype  # noqa: B018
    except _DAMAGED as error:
        raise EpisodeError(
            f"{where}: {name} has a type that numpy doesn't have ({_reason(error)}), expected numbers; record it again"
        ) from error
    _check_filters(found, name, where)
    _check_stored(found, name, where)
    return found


def read_small(data: h5py.Dataset, name: str, where: str) -> np.ndarray:
    """Return all values of a data set; raise EpisodeError where they are more than MAX_READ_BYTES."""
    if math.prod(data.shape) * data.dtype.itemsize > MAX_READ_BYTES:
        raise EpisodeError(
            f"{where}: {name} is {data.dtype} {list(data.shape)}, expected at most {MAX_READ_BYTES} bytes; split it"
        )
    _check_expansion(data, 0, len(data), name, where)
    return data[()]


def rows_at_once(data: h5py.Dataset, name: str, where: str) -> int:
    """Return how many rows (first dimension) share a chunk and are read at once.

    Raises:
        EpisodeError: one row is spread over more than MAX_READ_BYTES or MAX_READ_CHUNKS of chunks.
    """
    if data.chunks is None:
        return 1
    across = [-(-length // chunk) for length, chunk in zip(data.shape[1:], data.chunks[1:])]
    chunks = math.prod(across)
    if chunks > MAX_READ_CHUNKS or chunks * math.prod(data.chunks) * data.dtype.itemsize > MAX_READ_BYTES:
        row = "x".join(str(length) for length in (1, *data.shape[1:]))
        raise EpisodeError(
            f"{where}: {name} is stored in chunks of {list(data.chunks)}, so that one row takes {chunks} of them, "
            f"expected at most {MAX_READ_BYTES >> 20} MiB for a row; run: h5repack -l {name}:CHUNK={row} IN OUT"
        )
    return data.chunks[0]


def read_rows(data: h5py.Dataset, start: int, stop: int, name: str, where: str) -> np.ndarray:
    """Return rows of a data set whose rows_at_once is at least as many."""
    _check_expansion(data, start, stop, name, where)
    return data[start:stop]


def text_of(value: object, what: str, where: str) -> str:
    """Return a text, or the text of a whole number, from HDF5 as str without control characters."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, (bytes, str)) and len(value) > MAX_TEXT_BYTES:
        raise EpisodeError(f"{where}: {what} is {len(value)} characters long, expected a short text; correct it")
    if isinstance(value, bytes):
        text = value.decode("utf-8", errors="replace")
    elif isinstance(value, str):
        text = value.encode("utf-8", errors="replace").decode("utf-8")
    elif isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        text = str(value)
    else:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise EpisodeError(f"{where}: {what} is {found}, expected text; correct it")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def attribute(group: h5py.Group, name: str, where: str) -> object | None:
    """Return the value of a small attribute; None where there is none.

    Raises:
        EpisodeError: it is empty, large, or of a type that numpy doesn't have.
    """
    if name not in group.attrs:
        return None
    try:
        found = group.attrs.get_id(name)
        is_empty = found.get_space().get_simple_extent_type() == h5py.h5s.NULL
        size = 0 if is_empty else found.get_storage_size()
        value = None if is_empty or size > MAX_TEXT_BYTES else group.attrs[name]
    except _DAMAGED as error:
        raise EpisodeError(
            f"{where}: the attribute {name} can't be read ({_reason(error)}), expected text or a number; correct it"
        ) from error
    if value is None:
        found = "empty" if is_empty else f"{size} bytes large"
        raise EpisodeError(f"{where}: the attribute {name} is {found}, expected text or a number; correct it")
    return value


def text_attribute(group: h5py.Group, name: str, where: str) -> str:
    """Return an attribute's text; empty where there is none."""
    value = attribute(group, name, where)
    return "" if value is None else text_of(value, f"the attribute {name}", where)


def number_attribute(group: h5py.Group, name: str, where: str) -> float | None:
    """Return an attribute's finite number; None where there is none."""
    value = attribute(group, name, where)
    if value is None:
        return None
    number = np.asarray(value)
    if number.size != 1 or number.dtype.kind not in "fiu" or not math.isfinite(float(number.reshape(-1)[0])):
        shown = str(value) if len(str(value)) <= 40 else f"{str(value)[:40]}..."
        raise EpisodeError(f"{where}: the attribute {name} is {shown!r}, expected a finite number; correct it")
    return float(number.reshape(-1)[0])


_REMEDY = {
    "images": "copy one camera's images to `images`",
    "": "record it again",
}


def _kind(found: object) -> str:
    if not isinstance(found, h5py.Group):
        return "a type without data"
    names = [str(name) for name in sorted(found)[:8]]
    return f"a group of {', '.join(names)}" if names else "an empty group"


def _check_filters(data: h5py.Dataset, name: str, where: str) -> None:
    """Raise EpisodeError for a filter that is not installed, and for gzip on top of gzip."""
    plist = data.id.get_create_plist()
    codes = [plist.get_filter(index)[0] for index in range(plist.get_nfilters())]
    for code in codes:
        if not h5py.h5z.filter_avail(code):
            known = f"{_FILTER_NAMES[code]} (filter {code})" if code in _FILTER_NAMES else f"filter {code}"
            raise EpisodeError(
                f"{where}: {name} is compressed with HDF5's {known}, which is not installed here, expected gzip "
                f"or none; on the machine that wrote it, run: h5repack -f {name}:GZIP=1 IN OUT"
            )
    if codes.count(h5py.h5z.FILTER_DEFLATE) > 1:
        raise EpisodeError(f"{where}: {name} is compressed with gzip more than once, expected once; compress it again")


def _check_stored(data: h5py.Dataset, name: str, where: str) -> None:
    """Raise EpisodeError unless every value of a data set is in this file."""
    plist = data.id.get_create_plist()
    if data.is_virtual or plist.get_external_count():
        raise EpisodeError(
            f"{where}: {name} keeps its values in other files, expected them in this one; run: h5repack IN OUT"
        )
    if data.shape is None:
        return
    declared, stored = math.prod(data.shape) * data.id.get_type().get_size(), data.id.get_storage_size()
    if data.chunks is None:
        whole, found = stored >= declared, f"{stored} of {declared} bytes"
    else:
        chunks = math.prod(-(-length // chunk) for length, chunk in zip(data.shape, data.chunks))
        there = data.id.get_num_chunks()
        whole, found = there >= chunks, f"{there} of {chunks} chunks"
    if not whole or stored > Path(data.file.filename).stat().st_size:
        raise EpisodeError(
            f"{where}: {name} is declared as {data.dtype} {list(data.shape)}, but the file stores {found}, expected "
            f"all of it; record it again"
        )


def _check_expansion(data: h5py.Dataset, start: int, stop: int, name: str, where: str) -> None:
    """Raise EpisodeError where gzip would unpack a chunk of these rows to more than the chunk's size.

    HDF5 grows its buffer for as long as packed data follow. Only chunks that could give more than MAX_READ_BYTES are
    unpacked here to try them.
    """
    plist = data.id.get_create_plist()
    codes = [plist.get_filter(index)[0] for index in range(plist.get_nfilters())]
    if h5py.h5z.FILTER_DEFLATE not in codes:
        return
    bit = 1 << codes.index(h5py.h5z.FILTER_DEFLATE)
    chunk_bytes = math.prod(data.chunks) * data.dtype.itemsize
    first_rows = range(start // data.chunks[0] * data.chunks[0], stop, data.chunks[0])
    for position in np.ndindex(len(first_rows), *(-(-n // c) for n, c in zip(data.shape[1:], data.chunks[1:]))):
        offset = (first_rows[position[0]], *(i * c for i, c in zip(position[1:], data.chunks[1:])))
        size = data.id.get_chunk_info_by_coord(offset).size
        if size * _DEFLATE_RATIO <= MAX_READ_BYTES:
            continue
        # Besides its values, a chunk can hold what filters before gzip have added.
        limit = 2 * chunk_bytes + 1024
        if size > limit:
            unpacked = limit
        else:
            mask, packed = data.id.read_direct_chunk(offset)
            unpacked = 0 if mask & bit else len(zlib.decompressobj().decompress(packed, limit))
        if unpacked >= limit:
            raise EpisodeError(
                f"{where}: {name} unpacks to more than its chunks of {chunk_bytes} bytes, expected images or numbers; "
                f"leave it out"
            )


def _reason(error: BaseException) -> str:
    """Return the first line of a library's error, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0].strip("'\"")[:200] if lines else type(error).__name__
