"""Find the storage files of a bag; their first bytes, not their names, decide what they are."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from mobile_vla_inference.bags import mcap_file, sqlite_file
from mobile_vla_inference.bags.source import ZSTD_MAGIC, BagError
from mobile_vla_inference.outside_files import check_regular, open_regular, read_text

METADATA = "metadata.yaml"
SUFFIXES = (".mcap", ".db3")
#: A folder with this file is input of `make-bag`.
_TABLE = "actions.csv"

MCAP, SQLITE = "mcap", "sqlite3"

_ZSTD = "zstd"
_ZSTD_SUFFIXES = (".zstd", ".zst")

#: Other files that people give as a bag: first bytes, what it is, and what to do.
_FOREIGN = (
    (b"#ROSBAG V", "is a bag of ROS 1", "convert it with `rosbags-convert --src {path} --dst {stem}`"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the recording", "fetch that with `git lfs pull`"),
    (b"\x1f\x8b", "is compressed with gzip", "unpack it with `gunzip`, or `tar -xzf` if it is an archive"),
    (b"BZh", "is compressed with bzip2", "unpack it with `bunzip2`, or `tar -xjf` if it is an archive"),
    (b"\xfd7zXZ\0", "is compressed with xz", "unpack it with `unxz`, or `tar -xJf` if it is an archive"),
    (b"\x04\x22\x4d\x18", "is compressed with lz4", "unpack it with `lz4 -d`"),
    (b"PK\x03\x04", "is a zip archive", "unpack it with `unzip`"),
    (b"\x89HDF\r\n", "is an HDF5 file", "convert the episodes with `mobile_vla episodes-to-bag`"),
    (b"<!DOCTYPE", "is a web page", "download the file itself"),
    (b"<html", "is a web page", "download the file itself"),
)
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257

#: Limits of metadata.yaml: more than rosbag 2 writes for thousands of files and topics.
_MAX_METADATA_BYTES = 1 << 20
_MAX_METADATA_EVENTS = 200_000
_MAX_METADATA_DEPTH = 20
_MAX_NAMES_LISTED = 5

#: Most bytes that a compressed file may unpack to: the larger of a fixed size and a multiple of its own.
_MIN_UNPACKED_BYTES = 1 << 30
_MAX_UNPACKED_RATIO = 200
_COPY_BYTES = 1 << 20


class StorageFile(NamedTuple):
    """A file to read, its kind (MCAP or SQLITE), and its name in messages: of a copy, the file it was unpacked from."""

    path: Path
    kind: str
    name: Path


def storage_files(path: Path, notes: list[str], stack: contextlib.ExitStack) -> list[StorageFile]:
    """Find the files of a bag; compressed ones are unpacked, until `stack` is closed.

    Raises:
        BagError: there is no bag.
        OSError: something can't be read.
    """
    if not path.exists():
        raise BagError(f"{path} does not exist, expected a bag: a folder, a .mcap or a .db3 file; check the path")
    if path.is_dir():
        return [_open(file, stack) for file in _files_of_folder(path, notes)]
    if check_regular(path, "a bag", error=BagError) == 0:
        raise BagError(f"{path} is empty (0 bytes), expected a bag; copy it again")
    if path.name == METADATA:
        raise BagError(f"{path} is only the metadata of a bag, expected the folder; give {path.parent}")
    return [_open(path, stack)]


def _files_of_folder(folder: Path, notes: list[str]) -> list[Path]:
    present = sorted(file for file in folder.iterdir() if not file.name.startswith(".") and file.name != METADATA)
    files = [file for file in present if file.is_file()]
    named = _named_files(folder, notes)
    found = [file for file in named if file in files]
    missing = [file.name for file in named if file not in files]
    if named and not missing:
        return found
    others = [file for file in files if file not in found and _looks_like_storage(file)]
    if named:
        lacking = f"{folder} lacks {_listed(missing)}, which its {METADATA} names"
        if not found and not others:
            raise BagError(f"{lacking}, and contains {_contents(present)}; copy the missing files, too")
        instead = f"{_listed([file.name for file in others])} was read instead" if others else "the rest was read"
        notes.append(f"{lacking}: {instead}")
    if not found and not others:
        raise _no_storage(folder, present, files)
    return found + others


def _no_storage(folder: Path, present: list[Path], files: list[Path]) -> BagError:
    for file in files:
        if (error := _foreign_error(file)) is not None:
            return error
    bags = [entry for entry in present if entry.is_dir() and (entry / METADATA).is_file()]
    if not present:
        return BagError(f"{folder} is an empty folder, expected a bag; check the path")
    if (folder / _TABLE).is_file():
        return BagError(
            f"{folder} is a folder with {_TABLE}, expected a bag; convert it with `mobile_vla make-bag {folder} BAG`"
        )
    advice = f"give one of the bags in it, such as {bags[0]}" if bags else "check the path"
    return BagError(
        f"{folder} contains no .mcap or .db3 file, only {_contents(present)}, expected those of a bag; {advice}"
    )


def _contents(present: list[Path]) -> str:
    return _listed([entry.name for entry in present]) if present else "nothing"


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES_LISTED
    return ", ".join(names[:_MAX_NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")


def _looks_like_storage(file: Path) -> bool:
    inner = file.stem if file.suffix in _ZSTD_SUFFIXES else file.name
    return inner.endswith(SUFFIXES) or _first_bytes(file).startswith(mcap_file.MAGIC)


# ---- metadata --------------------------------------------------------------------------------------------------------


def _named_files(folder: Path, notes: list[str]) -> list[Path]:
    """Return the files in a bag's metadata; none, and a note, where the metadata is missing or broken."""
    file = folder / METADATA
    if not file.exists():
        notes.append(f"{folder} has no {METADATA} (the recorder was not closed): its files were read without")
        return []
    try:
        text = read_text(file, "the metadata of a bag", _MAX_METADATA_BYTES, error=_MetadataError)
        # Old versions of rosbag 2 put the bag's folder before each name. Nothing outside the bag's folder is read.
        return list(dict.fromkeys(folder / name for name in map(_last_part, _relative_paths(text)) if name))
    except _MetadataError as error:
        notes.append(f"{error}; the bag's files were read without it")
    except (YAMLError, ValueError):
        notes.append(f"{file} is damaged: the bag's files were read without it")
    return []


class _MetadataError(Exception):
    """Metadata that is left alone."""


def _relative_paths(text: str) -> list[str]:
    """Return rosbag2_bagfile_information.relative_file_paths.

    Read from the parser's events: no other object is built, whatever the text nests or repeats.
    """
    path: list[str | None] = []  # the current key of each open collection, None in a list
    keys: list[bool] = []  # for each open collection, whether its next scalar is a key
    names: list[str] | None = None
    for number, event in enumerate(YAML(typ="safe", pure=True).parse(text)):
        if number > _MAX_METADATA_EVENTS or len(path) > _MAX_METADATA_DEPTH or isinstance(event, AliasEvent):
            raise ValueError("not the metadata of rosbag 2")
        if isinstance(event, (MappingStartEvent, SequenceStartEvent)):
            is_mapping = isinstance(event, MappingStartEvent)
            if not is_mapping and path == ["rosbag2_bagfile_information", "relative_file_paths"]:
                names = []
            path.append(None)
            keys.append(is_mapping)
        elif isinstance(event, (MappingEndEvent, SequenceEndEvent)):
            path.pop()
            keys.pop()
            if names is not None and len(path) == 2:
                return names
        elif isinstance(event, ScalarEvent) and path:
            if keys[-1]:
                path[-1], keys[-1] = event.value, False
                continue
            if names is not None and len(path) == 3:
                names.append(event.value)
        else:
            continue
        if path and isinstance(event, (ScalarEvent, MappingEndEvent, SequenceEndEvent)) and path[-1] is not None:
            keys[-1] = True
    raise ValueError("not the metadata of rosbag 2")


def _last_part(name: str) -> str:
    last = name.replace("\\", "/").rpartition("/")[2]
    return "" if last in ("..", ".") or "\0" in last else last


# ---- one file --------------------------------------------------------------------------------------------------------


def _open(file: Path, stack: contextlib.ExitStack) -> StorageFile:
    kind = _kind(file, file)
    if kind != _ZSTD:
        return StorageFile(file, kind, file)
    unpacked = _unpacked(file, stack)
    kind = _kind(unpacked, file)
    if kind == _ZSTD:
        raise BagError(f"{file} is compressed twice, expected once; unpack it with `zstd -d`")
    return StorageFile(unpacked, kind, file)


def _kind(file: Path, name: Path) -> str:
    """Return the kind of a file by its first bytes; by its name only if the file is too short for them.

    Raises:
        BagError: it is another kind of file.
    """
    start = _first_bytes(file)
    for magic, kind in ((mcap_file.MAGIC, MCAP), (sqlite_file.MAGIC, SQLITE), (ZSTD_MAGIC, _ZSTD)):
        if start.startswith(magic):
            return kind
    if (error := _foreign_error(file, name)) is not None:
        raise error
    suffix = Path(name.stem).suffix if name.suffix in _ZSTD_SUFFIXES else name.suffix
    if suffix == ".mcap" and mcap_file.MAGIC.startswith(start):
        return MCAP
    if suffix == ".db3" and start and sqlite_file.MAGIC.startswith(start):
        return SQLITE
    if not start:
        raise BagError(f"{name} is empty (0 bytes), expected an mcap or sqlite3 file; copy it again, or remove it")
    found = f"it begins with {start[:16]!r}"
    raise BagError(f"{name} can't be read as a bag ({found}), expected an mcap or sqlite3 file; check the path")


def _foreign_error(file: Path, name: Path | None = None) -> BagError | None:
    """Return the error about a file of another known kind; None for any other file."""
    start = _first_bytes(file)
    name = file if name is None else name
    for magic, found, advice in _FOREIGN:
        if start[: len(magic)].lower() == magic.lower():
            return BagError(
                f"{name} {found}, expected a bag of ROS 2; {advice.format(path=name, stem=name.with_suffix(''))}"
            )
    if start[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        return BagError(f"{name} is a tar archive, expected a bag of ROS 2; unpack it with `tar -xf`")
    return None


def _first_bytes(file: Path) -> bytes:
    with open_regular(file, "a bag", error=BagError) as stream:
        return stream.read(512)


def _unpacked(file: Path, stack: contextlib.ExitStack) -> Path:
    """Unpack a zstd file into a folder that `stack` removes, within limits of its size and of the disk."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mobile_vla_bag.")))
    target = folder / file.stem
    limit = max(_MIN_UNPACKED_BYTES, _MAX_UNPACKED_RATIO * file.stat().st_size)
    space = int(0.9 * shutil.disk_usage(folder).free)
    size = 0
    try:
        with target.open("wb") as output:
            for piece in _pieces(file):
                size += len(piece)
                if size > limit:
                    raise BagError(
                        f"{file} unpacks to more than {limit >> 20} MiB, expected a recording; check the "
                        "output of `zstd -d`"
                    )
                if size > space:
                    raise BagError(
                        f"{file} unpacks to more than the {space >> 20} MiB that are free in {folder.parent}, "
                        "expected more; set TMPDIR to a larger disk"
                    )
                output.write(piece)
    except zstandard.ZstdError:
        pass  # the unpacked part is read like any file that was cut off
    if not size:
        raise BagError(f"{file} can't be unpacked by zstd, expected a complete file; copy it again")
    return target


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
        while piece := reader.read(_COPY_BYTES):
            yield piece
