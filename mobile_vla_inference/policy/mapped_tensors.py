"""Tensors whose values are pages of a checkpoint's file."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.tensor_index import TensorEntry
from mobile_vla_inference.units import MIB

_READ_AHEAD_BYTES = 256 * MIB


class MappedTensor:
    """A tensor whose values are pages of the file."""

    def __init__(self, mapping: mmap.mmap, entry: TensorEntry) -> None:
        self._mapping = mapping
        self._entry = entry
        dtype = getattr(torch, entry.dtype)
        strides = entry.strides
        count = math.prod(entry.shape)
        if strides is not None:
            count = 1 + sum((length - 1) * stride for length, stride in zip(entry.shape, strides))
        flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=entry.offset)
        self.tensor = flat.view(entry.shape) if strides is None else flat.as_strided(entry.shape, strides)

    def drop_pages(self) -> None:
        """Let the kernel drop the pages, after their values were copied."""
        _advise(self._mapping, self._entry, mmap.MADV_DONTNEED)


def mapped_tensors(
    stored: dict[str, TensorEntry], is_copied: Callable[[str, TensorEntry], bool]
) -> Iterator[tuple[str, TensorEntry, MappedTensor]]:
    """Yield each tensor in the order of the file; the kernel reads ahead those that will be copied."""
    mappings = {file: map_file(file) for file in {entry.file for entry in stored.values()}}
    ordered = sorted(stored.items(), key=lambda item: (item[1].file, item[1].offset))
    upcoming, announced_bytes = 0, 0
    for position, (name, entry) in enumerate(ordered):
        while upcoming < len(ordered) and (upcoming <= position or announced_bytes < _READ_AHEAD_BYTES):
            upcoming_name, following = ordered[upcoming]
            _check_whole(mappings[following.file], following)
            if is_copied(upcoming_name, following):
                _advise(mappings[following.file], following, mmap.MADV_WILLNEED)
            announced_bytes += following.nbytes
            upcoming += 1
        yield name, entry, MappedTensor(mappings[entry.file], entry)
        announced_bytes -= entry.nbytes


def _check_whole(mapping: mmap.mmap, entry: TensorEntry) -> None:
    if entry.offset + entry.nbytes > len(mapping):
        raise CheckpointError(f"{entry.file} became shorter while it was read, expected it unchanged; load it again")


def _advise(mapping: mmap.mmap, entry: TensorEntry, advice: int) -> None:
    """Advise the kernel about the pages that hold only this tensor."""
    start = -(-entry.offset // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (entry.offset + entry.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        mapping.madvise(advice, start, end - start)


def map_file(path: Path) -> mmap.mmap:
    """Map a file; raise CheckpointError if that fails."""
    try:
        with path.open("rb") as file:
            # Copy on write: torch asks for a writable buffer, but nothing writes to it.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be mapped ({error}), expected it unchanged; load it again") from error
