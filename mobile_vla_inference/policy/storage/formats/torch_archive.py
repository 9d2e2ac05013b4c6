"""Read the index of a `.pth` that torch.save wrote; no tensor data is read.

A `.pth` is a zip archive: a pickle that describes the tensors, and one uncompressed record for each storage. The pickle
is never run: pickle_graph.py reads what it describes, and state_dict.py finds the policy's tensors in that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.formats.damage import DAMAGED
from mobile_vla_inference.policy.storage.formats.pickle_graph import MAX_OPERATIONS, read_graph
from mobile_vla_inference.policy.storage.formats.pickle_values import (
    ForeignTensor,
    PickledDict,
    Storage,
    Tensor,
    TooMany,
)
from mobile_vla_inference.policy.storage.formats.state_dict import find_state_dict
from mobile_vla_inference.policy.storage.formats.training_metadata import TrainingMetadata, optimizer_shapes, tensors_in
from mobile_vla_inference.policy.storage.formats.zip_records import ZipRecords, reason
from mobile_vla_inference.policy.storage.number_types import ITEM_BYTES, scalar
from mobile_vla_inference.policy.storage.tensor_index import TensorEntry, TensorIndex, policy_index
from mobile_vla_inference.policy.storage.tensor_names import shown_name

#: Limit of data.pkl; the published file's has 0.2 MB.
MAX_DESCRIPTION_BYTES = 64 << 20

_MAX_MARK_BYTES = 100  # of the records byteorder and version
_FILE_FORMATS = range(1, 11)  # versions of torch's zip format that torch 2.13 reads

#: Functions that run commands. No training saves one; a file that names one was made for an attack.
_COMMANDS = re.compile(
    r"(?:posix|nt|os)\.(?:system|popen|fork|exec\w*|spawn\w*|posix_spawn\w*|startfile|unlink|remove|rmdir)"
    r"|builtins\.(?:eval|exec|execfile|compile|__import__)"
    r"|(?:subprocess|runpy)\..*|pty\.spawn|webbrowser\.open"
)


def read_torch_archive(path: Path, file: BinaryIO, size: int) -> TensorIndex:
    """Return where the tensors of a `.pth` are.

    Args:
        path: the file.
        file: the same, opened.
        size: its bytes.

    Raises:
        CheckpointError: it is damaged, unsafe, or holds no policy.
    """
    records = ZipRecords(path, file, size)
    graph, storages = _read_description(records)
    places = {key: _storage_place(records, storage) for key, storage in storages.items()}
    state = find_state_dict(str(path), graph)
    tensors = {name: _entry(path, places, name, tensor) for name, tensor in state.tensors.items()}
    own = {id(container) for container in state.containers}
    rest = {
        key: value
        for key, value in (graph.named() if isinstance(graph, PickledDict) else {}).items()
        if id(value) not in own and not (id(graph) in own and isinstance(value, (Tensor, ForeignTensor)))
    }
    metadata = TrainingMetadata(lambda tensor: _single_value(records, places, tensor), own)
    plain = {key: metadata.plain(value) for key, value in rest.items()}
    used = {tensor.storage.key for tensor in state.tensors.values()}
    # A tensor of one value is metadata; larger ones are an optimizer's, an averaged copy or the like.
    with_tensors = {
        key: value
        for key, value in rest.items()
        if next(tensors_in(value, own), None) and not (isinstance(value, Tensor) and plain[key] != "tensor")
    }
    others = {t.storage.key: t.storage.nbytes for t in tensors_in(list(with_tensors.values()), own)}
    others = {key: nbytes for key, nbytes in others.items() if key not in used}
    return policy_index(
        path,
        "zip",
        size,
        tensors,
        wrapper=state.path,
        metadata={key: value for key, value in plain.items() if key not in with_tensors},
        dead={"optimizer": sum(others.values())},
        optimizer_shapes=optimizer_shapes(rest.values()),
        skipped=tuple(f"{key} ({what})" for key, value in rest.items() if (what := metadata.unread(value))),
    )


def refuse_commands(path: Path) -> Callable[[str], None]:
    """Return the check of read_graph for a file: it raises CheckpointError for functions that run commands."""

    def check(name: str) -> None:
        if _COMMANDS.fullmatch(name):
            raise CheckpointError(
                f"{path} asks to call {name[:100]}, which would run its author's code on the machine that loads it, "
                f"expected weights; nothing of it was run: don't use this file"
            )

    return check


def _read_description(records: ZipRecords) -> tuple[Any, dict[str, Storage]]:
    """Return what data.pkl describes, and the storages that it names."""
    path, description = records.path, records.find("data.pkl")
    if description.file_size > MAX_DESCRIPTION_BYTES:
        raise CheckpointError(
            f"{path} has a data.pkl of {description.file_size / 1e6:.0f} MB, expected at most "
            f"{MAX_DESCRIPTION_BYTES / 1e6:.0f} MB; it describes no policy: give the file that training wrote"
        )
    _check_format(records)
    data = records.read(description, MAX_DESCRIPTION_BYTES)
    try:
        return read_graph(data, refuse_commands(path))
    except TooMany as error:
        raise CheckpointError(
            f"{path} describes more than {MAX_OPERATIONS} values, expected a policy and its training's state; "
            f"save model.state_dict() alone"
        ) from error
    except DAMAGED as error:
        raise CheckpointError(
            f"{path} has a damaged data.pkl ({reason(error)}), expected what torch.save writes; "
            f"download or copy it again"
        ) from error


def _check_format(records: ZipRecords) -> None:
    """Refuse a byte order or a version of the format that is not read here."""
    order = records.find("byteorder")
    if order is not None and records.read(order, _MAX_MARK_BYTES) != b"little":
        raise CheckpointError(
            f"{records.path} is not little-endian, expected little-endian values; save it again on x86 or ARM"
        )
    version = records.find("version") or records.find(".data/version")
    if version is None:
        return
    text = records.read(version, _MAX_MARK_BYTES).decode("latin1").strip()
    if not text.isdecimal() or int(text) not in _FILE_FORMATS:
        raise CheckpointError(
            f"{records.path} has version {text[:20]!a} of torch's file format, expected {_FILE_FORMATS[0]} to "
            f"{_FILE_FORMATS[-1]}; update this package, or save it again with torch 2"
        )


def _storage_place(records: ZipRecords, storage: Storage) -> int:
    """Return where a storage's first byte is in the file."""
    record = records.find(f"data/{storage.key}")
    if record is None:
        raise CheckpointError(
            f"{records.path} is damaged: it names the record data/{storage.key[:40]}, which its archive lacks, "
            f"expected a whole checkpoint; copy the file again"
        )
    if record.file_size < storage.nbytes:
        raise CheckpointError(
            f"{records.path} is damaged: a storage needs {storage.nbytes} bytes, but its record "
            f"{record.filename} has {record.file_size}, expected a whole checkpoint; copy the file again"
        )
    return records.offset(record)


def _entry(path: Path, places: Mapping[str, int], name: str, tensor: Tensor) -> TensorEntry:
    nbytes = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
    if nbytes > tensor.storage.nbytes:
        raise CheckpointError(
            f"{path}: {shown_name(name)} repeats the values of its storage ({tensor.storage.nbytes} bytes for a tensor "
            f"of {nbytes}), expected each value stored; save it again after .contiguous()"
        )
    return TensorEntry(
        dtype=tensor.dtype,
        shape=tensor.shape,
        nbytes=nbytes,
        file=path,
        offset=places[tensor.storage.key] + tensor.offset * ITEM_BYTES[tensor.dtype],
        strides=None if _is_contiguous(tensor.shape, tensor.strides) else tensor.strides,
    )


def _single_value(records: ZipRecords, places: Mapping[str, int], tensor: Tensor) -> Any:
    """Return the value of a tensor with one value, such as a val_mae that was kept as a tensor; else None."""
    if math.prod(tensor.shape) != 1:
        return None
    item_bytes = ITEM_BYTES[tensor.dtype]
    return scalar(
        tensor.dtype, records.value_bytes(places[tensor.storage.key] + tensor.offset * item_bytes, item_bytes)
    )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides)):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
