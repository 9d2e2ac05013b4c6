"""The list of hashes in a converted folder, `sha256sums.txt`: write it, update it, check the folder by it.

The format is that of coreutils, so that `sha256sum -c sha256sums.txt` checks a folder on a machine without this
package. Reading is strict: every damaged byte, in a file or in the list itself, is found.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.outside_files import open_regular, read_text

CHECKSUMS_FILE = "sha256sums.txt"

#: Called with the bytes read so far and in all.
Progress = Callable[[int, int], None]

#: Largest list of hashes.
_MAX_LIST_BYTES = 16 << 20

_CHUNK_BYTES = 4 << 20
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


@dataclass(frozen=True)
class Verification:
    """How a folder compares with its list: the names of files, relative to it.

    Attributes:
        good: as listed.
        bad: with other content than listed, or unreadable.
        missing: listed, but not there.
        extra: there, but not listed.
    """

    good: tuple[str, ...]
    bad: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every file is as listed, and none is missing or extra."""
        return not (self.bad or self.missing or self.extra)


def write_checksums(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write the list: SHA-256 in hexadecimal by file name, relative to `folder`."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    write_text_atomically(folder / CHECKSUMS_FILE, text)


def update_checksum(folder: Path, name: str) -> None:
    """Bring one file's line up to date after it was rewritten on purpose; do nothing if the folder has no list."""
    if (folder / CHECKSUMS_FILE).exists():
        write_checksums(folder, {**read_checksums(folder), name: sha256_of(folder / name)})


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each listed file by name.

    Raises:
        CheckpointError: there is no list, or a line of it is damaged.
    """
    path = folder / CHECKSUMS_FILE
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{folder} has no {CHECKSUMS_FILE}, expected a folder that convert wrote; convert the checkpoint again"
        )
    lines = read_text(path, "a list of hashes", _MAX_LIST_BYTES, error=CheckpointError).split("\n")
    hashes = {}
    for number, line in enumerate(lines[:-1], start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(
                f"{path} is damaged in line {number}, expected a SHA-256, two spaces and a file name; "
                f"copy the folder again"
            )
        hashes[match[2]] = match[1]
    if lines[-1] or not hashes or len(hashes) != len(lines) - 1:
        raise CheckpointError(f"{path} is cut off or damaged, expected a line for each file; copy the folder again")
    return hashes


def verify_folder(folder: Path, progress: Progress | None = None) -> Verification:
    """Compare every file of a converted folder with the list of hashes in it.

    Raises:
        CheckpointError: it is not a folder, or its list is missing or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, expected one that convert wrote; check the path")
    hashes = read_checksums(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {
        CHECKSUMS_FILE
    }
    found = sorted(hashes.keys() & present)
    sizes = {name: _size(folder / name) for name in found}
    done, total = 0, sum(sizes.values())
    good, bad = [], []
    for name in found:

        def report(read: int, before: int = done) -> None:
            if progress is not None:
                progress(before + read, total)

        (good if _is_as_listed(folder / name, hashes[name], report) else bad).append(name)
        done += sizes[name]
    missing, extra = sorted(hashes.keys() - present), sorted(present - hashes.keys())
    return Verification(tuple(good), tuple(bad), tuple(missing), tuple(extra))


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return a file's SHA-256 in hexadecimal; `progress` is called with the bytes read so far.

    Raises:
        CheckpointError: there is no such file, or it is not a regular file.
        OSError: it can't be read.
    """
    digest, done = hashlib.sha256(), 0
    with open_regular(path, "the content of its line in the list", error=CheckpointError) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done)
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # a link to nothing


def _is_as_listed(path: Path, expected: str, progress: Callable[[int], None]) -> bool:
    try:
        return sha256_of(path, progress) == expected
    except (OSError, CheckpointError):
        return False  # a disk error, no permission, or a pipe: it can't be trusted
