"""SHA-256 of large files, computed once: the user's cache keeps each hash with the file's state on the disk.

A file counts as unchanged while its device, inode, size, time of change and time of status change are the same: every
write sets the last of them, and no program can set it back. Without the cache only time is lost, so every problem with
it (no home folder, no permission, damage) is ignored.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.outside_files import check_regular, read_json
from mobile_vla_inference.policy.storage.checksums import sha256_of

#: A file that changed this recently may change again within one tick of the file system's clock (2 s on FAT).
_SETTLED_NS = 3_000_000_000
_MAX_ENTRIES = 200
_MAX_BYTES = 64 << 10
_HASH = re.compile(r"[0-9a-f]{64}")


def cached_sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal; the file is read only if the cache has no hash of its present state.

    Raises:
        CheckpointError: it can't be read, or changes while it is read.
    """
    check_regular(path, "the weights of a checkpoint", error=CheckpointError)
    cache = _cache_file()
    try:
        state = disk_state(path)
        known = _read(cache)
        if state in known:
            return known[state]
        digest = sha256_of(path)
        if disk_state(path) != state:
            raise CheckpointError(f"{path} was changed while it was read, expected it unchanged; try again")
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read ({error.strerror or error}), expected a readable file; check the disk and the path"
        ) from error
    if cache is not None and _is_settled(path):
        _remember(cache, state, digest)
    return digest


def disk_state(path: Path) -> str:
    """Return a text that changes with every write to a file, and if another file replaces it."""
    found = path.stat()
    return ":".join(map(str, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)))


def _is_settled(path: Path) -> bool:
    found = path.stat()
    return abs(time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns)) > _SETTLED_NS


def _cache_file() -> Path | None:
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None  # an account without a home folder
    return base / "mobile_vla" / "sha256.json"


def _read(cache: Path | None) -> dict[str, str]:
    if cache is None or not cache.exists():
        return {}
    try:
        data: Any = read_json(cache, "hashes of files", _MAX_BYTES, error=CheckpointError)
    except CheckpointError:
        return {}
    entries = data.items() if isinstance(data, dict) else ()
    return {state: digest for state, digest in entries if isinstance(digest, str) and _HASH.fullmatch(digest)}


def _remember(cache: Path, state: str, digest: str) -> None:
    """Add an entry; if there are too many, remove the oldest."""
    known = {**_read(cache), state: digest}
    kept = dict(list(known.items())[-_MAX_ENTRIES:])
    try:
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text_atomically(cache, json.dumps(kept, indent=1) + "\n")
    except OSError:
        pass  # the disk is full or read-only: the file is hashed again next time
