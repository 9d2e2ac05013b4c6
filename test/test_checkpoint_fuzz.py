"""Mutated checkpoints: each gives the weights that torch gives for it, or those from before the mutation, or a refusal.

A sample runs by default; MOBILE_VLA_FUZZ=2000 runs as many as that says, and -s shows the figures.
"""

from __future__ import annotations

import argparse
import os
import pickletools
import random
import struct
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_files import records_of, zipped
from checkpoint_files import entry_values, saved
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.formats.recognition import read_index
from mobile_vla_inference.policy.storage.formats.state_dict import WRAPPERS
from mobile_vla_inference.policy.storage.tensor_index import TensorIndex

COUNT = int(os.environ.get("MOBILE_VLA_FUZZ", "200"))
SEED = int(os.environ.get("MOBILE_VLA_FUZZ_SEED", "0"))

#: Names that a mutation can give a class or function: some that torch accepts, and some that must not be called.
_GLOBALS = (
    *("collections OrderedDict", "collections Counter", "collections defaultdict", "builtins set", "builtins eval"),
    *("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"),
    *("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state", "torch.nn.parameter Parameter"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch._tensor _rebuild_from_type_v2"),
    *(
        "torch._utils _rebuild_meta_tensor_no_storage",
        "torch Tensor",
        "torch FloatTensor",
        "torch Size",
        "torch float16",
    ),
    *(
        "torch FloatStorage",
        "torch HalfStorage",
        "torch LongStorage",
        "torch.storage UntypedStorage",
        "torch IntStorage",
    ),
    *("canary_of_the_fuzz call", "os system", "os getcwd", "builtins print", "argparse Namespace", "_codecs encode"),
    *("torch float16", "torch IntStorage"),
)
_NUMBERS = (0, 1, 2, 3, 5, 12, 24, 255, 256, 65535, 65536, 2**31 - 1, -1, -2)


class _Watch:
    """Note what runs while a checkpoint is read: an audit hook, which can't be taken away again, while it is on."""

    _EVENTS = ("pickle.find_class", "exec", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "import")

    def __init__(self) -> None:
        self.is_on = False
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and event in self._EVENTS:
            what = getattr(arguments[0], "co_filename", arguments[0])
            if "encodings" not in str(what):  # Python's codecs are modules that it loads when they are needed
                self.seen.append(f"{event} {what!s:.80}")


@pytest.fixture(scope="module")
def watch() -> _Watch:
    return _Watch()


def _base_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(8, 6, generator=generator)
    state = OrderedDict()
    state["kosmos_model.embed.weight"] = shared
    state["kosmos_model.part.weight"] = shared[2:5]
    state["kosmos_model.transposed"] = torch.randn(4, 3, generator=generator).t()
    state["kosmos_model.buffer"] = torch.nn.Buffer(torch.randn(3, generator=generator))
    state["rnn.weight_ih_l0"] = torch.nn.Parameter(torch.randn(8, 2, generator=generator))
    state["rnn.weight_hh_l0"] = torch.randn(8, 2, generator=generator).to(torch.float16)
    state["rnn.bias_ih_l0"] = torch.randn(8, generator=generator).to(torch.bfloat16)
    state["actions.mlp.0.weight"] = torch.randn(2, 2, generator=generator)
    state["actions.mlp.0.bias"] = torch.randn(2, generator=generator).to(torch.float64)
    state["actions.count"] = torch.tensor([3, 4])
    state["actions.scale"] = torch.tensor(2.5)
    return state


def _base() -> dict[str, Any]:
    state = _base_state()
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(8, 2)}, 1: {"step": 3, "exp_avg": torch.ones(8)}}
    return {
        "epoch": 3,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0, 1]}]},
        "scheduler": {"milestones": Counter({3: 1})},
        "val_mae": torch.tensor(0.25),
        "args": argparse.Namespace(lr=1e-3, lstm_layers=1),
    }


def _rezipped(good: bytes, description: bytes) -> bytes:
    records = records_of(good)
    return zipped({name: description if name.endswith("data.pkl") else data for name, data in records.items()})


def _description(good: bytes) -> bytes:
    return next(data for name, data in records_of(good).items() if name.endswith("data.pkl"))


def _instructions(data: bytes) -> list[bytes]:
    starts = [place for _, _, place in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)])]


def _number(rng: random.Random) -> bytes:
    value = rng.choice(_NUMBERS) if rng.random() < 0.7 else rng.randrange(-(2**31), 2**31)
    return b"J" + struct.pack("<i", value)


def _mutated_instruction(rng: random.Random, code: bytes, others: list[bytes]) -> bytes:
    """Return an instruction with another argument, of another kind, or taken from elsewhere in the pickle."""
    kind = code[:1]
    if kind in b"JKM" and rng.random() < 0.8:
        return _number(rng)
    if kind == b"c" and rng.random() < 0.8:
        return b"c" + rng.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n"
    if kind == b"X" and rng.random() < 0.7:
        text = rng.choice([c for c in others if c[:1] == b"X"])[5:]
        text = rng.choice((text, text + b"x", code[5:-1], b"module." + code[5:], b"data", b"meta"))
        return b"X" + struct.pack("<I", len(text)) + text
    if kind in b"hqjr" and rng.random() < 0.8:
        place = rng.randrange(256)
        return bytes((code[0], place)) if kind in b"hq" else code[:1] + struct.pack("<I", place)
    return rng.choice(
        (rng.choice(others), _number(rng), bytes((rng.choice(b"N\x88\x89])}(tRb\x81usaeQ.0\x85\x86\x87"),)))
    )


def _structured(rng: random.Random, data: bytes) -> bytes:
    codes = _instructions(data)
    place = rng.randrange(1, len(codes))
    match rng.randrange(10):
        case 0:
            del codes[place]
        case 1:
            codes.insert(place, codes[place])
        case 2:
            codes[place - 1], codes[place] = codes[place], codes[place - 1]
        case 3:
            codes.insert(place, rng.choice(codes))
        case _:  # instructions with arguments are the interesting ones, and the rare kinds as much as the others
            kinds = sorted({code[:1] for code in codes[1:]})
            kind = rng.choice(kinds)
            place = rng.choice([i for i, code in enumerate(codes) if i and code[:1] == kind])
            codes[place] = _mutated_instruction(rng, codes[place], codes)
    return b"".join(codes)


def _flipped(rng: random.Random, data: bytes, first: int = 0) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(first, len(data))] ^= rng.randrange(1, 256)
    return bytes(changed)


def _mutations(rng: random.Random, good: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the kind of a mutation, and the file with it, without end."""
    description = _description(good)
    directory = good.rindex(b"PK\x06\x06") if b"PK\x06\x06" in good else len(good) - 22
    directory = good.index(b"PK\x01\x02", directory - 4000)
    while True:
        for _ in range(4):
            yield "instruction", _rezipped(good, _structured(rng, description))
        for _ in range(3):
            yield "byte of the pickle", _rezipped(good, _flipped(rng, description))
        yield "byte of the directory", _flipped(rng, good, directory)
        yield "byte of the file", _flipped(rng, good)


def _same(entry_tensor: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Compare type, shape and every bit, NaN included."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    if entry_tensor.dtype != tensor.dtype or entry_tensor.shape != tensor.shape:
        return False
    tensor = tensor.detach().resolve_conj().resolve_neg()
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (entry_tensor, tensor)]
    return torch.equal(*bits)


def _assert_holds(index: TensorIndex, state: dict[Any, Any], what: str) -> None:
    expected = {key for key, value in state.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    expected = {key for key in expected if not key.endswith(("lm_head.weight", "lm_head.bias", "position_ids"))}
    assert set(index.file_keys.values()) == expected, what
    for name, entry in index.tensors.items():
        assert _same(entry_values(entry), state[index.file_keys[name]]), f"{what}: {name}"


def _torch_says(path: Path) -> Any:
    """Return what torch loads; None where it refuses."""
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # torch's reader raises many types on damage
            return None


def _at(content: Any, wrapper: str | None) -> Any:
    for key in () if wrapper is None else wrapper.split("."):
        content = content[int(key)] if isinstance(content, (list, tuple)) else content[key]
    return content


def test_a_mutated_pth_never_gives_other_weights(
    tmp_path: Path, watch: _Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary_of_the_fuzz.py"
    canary.write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    original = _base_state()
    good = saved(_base())
    path = tmp_path / "a.pth"
    path.write_bytes(good)
    _assert_holds(read_index(path), original, "no mutation")
    figures: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    for number, (kind, data) in zip(range(COUNT), _mutations(random.Random(SEED), good)):
        what = f"mutation {number} of seed {SEED}, {kind}"
        path.write_bytes(data)
        loaded = _torch_says(path)
        watch.is_on = True
        try:
            index = read_index(path)
        except CheckpointError as error:
            index = None
            assert "\n" not in str(error) and str(error).startswith(str(path)), what
            if loaded is not None:
                refusals[str(error).removeprefix(str(path))[:60]] += 1
        finally:
            watch.is_on = False
        assert not watch.seen, f"{what}: {watch.seen}"
        figures[f"torch {'loads' if loaded is not None else 'refuses'}, here {'read' if index else 'refused'}"] += 1
        if index is None:
            continue
        if loaded is None:
            assert index.wrapper == "model_state_dict" or index.wrapper not in WRAPPERS, what
            _assert_holds(index, original, what)
        else:
            _assert_holds(index, _at(loaded, index.wrapper), what)
    assert "canary_of_the_fuzz" not in sys.modules
    print("\n", dict(figures), *(f"\n  {count} torch loads, refused: {text}" for text, count in refusals.most_common()))
    # The mutations must be of every sort: a test that is refused throughout shows nothing.
    assert figures["torch loads, here read"] > COUNT // 10 and figures["torch refuses, here refused"] > COUNT // 5
    assert figures["torch loads, here refused"] < COUNT // 5


def _mutated_header(rng: random.Random, good: bytes) -> bytes:
    length = int.from_bytes(good[:8], "little")
    header, values = good[8 : 8 + length], good[8 + length :]
    if rng.random() < 0.5:
        header = _flipped(rng, header)
    else:
        words = (
            b"F32",
            b"F16",
            b"I32",
            b"BF16",
            b"F8_E4M3",
            b"[]",
            b"[6,8]",
            b"[8,6]",
            b"[0,192]",
            b"[192,0]",
            b"[1e3]",
        )
        old = rng.choice((b"F32", b"F16", b"BF16", b"[8,6]", b"[0,192]", b"[2]"))
        header = header.replace(old, rng.choice(words), 1)
    if rng.random() < 0.2:
        return _flipped(rng, good[:8]) + header + values
    return len(header).to_bytes(8, "little") + header + values


def test_a_mutated_safetensors_header_never_gives_other_weights(tmp_path: Path) -> None:
    original = {name: tensor.contiguous().clone().detach() for name, tensor in _base_state().items()}
    good = save_safetensors(original)
    path = tmp_path / "a.safetensors"
    rng = random.Random(SEED)
    figures: Counter[str] = Counter()
    for number in range(COUNT // 4):
        data = _mutated_header(rng, good)
        path.write_bytes(data)
        try:
            loaded = load_safetensors(data)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, OverflowError):
            loaded = None
        try:
            index = read_index(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            index = None
        figures[f"library {'loads' if loaded is not None else 'refuses'}, here {'read' if index else 'refused'}"] += 1
        if index is not None:
            _assert_holds(index, original if loaded is None else loaded, f"header {number} of seed {SEED}")
    print("\n", dict(figures))
    assert figures["library loads, here read"] > COUNT // 40
