"""Make a synthetic checkpoint in the published layout: `mobile_vla make-checkpoint`.

The file is what `torch.save` writes (an uncompressed zip: a pickle that names the tensors' records, and the records),
but streamed: values are drawn a few million at a time, so that 7.8 GB need no more memory than a tiny file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import shutil
import struct
import sys
import tempfile
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

from mobile_vla_inference.atomic import remove_folder
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.config import STOCK_HEAD_DIM, TOWERS, HybridConfig
from mobile_vla_inference.policy.storage.fusion import solve_fusion_features
from mobile_vla_inference.policy.storage.layout import tensor_shapes
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.storage.settings_file import save_settings
from mobile_vla_inference.policy.synthetic.processors import write_processors
from mobile_vla_inference.policy.synthetic.weights import (
    centred_last_layer,
    filled_values,
    normal_values,
    parameter_values,
)

#: Called with the bytes of tensors written so far and in all.
Progress = Callable[[int, int], None]

_RECORD_ALIGNMENT = 64  # bytes, as torch.save
_DISK_MARGIN = 16 << 20  # bytes for the pickle, the zip directory and the processors
_TRAINED_PREFIXES = ("feature_fusion.", "rnn.", "actions.")  # Kosmos-2 and CLIP were frozen in training
_MIN_HEADS = 4
_CENTRED_BELOW = 50_000_000  # parameters; above, centring the last layer would need the model in memory


def synthetic_settings(config: HybridConfig) -> PolicySettings:
    """Return confirmed settings for a synthetic checkpoint; narrow towers get four heads instead of width / 64."""
    widths = {name: getattr(config, name).hidden_size for name in TOWERS if getattr(config, name) is not None}
    heads = {name: _MIN_HEADS for name, width in widths.items() if width // STOCK_HEAD_DIM < _MIN_HEADS}
    return PolicySettings(attention_heads=heads, fusion_features=solve_fusion_features(config))


def make_checkpoint(
    out: Path | str,
    config: HybridConfig,
    seed: int,
    *,
    settings: PolicySettings | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PolicySettings:
    """Write a synthetic checkpoint, its settings and its processors. The same seed gives the same bytes.

    Args:
        out: the `.pth` to write; the other files are next to it (`X.pth.policy.json`, `X.processors/`).
        config: sizes of the architecture.
        seed: of the weights, 0 or more.
        settings: to write, as confirmed; None: `synthetic_settings(config)`.
        force: overwrite an existing file.
        progress: called as tensors are written.

    Returns:
        The settings written.

    Raises:
        CheckpointError: the file exists, its folder doesn't, the disk is too full, or the features
            of the fusion layer are ambiguous.
    """
    out = Path(out)
    settings = synthetic_settings(config) if settings is None else settings
    shapes = tensor_shapes(config)
    _check_target(out, _tensor_bytes(shapes), force)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        write_processors(work / "processors", config)
        replaced = {}
        if sum(map(math.prod, shapes.values())) < _CENTRED_BELOW:
            replaced = centred_last_layer(config, settings, seed, work / "processors")
        _write_archive(work / "checkpoint", _Contents(config, shapes, seed, replaced), progress)
        processors = out.with_suffix(".processors")
        if processors.exists():
            shutil.rmtree(processors)
        (work / "processors").rename(processors)
        (work / "checkpoint").replace(out)
        save_settings(out, settings)
    finally:
        remove_folder(work)
    return settings


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


class _Contents:
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
            "optimizer_state_dict": self._optimizer_state(_trained(shapes), seed),
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


def _trained(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if name.startswith(_TRAINED_PREFIXES)}


def _tensor_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the bytes of all tensors in the file: the model's, and Adam's three for each trained one."""
    trained = _trained(shapes).values()
    return 4 * (sum(map(math.prod, shapes.values())) + sum(2 * math.prod(shape) + 1 for shape in trained))


def _check_target(out: Path, tensor_bytes: int, force: bool) -> None:
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent} is not a folder, expected one to write {out.name} to; make it first")
    if out.is_dir():
        raise CheckpointError(f"{out} is a folder, expected the name of a file to write; choose another")
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists already, expected a new file; choose another name or give --force")
    free = shutil.disk_usage(out.parent).free
    needed = tensor_bytes + _DISK_MARGIN
    if free < needed:
        raise CheckpointError(
            f"{out.parent} has {free / 1e9:.1f} GB free, expected at least {needed / 1e9:.1f} GB for this checkpoint; "
            f"free some or choose another disk"
        )


def _write_archive(path: Path, contents: _Contents, progress: Progress | None) -> None:
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
