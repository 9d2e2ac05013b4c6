"""Read the header of a safetensors file; no tensor data is read."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.outside_files import parse_json
from mobile_vla_inference.policy.storage.formats.damage import DAMAGED
from mobile_vla_inference.policy.storage.number_types import ITEM_BYTES, MAX_RANK, SAFETENSORS_TYPES, is_count
from mobile_vla_inference.policy.storage.tensor_index import MAX_METADATA_TEXT, TensorEntry
from mobile_vla_inference.policy.storage.tensor_names import shown_name

#: Limit of a header and of a folder's index; the full-size policy's header has 0.15 MB.
MAX_HEADER_BYTES = 4 << 20


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """Return whether a file of `size` bytes that begins with `head` can be a safetensors file."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size


def read_safetensors(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """Return the tensors of a file by name, and its metadata.

    Raises:
        CheckpointError: it is cut off or damaged.
    """
    head = os.pread(file.fileno(), 8, 0)
    header_bytes = int.from_bytes(head, "little")
    if len(head) < 8 or 8 + header_bytes > size:
        raise CheckpointError(
            f"{path} is cut off, or not a safetensors file: {size} bytes with a header of {header_bytes}, "
            f"expected a whole file; copy it again"
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} has a safetensors header of {header_bytes} bytes, expected at most {MAX_HEADER_BYTES}; "
            f"it describes no policy: give the right file"
        )
    text = os.pread(file.fileno(), header_bytes, 8)
    header = parse_json(text, f"{path}: its header", "that of a safetensors file", error=CheckpointError)
    try:
        metadata = header.pop("__metadata__", {})
        metadata = {str(key)[:MAX_METADATA_TEXT]: str(value)[:MAX_METADATA_TEXT] for key, value in metadata.items()}
        tensors = {name: _safetensors_entry(path, name, entry, 8 + header_bytes) for name, entry in header.items()}
    except DAMAGED as error:
        raise CheckpointError(
            f"{path} has a damaged safetensors header ({str(error)[:120]}), expected JSON with types, shapes and "
            f"offsets; copy the file again"
        ) from error
    end = 8 + header_bytes
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise CheckpointError(
                f"{path} is damaged: {shown_name(name)} begins at byte {entry.offset}, but the tensor before it ends "
                f"at byte {end}, expected tensors one after the other; copy the file again"
            )
        end += entry.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, expected {end} by its header, so it is cut off or damaged; copy the file again"
        )
    return tensors, metadata


def _safetensors_entry(path: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorEntry:
    code = entry["dtype"]
    if not isinstance(code, str) or code not in SAFETENSORS_TYPES:
        raise CheckpointError(
            f"{path}: {shown_name(name)} has the data type {str(code)[:20]!a}, expected one of "
            f"{', '.join(SAFETENSORS_TYPES)}; save it again as F32"
        )
    dtype = SAFETENSORS_TYPES[code]
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(map(is_count, (*shape, begin, end))) or len(shape) > MAX_RANK or end < begin:
        raise ValueError("a shape or an offset that is not a number")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise ValueError(f"{end - begin} bytes for a tensor of {nbytes}")
    return TensorEntry(dtype, shape, nbytes, path, data_start + begin)
