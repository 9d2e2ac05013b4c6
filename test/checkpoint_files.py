"""Members of the family to draw, and files that are no checkpoint, each with what its sentence must say."""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from mobile_vla_inference.policy.storage.config import Cell, HeadLayer, HybridConfig, TextTower, VisionTower
from mobile_vla_inference.policy.storage.formats.state_dict import WRAPPERS
from mobile_vla_inference.policy.storage.tensor_index import TensorEntry
from mobile_vla_inference.policy.storage.tensor_names import PREFIXES

_WIDTHS = st.sampled_from((64, 128, 192))
_DEPTHS = st.integers(1, 3)


@st.composite
def members(draw: st.DrawFn) -> HybridConfig:
    """Draw a member: any widths, depths, towers, cell and head layout; the heads of its towers are width / 64."""
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
def members_with_features(draw: st.DrawFn) -> tuple[HybridConfig, tuple[str, ...]]:
    """Draw a member and the features that its fusion layer reads, in any order."""
    config = draw(members())
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


#: What to put before every key, and the key of the training checkpoint to put the state dict under.
prefixes = st.lists(st.sampled_from(PREFIXES), max_size=3).map("".join)
wrappers = st.sampled_from((None, *WRAPPERS))


def wrap(state: dict[str, torch.Tensor], prefix: str, wrapper: str | None) -> dict[str, Any]:
    """Return what training would save: prefixed keys, under the wrapper's key if there is one."""
    state = {prefix + name: tensor for name, tensor in state.items()}
    return state if wrapper is None else {"epoch": 3, wrapper: state, "val_mae": 0.25}


class Call:
    """Pickles as a call of a function, which plain unpickling would run."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self._reduced


def _rezip(good: bytes, compression: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(out, "w", compression) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    return out.getvalue()


def _zip(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return out.getvalue()


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
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            if not info.filename.endswith(ending):
                target.writestr(info.filename, source.read(info))
    return out.getvalue()


def _flipped_in_description(good: bytes) -> bytes:
    """Flip a byte of data.pkl, which the archive's checksum covers."""
    place = good.index(b"storage")
    return good[:place] + b"S" + good[place + 1 :]


#: A memo number of 4 billion: C's unpickler would allocate room for all of them.
_MEMO_BOMB = b"\x80\x02}r" + struct.pack("<I", 0xFFFFFFFE) + b"."

#: By name: the bytes (from those of a good .pth), and a pattern that the sentence about them matches.
BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "is empty"),
    "legacy": (
        lambda good: saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
        "before 1.6.*python3 -c",
    ),
    "compressed": (lambda good: _rezip(good, zipfile.ZIP_DEFLATED), "compressed.*zip -0"),
    "zip bomb": (lambda good: _zip({"a/data.pkl": bytes(4 << 20)}, zipfile.ZIP_DEFLATED), "zip bomb"),
    "memo bomb": (lambda good: _zip({"a/data.pkl": _MEMO_BOMB}), "no tensors by name .an empty dict"),
    "foreign zip": (lambda good: _zip({"readme.txt": b"hello"}), "zip archive of something else.*readme.txt"),
    "empty zip": (lambda good: _zip({}), "zip archive of something else"),
    "TorchScript": (lambda good: _zip({"a/data.pkl": b"", "a/constants.pkl": b"", "a/code/m.py": b""}), "TorchScript"),
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
    "noise": (lambda good: b"\x17\x2a" * 99, "no checkpoint does"),
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
