"""Random architectures, ways to save a checkpoint, and files that are no checkpoint, each with its refusal."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from archive_files import MEMO_BOMB, Call, records_of, zipped
from hypothesis import strategies as st
from safetensors.torch import save_file

from mobile_vla_inference.policy.storage.config import Cell, HeadLayer, HybridConfig, TextTower, VisionTower
from mobile_vla_inference.policy.storage.formats.shards import SHARD_INDEX_FILE
from mobile_vla_inference.policy.storage.formats.state_dict import WRAPPERS
from mobile_vla_inference.policy.storage.tensor_index import TensorEntry
from mobile_vla_inference.policy.storage.tensor_names import PREFIXES

_WIDTHS = st.sampled_from((64, 128, 192))
_DEPTHS = st.integers(1, 3)


@st.composite
def architectures(draw: st.DrawFn) -> HybridConfig:
    """Draw an architecture: any widths, depths, towers, LSTM and head layout; its towers have width / 64 heads."""
    clip_text, clip_vision = draw(st.sampled_from(((True, True), (True, False), (False, True), (False, False))))
    image_size = draw(st.sampled_from((28, 56)))
    kosmos_text = TextTower(draw(st.integers(8, 40)), draw(_WIDTHS), draw(st.integers(4, 70)), draw(_DEPTHS))
    kosmos_vision = VisionTower(draw(_WIDTHS), draw(st.integers(4, 70)), draw(_DEPTHS), image_size, 14)
    parts: dict[str, Any] = {}
    if clip_text:
        sizes = (draw(st.integers(8, 40)), draw(_WIDTHS), draw(st.integers(4, 70)), draw(_DEPTHS))
        parts["clip_text"] = TextTower(*sizes, draw(st.integers(4, 77)))
    if clip_vision:
        sizes = (draw(_WIDTHS), draw(st.integers(4, 70)), draw(_DEPTHS))
        parts["clip_vision"] = VisionTower(*sizes, image_size, draw(st.sampled_from((14, 28))))
    if clip_text or clip_vision:
        parts["clip_projection_dim"] = draw(st.integers(1, 80))
        parts["clip_logit_scale"] = clip_text and clip_vision and draw(st.booleans())
    cell_input = kosmos_text.hidden_size
    if parts or draw(st.booleans()):
        cell_input = draw(st.integers(1, 40))
        parts |= {"fusion_in": draw(st.integers(1, 300)), "fusion_out": cell_input}
    cell = Cell(draw(st.sampled_from(("lstm", "gru", "rnn"))), cell_input, draw(st.integers(1, 40)), draw(_DEPTHS))
    head = draw(_heads(cell.hidden_size))
    return HybridConfig(kosmos_text, kosmos_vision, draw(st.integers(1, 9)), cell, head, **parts)


@st.composite
def architectures_with_features(draw: st.DrawFn) -> tuple[HybridConfig, tuple[str, ...]]:
    """Draw an architecture and the features that its fusion layer reads, in any order."""
    config = draw(architectures())
    if config.variant == "pure":
        return config, ("kosmos_text",)
    widths = config.feature_widths
    features = tuple(draw(st.lists(st.sampled_from(sorted(widths)), min_size=1, unique=True)))
    return replace(config, fusion_in=sum(widths[name] for name in features)), features


@st.composite
def _heads(draw: st.DrawFn, width: int) -> tuple[HeadLayer, ...]:
    """Draw a head that ends with a Linear: Linears with or without a LayerNorm after them, with gaps between."""
    layers, index = [], 0
    for _ in range(draw(st.integers(0, 3))):
        outputs = draw(st.integers(2, 40))
        layers.append(HeadLayer(index, "linear", width, outputs))
        index, width = index + 1, outputs
        if draw(st.booleans()):
            layers.append(HeadLayer(index, "layer_norm", width, width))
            index += 1
        index += draw(st.integers(0, 2))
    return (*layers, HeadLayer(index, "linear", width, 2))


#: Prefix of every key, and the key of the state dict in the training checkpoint.
prefixes = st.lists(st.sampled_from(PREFIXES), max_size=3).map("".join)
wrappers = st.sampled_from((None, *WRAPPERS))


def wrap(state: dict[str, torch.Tensor], prefix: str, wrapper: str | None) -> dict[str, Any]:
    """Return the content of a training checkpoint: prefixed keys, under the wrapper's key if there is one."""
    state = {prefix + name: tensor for name, tensor in state.items()}
    return state if wrapper is None else {"epoch": 3, wrapper: state, "val_mae": 0.25}


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"), io.BytesIO())
    return out.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    """Return the bytes that torch.save writes."""
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def save_as(path: Path, state: dict[str, torch.Tensor], layout: str, prefix: str, wrapper: str | None) -> Path:
    """Save a state dict as `.pth`, as one safetensors file, or as a folder of two shards."""
    if layout == "pth":
        path = path.with_suffix(".pth")
        path.write_bytes(saved(wrap(state, prefix, wrapper)))
        return path
    state = wrap(state, prefix, None)
    if layout == "safetensors":
        save_file(state, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    path.mkdir(exist_ok=True)
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, path / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    (path / SHARD_INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def entry_values(entry: TensorEntry) -> torch.Tensor:
    """Read a tensor's values by its entry alone."""
    data = bytearray(entry.file.read_bytes()[entry.offset :])
    dtype = getattr(torch, entry.dtype)
    count = math.prod(entry.shape)
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    if entry.strides is None:
        return torch.frombuffer(data, dtype=dtype, count=count).view(entry.shape)
    count = 1 + sum((length - 1) * stride for length, stride in zip(entry.shape, entry.strides))
    return torch.frombuffer(data, dtype=dtype, count=count).as_strided(entry.shape, entry.strides)


def _without_record(good: bytes, ending: str) -> bytes:
    return zipped({name: data for name, data in records_of(good).items() if not name.endswith(ending)})


def _flipped_in_description(good: bytes) -> bytes:
    """Flip a byte of data.pkl, which the archive's checksum covers."""
    place = good.index(b"storage")
    return good[:place] + b"S" + good[place + 1 :]


#: By name: the bytes (made from those of a good .pth), and a pattern that the refusal matches.
BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "is empty"),
    "legacy": (
        lambda good: saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
        "before 1.6.*python3 -c",
    ),
    "compressed": (lambda good: zipped(records_of(good), zipfile.ZIP_DEFLATED), "compressed.*zip -0"),
    "zip bomb": (lambda good: zipped({"a/data.pkl": bytes(4 << 20)}, zipfile.ZIP_DEFLATED), "zip bomb"),
    "memo bomb": (lambda good: zipped({"a/data.pkl": MEMO_BOMB}), "no tensors by name .an empty dict"),
    "foreign zip": (lambda good: zipped({"readme.txt": b"hello"}), "zip archive of something else.*readme.txt"),
    "empty zip": (lambda good: zipped({}), "zip archive of something else"),
    "TorchScript": (
        lambda good: zipped({"a/data.pkl": b"", "a/constants.pkl": b"", "a/code/m.py": b""}),
        "TorchScript",
    ),
    "tar": (lambda good: _tar(), "a tar archive"),
    "LFS pointer": (
        lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "Git LFS.*git lfs pull",
    ),
    "HTML": (lambda good: b"\n<!DOCTYPE html><html></html>", "an HTML page"),
    "HDF5": (lambda good: b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "text": (
        lambda good: "# the policy, 정책\n".encode() * 99,
        "is a text file of [0-9]+ bytes, expected a checkpoint",
    ),
    "noise": (lambda good: b"\x17\x2a" * 99, "not the start of a checkpoint"),
    "os.system": (lambda good: saved({"model": Call(os.system, "false")}), r"(posix|nt)\.system"),
    "eval": (lambda good: saved({"args": Call(eval, "1")}), "eval"),
    "a module's class": (lambda good: saved(torch.nn.Linear(2, 2)), r"torch\.nn\.modules\.linear\.Linear"),
    "bare os.system": (lambda good: pickle.dumps(Call(os.system, "false")), r"(posix|nt)\.system"),
    "bare pickle": (lambda good: pickle.dumps({"a": 1}), "a bare pickle"),
    "no tensors": (lambda good: saved({"epoch": 3}), "holds no tensors"),
    "a list": (lambda good: saved([torch.ones(2)]), "holds a list"),
    "record missing": (lambda good: _without_record(good, "data/0"), "lacks"),
    "description missing": (lambda good: _without_record(good, "data.pkl"), "something else"),
    "description flipped": (_flipped_in_description, "checksum"),
}
