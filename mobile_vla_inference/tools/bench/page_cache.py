"""How much of a file is in the kernel's page cache, and how to drop it: the difference between warm and cold."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

from mobile_vla_inference.errors import MobileVlaError

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def cached_bytes(path: Path) -> int:
    """Return how many bytes of a file are in the page cache (mincore); the file has to be writable."""
    size = path.stat().st_size
    if size == 0:
        return 0
    resident = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        pages = np.frombuffer(mapping, dtype=np.uint8)
        try:
            status = _LIBC.mincore(pages.ctypes.data, size, resident.ctypes.data)
        finally:
            del pages  # the mapping can't be closed while an array uses it
    if status != 0:
        raise MobileVlaError(f"{path}: the cached pages can't be counted ({os.strerror(ctypes.get_errno())})")
    return min(int((resident & 1).sum()) * mmap.PAGESIZE, size)


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to drop a file's pages; pages that a process maps, or of a file in memory, stay."""
    with path.open("rb") as file:
        os.fsync(file.fileno())  # a page that is not written yet can't be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
