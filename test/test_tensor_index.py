"""The tensor index: where tensors are in a good file, and one sentence for each bad one."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import BAD_FILES, entry_values, saved, wrap
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.formats.recognition import read_index
from mobile_vla_inference.policy.storage.formats.shards import SHARD_INDEX_FILE
from mobile_vla_inference.policy.storage.tensor_index import TensorEntry

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {f"layer.{dtype}".replace("torch.", ""): torch.ones(3, 2).to(dtype) for dtype in _DTYPES}
    state["layer.weight"] = torch.randn(7, 5, generator=generator)
    state["layer.transposed"] = torch.randn(4, 6, generator=generator).t()
    state["layer.part"] = torch.randn(4, 6, generator=generator)[1:3]
    state["scale"] = torch.tensor(2.5)
    return state


def _assert_holds(entries: dict[str, TensorEntry], state: dict[str, torch.Tensor]) -> None:
    assert entries.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(entry_values(entries[name]), tensor), name
        assert entries[name].shape == tuple(tensor.shape)
        assert entries[name].dtype == str(tensor.dtype).removeprefix("torch.")


@pytest.fixture(scope="module")
def good_bytes() -> bytes:
    return saved({"model_state_dict": _state(), "epoch": 1})


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model."])
def test_zip_entries_point_at_the_values(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(saved(wrap(_state(), prefix, wrapper)))
    index = read_index(path)
    assert (index.format, index.wrapper, index.prefix) == ("zip", wrapper, prefix)
    assert index.file_size == path.stat().st_size
    _assert_holds(index.tensors, _state())
    assert index.metadata == ({} if wrapper is None else {"epoch": 3, "val_mae": 0.25})


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(saved(_state(), pickle_protocol=protocol))
    _assert_holds(read_index(path).tensors, _state())


def test_a_prefix_that_not_all_keys_share_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(saved({"model.a": torch.ones(1), "b": torch.ones(1)}))
    index = read_index(path)
    assert index.prefix == "" and set(index.tensors) == {"model.a", "b"}


def test_metadata_is_plain(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    args = argparse.Namespace(lr=1e-4, device=torch.device("cuda", 1), dtype=torch.float16, steps=[1, 2], name="컵")
    parameter = torch.nn.Parameter(torch.ones(2))
    content = {"model": {"a": parameter}, "epoch": np.int64(4), "val_mae": np.float64(0.212), "args": args}
    path.write_bytes(saved(content))
    index = read_index(path)
    assert set(index.tensors) == {"a"}
    assert index.metadata["epoch"] == 4 and index.metadata["val_mae"] == 0.212
    assert index.metadata["args"]["device"] == "cuda:1"
    assert index.metadata["args"]["name"] == "컵" and index.metadata["args"]["steps"] == [1, 2]
    json.dumps(index.metadata, allow_nan=False)


def test_dead_weight_is_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    embedding = torch.randn(10, 4)
    state = {
        "a.embed.weight": embedding,
        "a.lm_head.weight": torch.randn(10, 4),
        "b.lm_head.weight": embedding,  # tied: no bytes of its own
        "v.position_ids": torch.arange(5)[None],
    }
    moments = {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(8), "exp_avg_sq": torch.ones(8)}}
    path.write_bytes(saved({"model_state_dict": state, "optimizer_state_dict": {"state": moments, "param_groups": []}}))
    index = read_index(path)
    assert set(index.tensors) == {"a.embed.weight"}
    assert index.dead == {"optimizer": 4 + 32 + 32, "lm_head": 160, "position_ids": 40}


def test_safetensors(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in _state().items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"epoch": "3"})
    index = read_index(tmp_path / "a.safetensors")
    _assert_holds(index.tensors, state)
    assert index.format == "safetensors" and index.metadata == {"epoch": "3"}
    (tmp_path / "a.safetensors").rename(tmp_path / "b.bin")  # known by its content
    _assert_holds(read_index(tmp_path / "b.bin").tensors, state)


def _sharded(folder: Path, with_index: bool = True) -> dict[str, torch.Tensor]:
    state = {name: tensor.contiguous() for name, tensor in _state().items()}
    names = sorted(state)
    shards = {"model-00001.safetensors": names[:4], "model-00002.safetensors": names[4:]}
    folder.mkdir()
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, folder / shard)
    if with_index:
        weight_map = {key: shard for shard, keys in shards.items() for key in keys}
        (folder / SHARD_INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


@pytest.mark.parametrize("with_index", [True, False])
def test_sharded_safetensors(tmp_path: Path, with_index: bool) -> None:
    state = _sharded(tmp_path / "model", with_index)
    index = read_index(tmp_path / "model")
    _assert_holds(index.tensors, state)
    assert index.format == "sharded safetensors"
    assert index.file_size == sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    _sharded(tmp_path / "model")
    (tmp_path / "model/model-00002.safetensors").unlink()
    _assert_refused(tmp_path / "model", "lacks model-00002.safetensors")


def test_shards_of_another_model_are_refused(tmp_path: Path) -> None:
    _sharded(tmp_path / "model")
    save_file({"x": torch.ones(1)}, tmp_path / "model/model-00002.safetensors")
    _assert_refused(tmp_path / "model", "disagree")
    (tmp_path / "model" / SHARD_INDEX_FILE).unlink()
    save_file({"layer.part": torch.ones(1), "x": torch.ones(1)}, tmp_path / "model/other.safetensors")
    _assert_refused(tmp_path / "model", "in two files")


@pytest.mark.parametrize("weight_map", [{"a": "../a.safetensors"}, {"a": "/etc/passwd"}, {}, {"a": 3}, ["a"]])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / SHARD_INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    _assert_refused(tmp_path, "is damaged")


def _assert_refused(path: Path, pattern: str) -> None:
    """Assert that reading raises one clear sentence: it names the file, is one line, and names what was expected."""
    with pytest.raises(CheckpointError) as caught:
        read_index(path)
    message = str(caught.value)
    assert re.search(pattern, message), message
    assert message.startswith(str(path)) and "expected" in message and ";" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gives_its_sentence(tmp_path: Path, good_bytes: bytes, name: str) -> None:
    make, pattern = BAD_FILES[name]
    path = tmp_path / "bad.pth"
    path.write_bytes(make(good_bytes))
    _assert_refused(path, pattern)


@pytest.mark.parametrize("part", range(20))
def test_a_truncated_zip_is_refused(tmp_path: Path, good_bytes: bytes, part: int) -> None:
    path = tmp_path / "cut.pth"
    path.write_bytes(good_bytes[: 1 + part * (len(good_bytes) - 2) // 19])
    _assert_refused(path, "cut off|truncated|not the start of a checkpoint")


def test_a_sentence_about_a_cut_file_says_it_once(tmp_path: Path, good_bytes: bytes) -> None:
    path = tmp_path / "cut.pth"
    path.write_bytes(good_bytes[:2000])
    with pytest.raises(CheckpointError, match="have no zip directory at their end, expected a whole checkpoint"):
        read_index(path)


@pytest.mark.parametrize("part", range(20))
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, part: int) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"a": torch.ones(100), "b": torch.ones(10, 10)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: 1 + part * (len(data) - 2) // 19])
    _assert_refused(path, "cut off")


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    _assert_refused(tmp_path / "missing.pth", "does not exist")
    _assert_refused(tmp_path, "without safetensors.*check the path")
    (tmp_path / "a.pth").touch()
    _assert_refused(tmp_path, r"a\.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    _assert_refused(tmp_path / "pipe.pth", "not a regular file")


@contextmanager
def _as_another_user() -> Iterator[None]:
    """Drop root's right to read everything, if the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_no_permission(tmp_path: Path, good_bytes: bytes) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(good_bytes)
    path.chmod(0)
    with _as_another_user():
        _assert_refused(path, "permission denied")


def test_a_storage_that_is_too_small_is_refused(tmp_path: Path) -> None:
    """The pickle claims more values than its record holds: without the check, values of other tensors would be read."""
    path = tmp_path / "a.pth"
    size_300, size_2048 = b"M\x2c\x01", b"M\x00\x08"  # opcode BININT2
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(300)}))) as source, zipfile.ZipFile(path, "w") as forged:
        for info in source.infolist():
            data = source.read(info)
            forged.writestr(info.filename, data.replace(size_300, size_2048) if "data.pkl" in info.filename else data)
    _assert_refused(path, "needs 8192 bytes.*has 1200")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_flipped_byte_never_breaks_the_reader(tmp_path: Path, good_bytes: bytes, place: float, value: int) -> None:
    data = bytearray(good_bytes)
    data[int(place * len(data))] ^= value
    path = tmp_path / "flipped.pth"
    path.write_bytes(data)
    try:
        index = read_index(path)
    except CheckpointError:
        return
    assert all(entry.offset + entry.nbytes <= len(data) for entry in index.tensors.values())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)))
def test_any_safetensors_header_is_read_or_refused(tmp_path: Path, header: object) -> None:
    path = tmp_path / "a.safetensors"
    for content in (header, {"a": header}, {"a": {"dtype": "F32", "shape": header, "data_offsets": [0, 4]}}):
        text = json.dumps(content).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        try:
            assert read_index(path).tensors["a"].nbytes == 4
        except CheckpointError as error:
            assert str(path) in str(error)


def test_no_torch_is_imported(tmp_path: Path, good_bytes: bytes) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(good_bytes)
    program = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        "from mobile_vla_inference.policy.storage.formats.recognition import read_index\n"
        "print(len(read_index(sys.argv[1]).tensors))"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(len(_state()))
