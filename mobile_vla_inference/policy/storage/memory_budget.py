"""How much memory loading a checkpoint takes, and how much this process can still allocate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import psutil

from mobile_vla_inference.policy.storage.layout import is_block_matrix, is_token_embedding
from mobile_vla_inference.policy.storage.number_types import ITEM_BYTES
from mobile_vla_inference.policy.storage.tensor_index import SCALE_SUFFIX, TensorEntry, TensorIndex
from mobile_vla_inference.units import MIB

#: Anonymous memory that loading takes in addition to the weights: the module tree, buffers and allocator slack.
LOAD_MARGIN_BYTES = 128 * MIB

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def copied_bytes(index: TensorIndex, device_type: str, dtype: str | None) -> tuple[int, int]:
    """Return the bytes that loading allocates for weights, and the bytes of the largest tensor among them.

    Args:
        index: of the checkpoint.
        device_type: `cpu` or `cuda`.
        dtype: type of the weights by torch's name; None: as in the file.
    """
    sizes = [
        math.prod(entry.shape) * ITEM_BYTES[loaded_dtype(name, entry, device_type, dtype)]
        for name, entry in index.stored.items()
        if not stays_mapped(name, entry, device_type, dtype)
    ]
    return sum(sizes), max(sizes, default=0)


def available_bytes() -> int:
    """Return the memory that this process can still allocate: the machine's, or less if a cgroup limits it."""
    available = psutil.virtual_memory().available
    for limit, used in _cgroup_limits():
        available = min(available, max(limit - used, 0))
    return available


def loaded_dtype(name: str, entry: TensorEntry, device_type: str, dtype: str | None) -> str:
    """Return the data type of a loaded tensor: quantised weights, their scales and widened weights keep theirs."""
    is_quantized = entry.dtype == "int8" or name.endswith(f".weight{SCALE_SUFFIX}")
    is_kept = dtype is None or is_quantized or is_widened(name, entry, device_type, dtype)
    return entry.dtype if is_kept else dtype


def is_widened(name: str, entry: TensorEntry, device_type: str, dtype: str | None) -> bool:
    """Return whether a weight keeps the 16 bits of the file although the arithmetic is fp32."""
    widens = device_type == "cpu" and dtype == "float32" and entry.dtype in ("float16", "bfloat16")
    return widens and (is_block_matrix(name) or is_token_embedding(name))


def stays_mapped(name: str, entry: TensorEntry, device_type: str, dtype: str | None) -> bool:
    """Return whether loading uses the pages of the file, instead of a copy."""
    is_kept = loaded_dtype(name, entry, device_type, dtype) == entry.dtype
    return device_type == "cpu" and is_kept and entry.offset % ITEM_BYTES[entry.dtype] == 0


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Yield the memory limit and the use that can't be reclaimed of each cgroup around this process (v2 and v1)."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # no Linux, no cgroups
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, names = (
            (_CGROUP_ROOT / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
            if controllers
            else (_CGROUP_ROOT, ("memory.max", "memory.current", ""))
        )
        folder = root / group.lstrip("/")
        for ancestor in (folder, *folder.parents):
            if ancestor == root.parent:
                break
            limit = _read_cgroup(ancestor, *names)
            if limit is not None:
                yield limit


def _read_cgroup(folder: Path, limit_file: str, usage_file: str, prefix: str) -> tuple[int, int] | None:
    try:
        limit = (folder / limit_file).read_text().strip()
        usage = int((folder / usage_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None  # a container that sees its own group at the root, or a group without the controller
    if limit == "max":
        return None
    file_pages = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return int(limit), usage - file_pages
