"""Write a safetensors file from chunks of values, with its tensors aligned for mapping.

The safetensors library needs all tensors of a file in memory at once; this writer needs a few megabytes for a gigabyte.
The library also starts each tensor at the end of the one before. The format allows no gaps, so this writer pads the
header to 64 bytes, and `in_aligned_order` puts tensors whose size is a multiple of 64 bytes first: they all begin on a
cache line, and the tensors after them (a scalar, a bias of two values) at least at a multiple of their item size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mobile_vla_inference.policy.storage.number_types import ITEM_BYTES, SAFETENSORS_TYPES

ALIGNMENT_BYTES = 64

_CODES = {dtype: code for code, dtype in SAFETENSORS_TYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write.

    Attributes:
        name: its key.
        dtype: by torch's name.
        shape: sizes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def in_aligned_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return tensors in an order in which each starts aligned: whole cache lines first, then by falling item size."""

    def place(spec: TensorSpec) -> tuple[bool, int]:
        unaligned = spec.nbytes % ALIGNMENT_BYTES != 0
        return unaligned, -ITEM_BYTES[spec.dtype] if unaligned else 0

    return sorted(specs, key=place)


def write_safetensors(path: Path, specs: list[TensorSpec], chunks: Iterable[memoryview]) -> str:
    """Write a file and return its SHA-256 in hexadecimal.

    Args:
        path: the new file.
        specs: its tensors, in the order of their values in `chunks`.
        chunks: all values, as bytes.

    Raises:
        OSError: the disk is full or fails.
        ValueError: `chunks` has more or fewer bytes than the tensors.
    """
    header = _header(specs)
    digest = hashlib.sha256(header)
    written = 0
    with path.open("xb") as file:
        file.write(header)
        for chunk in chunks:
            digest.update(chunk)
            written += file.write(chunk)
    expected = sum(spec.nbytes for spec in specs)
    if written != expected:
        raise ValueError(f"{written} bytes for tensors of {expected}")
    return digest.hexdigest()


def _header(specs: list[TensorSpec]) -> bytes:
    """Return the length and the JSON header, padded with spaces so that the values after it are aligned."""
    entries, offset = {"__metadata__": {"format": "pt"}}, 0
    for spec in specs:
        end = offset + spec.nbytes
        entries[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text
