"""The fingerprint of a checkpoint: which one a file or folder is, by its content. Settings are bound to it.

Names and times don't depend on the weights, and reading 7 GB at every start takes too long. So a fingerprint consists
of hashes that the file already contains, and of a block of each tensor, 64 MiB in all:

- `zip:` a `.pth`: its tensors (names, data types, shapes, strides) and its records with their CRC-32, which
  torch.save writes into the archive's directory.
- `folder:` a converted folder: its sha256sums.txt without the line of policy.json, which contains the fingerprint.
- `bytes:` anything else: SHA-256 of the files with weights, which hash_cache keeps. Of one file, sha256sum prints it.

The blocks detect shards that were replaced without their list, and weights that were changed in place: any byte in
checkpoints of up to 64 MiB. In larger ones, damage between the blocks doesn't change a `zip:` or `folder:` fingerprint;
`verify` finds it in a folder, and `unzip -t` in a `.pth`. A fingerprint is not a signature: a person who can write a
checkpoint can write its settings too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.checksums import CHECKSUMS_FILE, read_checksums
from mobile_vla_inference.policy.storage.hash_cache import cached_sha256
from mobile_vla_inference.policy.storage.tensor_index import TensorEntry, TensorIndex

#: The form of every fingerprint.
FINGERPRINT = re.compile(r"(zip|folder|bytes):[0-9a-f]{64}")

#: Settings file of a converted folder, and suffix of that of a checkpoint file (settings_file.py).
SETTINGS_FILE = "policy.json"

_BLOCKS_BYTES = 64 << 20  # of all tensors together


def fingerprint(index: TensorIndex) -> str:
    """Return the fingerprint of a checkpoint whose index was read: its kind, a colon and 64 hexadecimal digits.

    Raises:
        CheckpointError: a file can't be read, was changed since, or a converted folder's list of hashes is damaged.
    """
    try:
        if index.format == "zip":
            records = _records(index.path)
            if records is not None:
                return f"zip:{_digest([_described(index), records, _blocks(index.stored)])}"
        elif index.path.is_dir() and (index.path / CHECKSUMS_FILE).exists():
            listed = read_checksums(index.path)
            if {entry.file.name for entry in index.stored.values()} <= listed.keys():
                listed.pop(SETTINGS_FILE, None)
                return f"folder:{_digest([sorted(listed.items()), _blocks(index.stored)])}"
    except OSError as error:
        raise CheckpointError(
            f"{index.path} can't be read ({error.strerror or error}), expected a readable checkpoint; "
            f"check the disk and the path"
        ) from error
    return f"bytes:{_digest_of_files(index)}"


def short(whole: str) -> str:
    """Return a fingerprint for people: its kind and its first 12 digits."""
    kind, _, digits = whole.partition(":")
    return f"{kind}:{digits[:12]}"


def _described(index: TensorIndex) -> list[Any]:
    return [[name, entry.dtype, entry.shape, entry.strides] for name, entry in sorted(index.stored.items())]


def _records(path: Path) -> list[Any] | None:
    """Return name, size and CRC-32 of each record of an archive; None if it was written without checksums.

    The archive's one folder is not part of the names: torch.save names it after the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} was changed while it was read ({error}), expected it unchanged; try again"
        ) from error
    if any(info.file_size and not info.CRC for info in infos):
        return None
    return sorted([info.filename.partition("/")[2], info.file_size, info.CRC] for info in infos)


def _blocks(stored: dict[str, TensorEntry]) -> list[Any]:
    """Return the hash of a block from the middle of each tensor; of the whole tensor in small checkpoints."""
    total = sum(entry.nbytes for entry in stored.values())
    most = total if total <= _BLOCKS_BYTES else max(_BLOCKS_BYTES // len(stored), 1)
    by_file: dict[Path, list[tuple[str, TensorEntry]]] = {}
    for name, entry in stored.items():
        by_file.setdefault(entry.file, []).append((name, entry))
    hashes = []
    for path, entries in by_file.items():
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for name, entry in sorted(entries, key=lambda item: item[1].offset):
                count = min(entry.nbytes, most)
                block = os.pread(file.fileno(), count, entry.offset + (entry.nbytes - count) // 2)
                hashes.append([name, hashlib.sha256(block).hexdigest()])
    return sorted(hashes)


def _digest_of_files(index: TensorIndex) -> str:
    """Return the hash of the one file with weights, or of the list that sha256sum prints for several."""
    hashes = {path.name: cached_sha256(path) for path in {entry.file for entry in index.stored.values()}}
    if not index.path.is_dir():
        return next(iter(hashes.values()))
    return _sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items())))


def _digest(parts: Iterable[Any]) -> str:
    return _sha256(json.dumps(list(parts), separators=(",", ":")))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
