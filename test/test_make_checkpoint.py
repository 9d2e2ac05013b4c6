"""Synthetic checkpoints: the published layout, determinism, atomicity, and weights that react to real frames."""

from __future__ import annotations

import argparse
import shutil
import tracemalloc
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.frames import list_frames, read_image
from mobile_vla_inference.policy.storage.config import standard_config
from mobile_vla_inference.policy.storage.layout import tensor_shapes
from mobile_vla_inference.policy.storage.settings_file import load_settings
from mobile_vla_inference.policy.synthetic import weights as synthetic_weights
from mobile_vla_inference.policy.synthetic.archive import ArchiveContents, write_archive
from mobile_vla_inference.policy.synthetic.checkpoint import make_checkpoint
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.tools import make_checkpoint as tool

TINY = standard_config("tiny", "hybrid")


def load(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, mmap=True, weights_only=True)


def run_tool(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    return tool.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.parametrize("variant", ["hybrid", "pure"])
def test_the_file_has_the_published_layout(tmp_path: Path, variant: str) -> None:
    path, config = tmp_path / "made.pth", standard_config("tiny", variant)
    make_checkpoint(path, config, seed=0)
    checkpoint = load(path)
    assert list(checkpoint) == ["epoch", "model_state_dict", "optimizer_state_dict", "val_mae", "args"]
    assert isinstance(checkpoint["args"], argparse.Namespace)
    assert isinstance(checkpoint["epoch"], int)
    assert isinstance(checkpoint["val_mae"], float)
    tensors = checkpoint["model_state_dict"]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tensor_shapes(config)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in tensors.values())


def test_the_optimizer_state_is_adams_over_the_trained_parts(tmp_path: Path) -> None:
    path = tmp_path / "made.pth"
    make_checkpoint(path, TINY, seed=0)
    checkpoint = load(path)
    names = [n for n in checkpoint["model_state_dict"] if n.startswith(("feature_fusion.", "rnn.", "actions."))]
    trained = [torch.nn.Parameter(checkpoint["model_state_dict"][name].clone()) for name in names]
    optimizer = torch.optim.Adam(trained)
    own = optimizer.state_dict()["param_groups"][0]
    found = checkpoint["optimizer_state_dict"]
    assert set(found["param_groups"][0]) <= set(own)
    optimizer.load_state_dict(found)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in trained)


def test_the_archive_is_what_torch_and_zip_readers_accept(tmp_path: Path) -> None:
    path, saved = tmp_path / "made.pth", tmp_path / "saved.pth"
    make_checkpoint(path, TINY, seed=0)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {record.compress_type for record in archive.infolist()} == {zipfile.ZIP_STORED}
    made = load(path)
    torch.save(made, saved)
    for name, tensor in load(saved)["model_state_dict"].items():
        assert torch.equal(tensor, made["model_state_dict"][name]), name


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint(tmp_path / f"{name}.pth", TINY, seed=seed)
    first, again, other = ((tmp_path / f"{name}.pth").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_writing_holds_one_chunk_of_values_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_weights, "_CHUNK_VALUES", 1 << 12)
    contents = ArchiveContents(TINY, tensor_shapes(TINY), 0, {})
    tracemalloc.start()
    try:
        write_archive(tmp_path / "made.pth", contents, None)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "made.pth").stat().st_size > 3_500_000
    assert peak_bytes < 1_000_000


def test_settings_are_confirmed_and_processors_are_next_to_it(tmp_path: Path) -> None:
    path = tmp_path / "made.pth"
    make_checkpoint(path, TINY, seed=0)
    stored = load_settings(path)
    assert not stored.settings.assumed and stored.note is None
    assert stored.settings.attention_heads["kosmos_text"] == 4
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["made.processors", "made.pth", "made.pth.policy.json"]


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "made.pth"
    path.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="--force"):
        make_checkpoint(path, TINY, seed=0)
    assert path.read_bytes() == b"precious"
    for seed in (0, 1):
        make_checkpoint(path, TINY, seed=seed, force=True)
        assert load(path)["args"].seed == seed


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(written: int, total: int) -> None:
        if written > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "made.pth", TINY, seed=0, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(CheckpointError, match=r"7\.8 GB"):
        make_checkpoint(tmp_path / "made.pth", standard_config("full", "hybrid"), seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["missing/made.pth", "folder.pth"])
def test_a_target_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(CheckpointError, match="folder"):
        make_checkpoint(tmp_path / name, TINY, seed=0)


@pytest.mark.parametrize("variant", ["hybrid", "pure"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_actions_depend_on_real_frames(tmp_path: Path, track_drive_dir: Path, variant: str, seed: int) -> None:
    path = tmp_path / "made.pth"
    make_checkpoint(path, standard_config("tiny", variant), seed=seed)
    policy = VlaPolicy.load(path)
    policy.set_instruction("go to the cup")
    frames = [read_image(frame) for frame in list_frames(track_drive_dir / "images")[::20]]
    carried = np.array([policy.step(frame).values for frame in frames])
    assert carried.std(axis=0).min() >= 0.1
    assert np.abs(carried).max() < 2.0
    assert np.abs(carried).mean() < 1.0


def test_the_tool_writes_what_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.pth"
    assert run_tool(path, "--size", "tiny", "--seed", 7, "--fusion-in", 128) == 0
    assert load(path)["model_state_dict"]["feature_fusion.weight"].shape == (64, 128)
    assert load(path)["args"].seed == 7
    assert "tiny hybrid" in capsys.readouterr().out
    assert VlaPolicy.load(path).describe().fusion_features == ("kosmos_text", "clip_text", "clip_image")


def test_the_tool_refuses_a_fusion_layer_in_the_pure_variant(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fusion"):
        run_tool(tmp_path / "made.pth", "--variant", "pure", "--fusion-in", 96)
