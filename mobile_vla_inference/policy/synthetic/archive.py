"""Write a synthetic training checkpoint in torch's zip format, one chunk of values at a time.

The file is what `torch.save` writes: an uncompressed zip of a pickle that names the tensors' records, and the records.
7.8 GB need no more memory than a tiny file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobile_vla_inference.policy.storage.config import HybridConfig
from mobile_vla_inference.policy.synthetic.weights import filled_values, normal_values, parameter_values

#: Called with the bytes of tensors written so far and in all.
Progress = Callable[[int, int], None]
_RECORD_ALIGNMENT = 64  # bytes, as torch.save
_TRAINED_PREFIXES = ("feature_fusion.", "rnn.", "actions.")  # Kosmos-2 and CLIP were frozen in training


@dataclass(frozen=True)
class _Storage:
    """The record of one tensor in the archive: `data/<key>`, fp32."""

    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    """Placeholder of a tensor while the checkpoint is pickled."""

    storage: _Storage
    shape: tuple[int, ...]


class ArchiveContents:
    """The content of the file: the checkpoint with placeholders for its tensors, and each tensor's values on demand."""

    def __init__(
        self,
        config: HybridConfig,
        shapes: dict[str, tuple[int, ...]],
        seed: int,
        replaced: dict[str, np.ndarray],
    ) -> None:
        self._sources: list[tuple[_Storage, Callable[[], Iterable[np.ndarray]]]] = []
        model: OrderedDict[str, _Tensor] = OrderedDict()
        for name, shape in shapes.items():
            draw = partial(parameter_values, name, shape, config, seed)
            model[name] = self._add(shape, partial(iter, [replaced[name]]) if name in replaced else draw)
        self.checkpoint = {
            "epoch": 0,
            "model_state_dict": model,
            "optimizer_state_dict": self._optimizer_state(trained_shapes(shapes), seed),
            "val_mae": 1.0,
            "args": Namespace(variant=config.variant, seed=seed, synthetic=True),
        }

    def records(self) -> Iterator[tuple[_Storage, Iterable[np.ndarray]]]:
        """Yield each storage and the chunks of its values, in the order of their keys."""
        for storage, draw in self._sources:
            yield storage, draw()

    def _optimizer_state(self, trained: dict[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
        """Lay out Adam's state_dict() after one step."""
        state = {}
        for index, (name, shape) in enumerate(trained.items()):
            count = math.prod(shape)
            state[index] = {
                "step": self._add((), partial(filled_values, 1, 1.0)),
                "exp_avg": self._add(shape, partial(normal_values, f"exp_avg.{name}", count, 1e-4, seed)),
                "exp_avg_sq": self._add(shape, partial(filled_values, count, 1e-8)),
            }
        group = {
            "lr": 1e-4,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "params": list(state),
        }
        return {"state": state, "param_groups": [group]}

    def _add(self, shape: tuple[int, ...], draw: Callable[[], Iterable[np.ndarray]]) -> _Tensor:
        storage = _Storage(str(len(self._sources)), math.prod(shape))
        self._sources.append((storage, draw))
        return _Tensor(storage, shape)


def write_archive(path: Path, contents: ArchiveContents, progress: Progress | None) -> None:
    """Write torch's zip format, one chunk of values at a time, and synchronise it to the disk."""
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(contents.checkpoint)
    total = 4 * sum(storage.count for storage, _ in contents.records())
    written = 0
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _write_record(archive, "data.pkl", [pickled.getvalue()], pickled.tell())
            _write_record(archive, "byteorder", [sys.byteorder.encode()], len(sys.byteorder))
            for storage, chunks in contents.records():
                _write_record(archive, f"data/{storage.key}", chunks, 4 * storage.count)
                written += 4 * storage.count
                if progress is not None:
                    progress(written, total)
            _write_record(archive, "version", [b"3\n"], 2)
        file.flush()
        os.fsync(file.fileno())


def trained_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that training changed, for which the file has Adam's state."""
    return {name: shape for name, shape in shapes.items() if name.startswith(_TRAINED_PREFIXES)}


class _Pickler(pickle.Pickler):
    """Write the placeholders as torch.save writes tensors and their storages."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", torch.FloatStorage, obj.key, "cpu", obj.count)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        stride = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (obj.storage, 0, obj.shape, stride, False, OrderedDict())


def _write_record(archive: zipfile.ZipFile, name: str, chunks: Iterable[bytes | np.ndarray], size: int) -> None:
    """Write one record; a padding field like torch's makes its data start at a multiple of 64 bytes."""
    record = zipfile.ZipInfo(f"archive/{name}")
    record.file_size = size
    data_start = archive.fp.tell() + zipfile.sizeFileHeader + len(record.filename) + len(b"FB") + 2
    padding = -data_start % _RECORD_ALIGNMENT
    record.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(record, "w") as stream:
        for chunk in chunks:
            stream.write(memoryview(chunk).cast("B"))
