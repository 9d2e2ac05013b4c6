"""Where each tensor of a checkpoint is in its file: name, type, shape, offset.

The readers in formats/ find the tensors; `policy_index` gives them their own names and separates those that inference
never uses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.tensor_names import clean_names

#: Suffix of a quantised weight's name in the name of its scales, one for each row.
SCALE_SUFFIX = "_scale"

#: Longest text in TensorIndex.metadata; longer text is cut.
MAX_METADATA_TEXT = 1000

_DEAD_KEYS = {
    "lm_head": re.compile(r"(^|\.)lm_head\.(weight|bias)$"),
    "position_ids": re.compile(r"(^|\.)position_ids$"),
}
_MAX_TENSORS = 20_000  # the full-size policy has 911


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in its file.

    Attributes:
        dtype: data type by torch's name, a key of ITEM_BYTES.
        shape: sizes.
        nbytes: bytes of its values.
        file: the file that holds it.
        offset: byte of its first value in `file`.
        strides: in values, if it is not contiguous (a transposed view was saved); else None.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TensorIndex:
    """The content of a checkpoint file or folder.

    Attributes:
        path: the file or folder.
        format: `zip`, `safetensors` or `sharded safetensors`.
        file_size: bytes of all its files.
        tensors: the model's state dict, without prefixes and without tensors that inference never uses.
        wrapper: key of the training checkpoint that held it; None for a bare state dict.
        prefix: what was removed from every key; empty if it was not the same for all.
        metadata: plain values next to the tensors (epoch, val_mae, args as a dict).
        dead: bytes that inference never uses, by kind: `optimizer`, `lm_head`, `position_ids`.
        optimizer_shapes: shapes of the parameters that the optimizer trained, if its state is in the file.
        scales: of the int8 weights that have them, by the weight's name; not among `tensors`.
        file_keys: the key in the file of each tensor of `stored`, by its name here.
        skipped: other content of the file that is not read: its key and what it is.
    """

    path: Path
    format: str
    file_size: int
    tensors: dict[str, TensorEntry]
    wrapper: str | None = None
    prefix: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    dead: dict[str, int] = field(default_factory=dict)
    optimizer_shapes: tuple[tuple[int, ...], ...] = ()
    scales: dict[str, TensorEntry] = field(default_factory=dict)
    file_keys: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def stored(self) -> dict[str, TensorEntry]:
        """Every tensor that loading reads, by its key in the module: `tensors` and `scales`."""
        return self.tensors | {name + SCALE_SUFFIX: entry for name, entry in self.scales.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name."""
        return {name: entry.shape for name, entry in self.tensors.items()}


def policy_index(
    path: Path,
    file_format: str,
    size: int,
    tensors: dict[str, TensorEntry],
    *,
    wrapper: str | None = None,
    metadata: dict[str, Any],
    dead: dict[str, int] | None = None,
    optimizer_shapes: tuple[tuple[int, ...], ...] = (),
    skipped: tuple[str, ...] = (),
) -> TensorIndex:
    """Return the index of a checkpoint whose tensors a format's reader found.

    Args:
        path: the file or folder.
        file_format: TensorIndex.format.
        size: bytes of all its files.
        tensors: by their keys in the file.
        wrapper: TensorIndex.wrapper.
        metadata: TensorIndex.metadata.
        dead: bytes that inference never uses outside of `tensors`.
        optimizer_shapes: TensorIndex.optimizer_shapes.
        skipped: TensorIndex.skipped.

    Raises:
        CheckpointError: there are no tensors, too many, or their names are ambiguous.
    """
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors, expected a policy's; give the file that training wrote")
    if len(tensors) > _MAX_TENSORS:
        raise CheckpointError(
            f"{path} holds {len(tensors)} tensors, expected at most {_MAX_TENSORS}; give the file that training wrote"
        )
    prefix, file_keys = clean_names(str(path), tensors)
    tensors = {name: tensors[key] for name, key in file_keys.items()}
    kinds = {name: _dead_kind(name) for name in tensors}
    live = {name: entry for name, entry in tensors.items() if kinds[name] is None}
    scales = {
        name: live.pop(name + SCALE_SUFFIX)
        for name, entry in list(live.items())
        if entry.dtype == "int8" and name + SCALE_SUFFIX in live
    }
    counted = {(entry.file, entry.offset) for entry in live.values()}  # a tied lm_head is the embedding's storage
    dead = {"optimizer": 0, "lm_head": 0, "position_ids": 0, **(dead or {})}
    for name, kind in kinds.items():
        place = (tensors[name].file, tensors[name].offset)
        if kind is not None and place not in counted:
            counted.add(place)
            dead[kind] += tensors[name].nbytes
    stored = {name: file_keys[name] for name in (*live, *(name + SCALE_SUFFIX for name in scales))}
    return TensorIndex(
        path,
        file_format,
        size,
        live,
        wrapper=wrapper,
        prefix=prefix,
        metadata=metadata,
        dead=dead,
        optimizer_shapes=optimizer_shapes,
        scales=scales,
        file_keys=stored,
        skipped=skipped,
    )


def _dead_kind(name: str) -> str | None:
    return next((kind for kind, pattern in _DEAD_KEYS.items() if pattern.search(name)), None)
