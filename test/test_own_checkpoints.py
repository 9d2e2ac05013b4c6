"""Files as training scripts write them: the weights are found among other content, or the content is named."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import json
import pathlib
import random
import types
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archive_files import Call
from checkpoint_files import entry_values, saved

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.config import standard_config
from mobile_vla_inference.policy.storage.formats.recognition import read_index
from mobile_vla_inference.policy.storage.layout import tensor_shapes
from mobile_vla_inference.policy.storage.tensor_index import TensorIndex
from mobile_vla_inference.tools import inspect

State = dict[str, torch.Tensor]
_HOOKS: collections.OrderedDict = collections.OrderedDict()


def _state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    names = ("kosmos_model.a.weight", "clip_model.b.weight", "rnn.weight_ih_l0", "actions.mlp.0.weight")
    return {name: torch.randn(3, 2, generator=generator) for name in names}


def _read(tmp_path: Path, content: Any) -> TensorIndex:
    path = tmp_path / "a.pth"
    path.write_bytes(saved(content))
    return read_index(path)


def _assert_is(index: TensorIndex, state: State) -> None:
    assert index.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(entry_values(index.tensors[name]), tensor), name


def _refusal(tmp_path: Path, content: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        _read(tmp_path, content)
    message = str(caught.value)
    assert "expected" in message and ";" in message and "\n" not in message
    assert "don't use" not in message and "damaged" not in message and "code" not in message, message
    return message.removeprefix(str(tmp_path / "a.pth"))


class Phase(enum.Enum):
    WARM = 1


@dataclasses.dataclass
class TrainConfig:
    lr: float = 1e-3
    out: pathlib.Path = dataclasses.field(default_factory=lambda: pathlib.PosixPath("/runs/컵"))


class Settings(dict):
    """What configuration libraries give: a dict of a class of their own."""


def _scheduler_state() -> dict[str, Any]:
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    warm = torch.optim.lr_scheduler.LinearLR(optimizer)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, steps], [1]).state_dict()


#: By name: content next to the weights, the metadata made of it, and a word of the report if it is not read.
BESIDE: dict[str, tuple[Any, Any, str | None]] = {
    "Path": (pathlib.PosixPath("/data/x"), "/data/x", None),
    "relative Path": (pathlib.PurePosixPath("data/x"), "data/x", None),
    "numpy array": (np.array([0.1, 0.2]), [0.1, 0.2], None),
    "big-endian numpy array": (np.array([1, 2], dtype=">i4"), [1, 2], None),
    "big-endian numpy scalar": (np.array([3.5], dtype=">f8")[0], 3.5, None),
    "numpy random state": (np.random.RandomState(0).get_state(), None, "numpy.ndarray"),
    "numpy generator": (np.random.default_rng(0), None, "generator"),
    "python random state": (random.Random(0).getstate(), None, None),
    "torch random state": (torch.get_rng_state(), None, "tensors"),
    "SimpleNamespace": (types.SimpleNamespace(lr=1), {"lr": 1}, None),
    "set": ({"a"}, ["a"], None),
    "frozenset": (frozenset((3,)), [3], None),
    "Counter": (collections.Counter("aab"), {"a": 2, "b": 1}, None),
    "defaultdict": (collections.defaultdict(list, a=[1]), {"a": [1]}, None),
    "deque": (collections.deque([1.0]), None, "collections.deque"),
    "datetime": (datetime.datetime(2025, 1, 1), None, "datetime.datetime"),
    "timedelta": (datetime.timedelta(1), None, "datetime.timedelta"),
    "Decimal": (decimal.Decimal("1.5"), None, "decimal.Decimal"),
    "Fraction": (fractions.Fraction(1, 2), None, "fractions.Fraction"),
    "UUID": (uuid.UUID(int=1), None, "uuid.UUID"),
    "enum": (Phase.WARM, None, "Phase"),
    "dataclass": (TrainConfig(), {"lr": 1e-3, "out": "/runs/컵"}, "TrainConfig"),
    "dict of its own class": (Settings(lr=1), None, "Settings"),
    "function": (functools.partial(print, 1), None, "functools.partial"),
    "class": (TrainConfig, None, None),
    "bytes": (b"\x80", "bytes", None),
    "bytearray": (bytearray(b"ab"), "bytes", None),
    "complex": (1 + 2j, "(1+2j)", None),
    "range": (range(3), "range(0, 3)", None),
    "slice": (slice(1, 2), None, "slice"),
    "buffer in memory": (io.BytesIO(b"x"), None, "_io.BytesIO"),
    "scheduler": (_scheduler_state(), None, None),
    "module": (torch.nn.Linear(2, 2), None, "Linear"),
    "sparse tensor": (torch.eye(2).to_sparse(), None, "tensors"),
    "huge number": (1 << 400, "int", None),
    "half a surrogate pair": ("\ud800", "?", None),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_next_to_the_weights_are_read_or_named(tmp_path: Path, name: str, protocol: int) -> None:
    value, shown, unread = BESIDE[name]
    path = tmp_path / "a.pth"
    content = {"epoch": 3, "model_state_dict": _state(), "val_mae": 0.25, "extra": value}
    path.write_bytes(saved(content, pickle_protocol=protocol))
    index = read_index(path)
    _assert_is(index, _state())
    assert index.metadata["epoch"] == 3 and index.metadata["val_mae"] == 0.25
    json.dumps(index.metadata, allow_nan=False, ensure_ascii=False).encode()
    if shown is not None:
        assert index.metadata["extra"] == shown
    skipped = [text for text in index.skipped if text.startswith("extra (")]
    assert bool(skipped) == (unread is not None) and (unread or "") in "".join(skipped), index.skipped


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.tensor(0.25), 0.25),
        (torch.tensor([0.25], dtype=torch.float64), 0.25),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
        (torch.tensor(0.25, dtype=torch.float16), 0.25),
        (torch.nn.Parameter(torch.tensor(0.25)), 0.25),
        (torch.arange(8.0)[3], 3.0),
        (torch.tensor(3, dtype=torch.uint16), 3),
        (np.array(0.25), 0.25),
        (np.array([0.25], dtype=np.float32), [0.25]),
        (torch.tensor(float("nan")), "nan"),
    ],
)
def test_an_error_that_is_kept_as_a_tensor_is_a_number(tmp_path: Path, value: Any, found: Any) -> None:
    index = _read(tmp_path, {"model_state_dict": _state(), "val_mae": value})
    assert index.metadata["val_mae"] == found and index.dead["optimizer"] == 0 and index.skipped == ()


_LAYOUTS: dict[str, tuple[Callable[[State], Any], str | None]] = {
    **{
        key: (lambda s, key=key: {"step": 1, key: s}, key)
        for key in ("net", "module", "ema", "policy_state_dict", "m.b")
    },
    "deeper": (lambda s: {"agent": {"policy": {"weights": s}}}, "agent.policy.weights"),
    "a pair": (lambda s: (s, {"state": {}, "param_groups": []}), "0"),
    "next to statistics": (
        lambda s: {"weights": s, "action_stats": {"mean": torch.ones(2)}, "mae": torch.ones(())},
        "weights",
    ),
    "next to a discriminator": (lambda s: {"model": {"layer.weight": torch.ones(2)}, "policy": s}, "policy"),
    "next to a frozen tower": (lambda s: {"model": {"kosmos_model.x": torch.ones(2)}, "policy": s}, "policy"),
    "twice the same": (lambda s: {"state_dict": s, "model": s}, "state_dict"),
    "twice the same, wrapped": (
        lambda s: {"state_dict": s, "ddp": {"module." + k: v for k, v in s.items()}},
        "state_dict",
    ),
    "in parts": (
        lambda s: (
            {"epoch": 1, "val_mae": torch.tensor(0.5)}
            | {
                part: {k.split(".", 1)[1]: v for k, v in s.items() if k.startswith(part + ".")}
                for part in ("kosmos_model", "clip_model", "rnn", "actions")
            }
        ),
        None,
    ),
    "a dict of its own class": (lambda s: {"model": Settings(s)}, "model"),
}


@pytest.mark.parametrize("name", _LAYOUTS)
def test_the_state_dict_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    make, wrapper = _LAYOUTS[name]
    index = _read(tmp_path, make(_state()))
    _assert_is(index, _state())
    assert index.wrapper == wrapper


_KEYS: dict[str, tuple[Callable[[str], str], str]] = {
    "Lightning": (lambda k: "model." + k, "model."),
    "Lightning, compiled": (lambda k: "model._orig_mod." + k, "model._orig_mod."),
    "DDP of a compiled one": (lambda k: "module._orig_mod." + k, "module._orig_mod."),
    "FSDP": (lambda k: "_fsdp_wrapped_module." + k, "_fsdp_wrapped_module."),
    "FSDP of each part": (lambda k: k.replace(".", "._fsdp_wrapped_module.", 1), ""),
    "checkpointed layers": (lambda k: k.replace(".a.", ".a._checkpoint_wrapped_module."), ""),
    "a compiled tower": (lambda k: k.replace("kosmos_model.", "kosmos_model._orig_mod."), ""),
    "a cell in DataParallel": (lambda k: k.replace("rnn.", "rnn.module."), ""),
    "a prefix of one's own": (lambda k: "algo.actor." + k, "algo.actor."),
    "Fabric": (lambda k: "_forward_module.module." + k, "_forward_module.module."),
}


@pytest.mark.parametrize("name", _KEYS)
def test_wrappers_words_leave_the_names(tmp_path: Path, name: str) -> None:
    key, prefix = _KEYS[name]
    content = {key(name): tensor for name, tensor in _state().items()}
    index = _read(tmp_path, {"state_dict": content})
    _assert_is(index, _state())
    assert index.prefix == prefix
    assert all(torch.equal(content[index.file_keys[name]], tensor) for name, tensor in _state().items())


def _prefixed(prefix: str, seed: int) -> State:
    return {prefix + name: tensor for name, tensor in _state(seed).items()}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_state_dict": _state(0), "ema_state_dict": _state(1)}, ("model_state_dict and ema_state_dict",)),
        ({"model": _state(0), "ema": {"decay": 0.9, "shadow": _state(1)}}, ("model and ema.shadow",)),
        ([_state(0), _state(1)], ("0 and 1",)),
        ({"state_dict": _prefixed("model.", 0) | _prefixed("ema.", 1)}, ("ema.* and model.*",)),
        ({"state_dict": _state(0) | {"rnn.module.weight_ih_l0": torch.ones(1)}}, ("rnn.module.weight_ih_l0", "twice")),
        ({"a": {"x": torch.ones(1)}, "b": {"y": torch.ones(1)}}, ("a and b",)),
    ],
)
def test_two_sets_of_weights_are_refused_by_name(tmp_path: Path, content: Any, words: tuple[str, ...]) -> None:
    message = _refusal(tmp_path, content)
    assert all(word in message for word in words), message


def test_a_module_next_to_a_wrapped_policy_is_named(tmp_path: Path) -> None:
    state = {name: torch.zeros(shape) for name, shape in tensor_shapes(standard_config("tiny", "pure")).items()}
    content = {"model." + name: tensor for name, tensor in state.items()} | {"normalizer.mean": torch.ones(2)}
    path = tmp_path / "a.pth"
    path.write_bytes(saved({"state_dict": content}))
    with pytest.raises(CheckpointError, match=r"(?s)0 missing, 1 unexpected.*normalizer\.mean"):
        inspect.run(argparse.Namespace(checkpoint=path, json=None, confirm=False, processors=None))


class Own(torch.Tensor):
    """A tensor of a class that can change the meaning of its values."""


def _quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


#: By name: a tensor that is not the values in its storage, and words of its sentence.
FOREIGN: dict[str, tuple[Any, str]] = {
    "sparse": (torch.eye(3).to_sparse(), "a sparse tensor (torch.sparse_coo)"),
    "sparse rows": (torch.eye(3).to_sparse_csr(), "a sparse tensor (torch.sparse_csr)"),
    "quantized": (_quantized(), "a quantized tensor"),
    "meta": (torch.empty(3, device="meta"), "without values"),
    "negated": (
        torch.ones(2)._neg_view(),
        "lazily changed (neg)",
    ),
    "conjugated": (torch.ones(2, dtype=torch.complex64).conj(), "lazily changed (conj)"),
    "replaced by an attribute": (
        Call(torch._utils._rebuild_parameter_with_state, torch.ones(2), True, _HOOKS, {"data": torch.zeros(2)}),
        "whose attribute 'data' replaces it",
    ),
    "changed class by an attribute": (
        Call(
            torch._tensor._rebuild_from_type_v2,
            torch._utils._rebuild_parameter,
            torch.Tensor,
            (torch.ones(2), True, _HOOKS),
            {"__class__": 1},
        ),
        "whose attribute '__class__' replaces it",
    ),
    "of another class": (torch.ones(2).as_subclass(Own), "the class test_own_checkpoints.Own"),
    "expanded": (torch.ones(1).expand(1000), "repeats the values"),
    "an object": (TrainConfig(), "an object of"),
    "a constructor's call": (Call(torch.Tensor, [1.0, 2.0]), "an object of torch.Tensor"),
    "under a number": ({0: torch.ones(2)}, "a tensor under 0"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_not_its_stored_values_is_refused_for_what_it_is(tmp_path: Path, name: str) -> None:
    value, words = FOREIGN[name]
    more = value if isinstance(value, dict) else {"rnn.extra": value}
    assert words in _refusal(tmp_path, {"model_state_dict": _state() | more})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FOREIGN if name != "under a number"])
def test_such_a_tensor_next_to_the_weights_is_no_problem(tmp_path: Path, name: str) -> None:
    _assert_is(_read(tmp_path, {"model_state_dict": _state(), "extra": {"x": FOREIGN[name][0]}}), _state())


def test_what_leaves_the_values_alone_is_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    storage = torch.randn(64, generator=generator)
    marked = torch.nn.Parameter(torch.randn(2, generator=generator))
    marked.note = "from the second run"
    state = _state() | {
        "rnn.a": marked,
        "rnn.b": torch.nn.Buffer(torch.randn(3, generator=generator)),
        "rnn.c": storage[5:47:2].view(3, 7),
        "rnn.d": storage[5:11].view(2, 3).t(),
        "rnn.e": storage[60:60],
        "rnn.f": storage[7],
        "rnn.g": torch.randn(4, 5, generator=generator).to(memory_format=torch.contiguous_format)[:, 1:3],
    }
    index = _read(tmp_path, {"model_state_dict": state})
    _assert_is(index, {name: tensor.detach() for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("record", "content", "words"), [("byteorder", b"big", "not little-endian"), ("version", b"99\n", "version '99'")]
)
def test_a_record_that_changes_what_the_others_mean_is_honoured(
    tmp_path: Path, record: str, content: bytes, words: str
) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(io.BytesIO(saved(_state()))) as source, zipfile.ZipFile(path, "w") as changed:
        for info in source.infolist():
            changed.writestr(info.filename, content if info.filename.endswith(f"/{record}") else source.read(info))
    with pytest.raises(CheckpointError, match=words):
        read_index(path)


def test_inspect_names_what_it_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = {name: torch.zeros(shape) for name, shape in tensor_shapes(standard_config("tiny", "pure")).items()}
    path, out = tmp_path / "a.pth", tmp_path / "a.json"
    path.write_bytes(saved({"net": state, "saved": datetime.datetime(2025, 1, 1), "val_mae": torch.tensor(0.25)}))
    assert inspect.run(argparse.Namespace(checkpoint=path, json=out, confirm=False, processors=None)) == 0
    assert "saved (an object of datetime.datetime)" in capsys.readouterr().out
    described = json.loads(out.read_text(encoding="utf-8"))
    assert described["skipped"] == ["saved (an object of datetime.datetime)"] and described["val_mae"] == 0.25
