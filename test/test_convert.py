"""Conversion: the content of the folder, that it acts as its source, and that it is never half-written."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from checkpoint_files import saved
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy import convert as convert_module
from mobile_vla_inference.policy.convert import convert
from mobile_vla_inference.policy.engines.quantize import (
    Int8Linear,
    dequantize,
    quantize,
    row_scales,
    use_int8_linears,
    use_widening_modules,
)
from mobile_vla_inference.policy.loading import load_model
from mobile_vla_inference.policy.preprocess import InstructionEncoder
from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
from mobile_vla_inference.policy.storage.checkpoint_files import processor_folders
from mobile_vla_inference.policy.storage.checksums import verify_folder
from mobile_vla_inference.policy.storage.config import HybridConfig, standard_config
from mobile_vla_inference.policy.storage.conversion import folder_swap
from mobile_vla_inference.policy.storage.conversion import plan as conversion_plan
from mobile_vla_inference.policy.storage.conversion.plan import DTYPES
from mobile_vla_inference.policy.storage.layout import is_block_matrix, parameter_counts, tensor_shapes
from mobile_vla_inference.policy.storage.memory_budget import copied_bytes
from mobile_vla_inference.policy.storage.settings_file import load_settings, save_settings
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.tools import cli

REPOSITORY = Path(__file__).resolve().parent.parent
PURE = standard_config("tiny", "pure")
INSTRUCTION = "박스를 왼쪽으로 돌아서 컵까지 가세요"


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the tiny checkpoint converted to each type."""
    parent = tmp_path_factory.mktemp("converted")
    for dtype in DTYPES:
        convert(tiny_checkpoint, parent / dtype, dtype=dtype)
    return {dtype: parent / dtype for dtype in DTYPES}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """Return a converted folder of the test's own."""
    return Path(shutil.copytree(folders["float16"], tmp_path / "model"))


def _source_state(path: Path) -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)["model_state_dict"]


def _pure_state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(PURE).items()}


def _actions(path: Path, **options: str) -> np.ndarray:
    policy = VlaPolicy.load(path, **options)
    policy.set_instruction(INSTRUCTION)
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
    return np.array([policy.step(frame).values for frame in frames])


def _fused_features(path: Path, processors: Path, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
    """Return the input of the recurrent layers for a few frames, [4, features]."""
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint, dtype=dtype)
    encoder = InstructionEncoder(processor_folders(processors, checkpoint.config), model.config, model.settings)
    model.set_clip_eos_token_id(encoder.clip_eos_token_id)
    size = model.config.image_size
    pixel_values = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        text = model.clip_text_feature(encoder.clip_ids(INSTRUCTION))
        return model.fused_features(pixel_values, encoder.prompt(INSTRUCTION), text).float()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- content of the folder ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_folder_holds_the_weights_and_no_dead_ones(
    folders: dict[str, Path], tiny_checkpoint: Path, dtype: str
) -> None:
    source = _source_state(tiny_checkpoint)
    found = load_file(folders[dtype] / "model-00001-of-00001.safetensors")  # by the library: it reads our format
    scales = {name.removesuffix("_scale"): found.pop(name) for name in list(found) if name.endswith(".weight_scale")}
    assert found.keys() == source.keys()
    assert scales.keys() == ({name for name in source if is_block_matrix(name)} if dtype == "int8" else set())
    for name, tensor in found.items():
        if name in scales:
            expected = source[name]
            error = (dequantize(tensor, scales[name]) - expected).abs()
            assert tensor.dtype == torch.int8 and scales[name].dtype == torch.float32
            assert bool((error <= scales[name][:, None] * 0.5001).all()), name
        else:
            assert torch.equal(tensor, source[name].to(getattr(torch, "float16" if dtype == "int8" else dtype))), name


def test_config_and_settings(folders: dict[str, Path], tiny_checkpoint: Path) -> None:
    config = json.loads((folders["int8"] / "config.json").read_text(encoding="utf-8"))
    assert list(config) == [
        "model_type",
        "format",
        "variant",
        "architecture",
        "parameters",
        "dtype",
        "quantization",
        "keep_layers",
        "training",
        "source",
        "converted",
    ]
    assert HybridConfig.from_json(config["architecture"]) == standard_config("tiny", "hybrid")
    assert config["parameters"] == sum(parameter_counts(open_checkpoint(tiny_checkpoint).index.shapes).values())
    assert config["dtype"] == "int8" and config["quantization"]["other_dtype"] == "float16"
    data = tiny_checkpoint.read_bytes()
    assert config["source"] == {
        "name": "tiny.pth",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert config["training"]["val_mae"] == 1.0
    assert open_checkpoint(folders["int8"]).index.metadata["epoch"] == 0
    assert load_settings(folders["int8"]).settings == load_settings(tiny_checkpoint).settings
    copied = {path.relative_to(folders["int8"] / "processors") for path in folders["int8"].glob("processors/*/*")}
    original = tiny_checkpoint.with_suffix(".processors")
    assert copied == {path.relative_to(original) for path in original.glob("*/*")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_aligned_for_mapping(folders: dict[str, Path], dtype: str) -> None:
    checkpoint = open_checkpoint(folders[dtype])
    for name, entry in checkpoint.index.stored.items():
        assert entry.offset % (64 if entry.nbytes % 64 == 0 else entry.nbytes // max(np.prod(entry.shape), 1)) == 0, (
            name
        )
    own_dtype = None if dtype == "int8" else dtype
    assert copied_bytes(checkpoint.index, "cpu", own_dtype) == (0, 0)


def test_shards_are_limited(
    folders: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion_plan, "_SHARD_BYTES", 200_000)
    monkeypatch.setattr(convert_module, "_CHUNK_VALUES", 1000)  # no tensor is written in one piece
    conversion = convert(tiny_checkpoint, tmp_path / "model", dtype="int8")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) == conversion.shards > 5
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    checkpoint = open_checkpoint(tmp_path / "model")
    assert sum(entry.nbytes for entry in checkpoint.index.stored.values()) == conversion.weight_bytes
    whole = load_model(folders["int8"]).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_model(checkpoint).state_dict().items())


def test_a_downloaded_processor_leaves_its_weights_behind(tiny_checkpoint: Path, tmp_path: Path) -> None:
    processors = Path(shutil.copytree(tiny_checkpoint.with_suffix(".processors"), tmp_path / "processors"))
    kosmos = processors / "kosmos-2-patch14-224"
    (kosmos / "model.safetensors").write_bytes(b"7 GB")
    (kosmos / ".cache").mkdir()
    (processors / "microsoft").mkdir()
    kosmos.rename(processors / "microsoft" / kosmos.name)  # as a clone of the hub lays them out
    convert(tiny_checkpoint, tmp_path / "model", processors=processors)
    assert (tmp_path / "model/processors/kosmos-2-patch14-224/tokenizer.json").exists()
    assert not list((tmp_path / "model/processors").rglob("model.safetensors"))
    assert verify_folder(tmp_path / "model").passed


def test_without_processors_there_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(saved(_pure_state()))
    assert "no processors" in convert(path, tmp_path / "model").warnings[0]
    assert load_settings(tmp_path / "model").settings.assumed
    with pytest.raises(CheckpointError, match="no processor folder"):
        convert(path, tmp_path / "other", processors=tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


def test_progress_reaches_the_size_of_the_source(tiny_checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert(tiny_checkpoint, tmp_path / "model", progress=lambda done, total: calls.append((done, total)))
    size = tiny_checkpoint.stat().st_size
    assert calls == sorted(calls) and calls[-1] == (size, size) and len(calls) > 10


# --- that it acts as its source ---


def test_fp32_gives_the_same_actions_to_the_bit(folders: dict[str, Path], tiny_checkpoint: Path) -> None:
    assert np.array_equal(_actions(folders["float32"]), _actions(tiny_checkpoint))


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-2), ("bfloat16", 3e-2), ("int8", 5e-2)])
def test_fused_features_stay_close(folders: dict[str, Path], tiny_checkpoint: Path, dtype: str, limit: float) -> None:
    processors = tiny_checkpoint.with_suffix(".processors")
    expected = _fused_features(tiny_checkpoint, processors)
    for arithmetic in (torch.float32, None):
        assert _relative_error(_fused_features(folders[dtype], processors, arithmetic), expected) < limit


def test_16_bits_under_fp32_are_mapped_and_exact(folders: dict[str, Path], tiny_checkpoint: Path) -> None:
    """The matrices are widened as they are used; the result is that of weights that were cast before."""
    processors = tiny_checkpoint.with_suffix(".processors")
    checkpoint = open_checkpoint(folders["float16"])
    model = load_model(checkpoint, dtype=torch.float32)
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float16}
    assert {name for name in checkpoint.index.tensors if is_block_matrix(name)} < kept
    assert model.dtype == torch.float32 and model.rnn.weight_hh_l0.dtype == torch.float32
    copied = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name not in kept)
    assert copied_bytes(checkpoint.index, "cpu", "float32")[0] == copied
    rounded = {name: tensor.half().float() for name, tensor in _source_state(tiny_checkpoint).items()}
    path = folders["float16"].parent / "rounded.pth"
    path.write_bytes(saved(rounded))
    save_settings(path, load_settings(tiny_checkpoint).settings)
    expected = _fused_features(path, processors)
    torch.testing.assert_close(_fused_features(folders["float16"], processors), expected, rtol=1e-6, atol=1e-6)


def test_int8_modules_hold_the_files_values(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["int8"])
    for dtype in (torch.float32, torch.float16):
        model = load_model(checkpoint, dtype=dtype)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
        assert {f"{name}.weight" for name in linears} == set(checkpoint.index.scales)
        for linear in linears.values():
            assert linear.weight.dtype == torch.int8 and linear.weight_scale.dtype == torch.float32
            assert linear.bias.dtype == dtype
    described = VlaPolicy.load(folders["int8"]).describe()
    assert described.quantization == "int8"
    assert described.parameters == json.loads((folders["int8"] / "config.json").read_text())["parameters"]


def test_quantisation_rounds_to_the_nearest_step() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.0
    weight[3] *= 1e-6
    scales = row_scales(weight)
    values = quantize(weight, scales)
    assert values.abs().amax() == 127 and bool((values[2] == 0).all()) and bool((values[3].abs().amax() == 127).all())
    assert bool(((dequantize(values, scales) - weight).abs() <= scales[:, None] * 0.5001).all())


def test_linears_of_many_rows_widen_in_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(1100, 40, generator=generator), torch.randn(1100, generator=generator)
    features = torch.randn(2, 3, 40, generator=generator)
    model = nn.Sequential(nn.Linear(40, 1100), nn.Linear(40, 1100))
    use_int8_linears(model, ["0.weight"])
    use_widening_modules(model, ["1.weight"])
    scales = row_scales(weight)
    model[0].weight, model[0].weight_scale, model[0].bias = quantize(weight, scales), scales, bias
    model[1].weight, model[1].bias = nn.Parameter(weight.half()), nn.Parameter(bias)
    for linear, widened in zip(model, (dequantize(model[0].weight, scales), weight.half().float())):
        torch.testing.assert_close(linear(features), functional.linear(features, widened, bias))


def test_a_folder_converts_again(folders: dict[str, Path], tmp_path: Path) -> None:
    convert(folders["float32"], tmp_path / "again", dtype="float16")
    for shard in folders["float16"].glob("*.safetensors"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()
    config = json.loads((tmp_path / "again/config.json").read_text())
    command = "sha256sum *.safetensors | sha256sum"
    listed = subprocess.run(["bash", "-c", command], cwd=folders["float32"], capture_output=True, text=True, check=True)
    assert config["source"]["sha256"] == listed.stdout.split()[0]
    assert config["training"]["val_mae"] == 1.0
    with pytest.raises(CheckpointError, match="is int8 already"):
        convert(folders["int8"], tmp_path / "no")


# --- fewer layers ---


def test_kept_layers_are_recorded_and_warned_about(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, sentence = tmp_path / "short", "kosmos_text has only the first 1 of its 2 layers"
    command = ["convert", str(tiny_checkpoint), str(out), "--dtype", "float32", "--keep-layers"]
    assert cli.main([*command, "kosmos_text=1,clip_vision=2"]) == 0
    assert sentence in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    assert config["keep_layers"] == {"kosmos_text": {"kept": 1, "of": 2}}
    assert open_checkpoint(out).config.kosmos_text.num_layers == 1
    assert any(sentence in warning for warning in VlaPolicy.load(out).describe().warnings)
    assert cli.main(["inspect", str(out), "--json", str(tmp_path / "i.json")]) == 0
    assert sentence in capsys.readouterr().out.replace("\n", " ")
    assert sentence in json.loads((tmp_path / "i.json").read_text())["warnings"][0]
    (tmp_path / "frames").mkdir()
    cv2.imwrite(str(tmp_path / "frames/0.png"), np.zeros((48, 64, 3), np.uint8))
    command = ["infer", "--checkpoint", str(out), "--instruction", "go", "--frames", str(tmp_path / "frames")]
    assert cli.main([*command, "--device", "cpu", "--json", str(tmp_path / "a.json")]) == 0
    assert sentence in capsys.readouterr().err
    assert sentence in json.loads((tmp_path / "a.json").read_text())["warnings"][0]
    assert VlaPolicy.load(tiny_checkpoint).describe().warnings == ()


def test_layers_that_are_kept_are_the_first_ones(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "short"
    kept = {"kosmos_text": 1, "kosmos_vision": 1, "clip_text": 1, "clip_vision": 1}
    convert(tiny_checkpoint, out, dtype="float32", keep_layers=kept)
    source, found = _source_state(tiny_checkpoint), load_model(out).state_dict()
    assert set(found) == {name for name in source if ".layers.1." not in name}
    assert all(torch.equal(tensor, source[name]) for name, tensor in found.items())


def test_layers_lost_twice_keep_the_first_number(tmp_path: Path) -> None:
    config = standard_config("small", "pure")
    path = tmp_path / "a.pth"
    path.write_bytes(saved({name: torch.zeros(shape) for name, shape in tensor_shapes(config).items()}))
    convert(path, tmp_path / "three", keep_layers={"kosmos_vision": 3})
    convert(tmp_path / "three", tmp_path / "two", keep_layers={"kosmos_vision": 2})
    assert open_checkpoint(tmp_path / "two").kept_layers == {"kosmos_vision": {"kept": 2, "of": 4}}


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        ({"rnn": 1}, "names 'rnn', expected one of kosmos_text, kosmos_vision; "),
        ({"clip_text": 1}, "names 'clip_text', expected one of kosmos_text, kosmos_vision; "),
        ({"kosmos_text": 3}, "keeps 3 layers of kosmos_text, expected 1 to 2"),
        ({"kosmos_text": 0}, "keeps 0 layers of kosmos_text, expected 1 to 2"),
    ],
)
def test_layers_that_can_not_be_kept(tmp_path: Path, layers: dict[str, int], pattern: str) -> None:
    (tmp_path / "a.pth").write_bytes(saved(_pure_state()))
    with pytest.raises(CheckpointError, match=pattern):
        convert(tmp_path / "a.pth", tmp_path / "out", keep_layers=layers)


@pytest.mark.parametrize("text", ["kosmos_text", "kosmos_text=a", "kosmos_text=-1", "kosmos_text=1,kosmos_text=2", ""])
def test_layers_are_written_as_tower_and_number(tiny_checkpoint: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main(["convert", str(tiny_checkpoint), str(tmp_path / "out"), "--keep-layers", text])
    assert ending.value.code == 2


# --- refusals ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, dtype: str, value: float) -> None:
    for name in ("kosmos_model.text_model.model.layers.1.ffn.fc2.weight", "actions.mlp.2.weight"):
        state = _pure_state()
        state[name][1, 2] = value
        (tmp_path / "a.pth").write_bytes(saved(state))
        with pytest.raises(CheckpointError, match=rf"{name} has 1 values that are NaN or Inf, expected finite"):
            convert(tmp_path / "a.pth", tmp_path / "out", dtype=dtype)
    assert _names(tmp_path) == ["a.pth"]


def test_a_value_too_large_for_fp16_is_named(tmp_path: Path) -> None:
    state = _pure_state()
    state["rnn.weight_hh_l1"][0, 0] = 1e6
    (tmp_path / "a.pth").write_bytes(saved(state))
    for dtype in ("float16", "int8"):
        with pytest.raises(CheckpointError, match=r"rnn\.weight_hh_l1 .* as float16 .*bfloat16"):
            convert(tmp_path / "a.pth", tmp_path / "out", dtype=dtype)
    convert(tmp_path / "a.pth", tmp_path / "out", dtype="bfloat16")


def test_a_target_that_is_taken(folder: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"already exists.*--force"):
        convert(tiny_checkpoint, folder)
    (tmp_path / "empty").mkdir()
    convert(tiny_checkpoint, tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    (tmp_path / "file").write_text("text")
    for name in ("mine", "file"):
        with pytest.raises(CheckpointError, match="nothing else is replaced"):
            convert(tiny_checkpoint, tmp_path / name, force=True)
    with pytest.raises(CheckpointError, match="not a folder"):
        convert(tiny_checkpoint, tmp_path / "no/where")
    with pytest.raises(CheckpointError, match="holds the source itself"):
        convert(folder, folder, force=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years" and verify_folder(folder).passed


def test_a_link_keeps_pointing_at_the_folder(folder: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    convert(tiny_checkpoint, tmp_path / "current", dtype="int8", force=True)
    assert (tmp_path / "current").is_symlink() and open_checkpoint(folder).quantization == "int8"


def test_a_full_disk_is_noticed_before(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: argparse.Namespace(f_bavail=1000, f_frsize=4096))
    with pytest.raises(CheckpointError, match=r"has 0\.00 GB free, expected at least 0\.02 GB"):
        convert(tiny_checkpoint, tmp_path / "out")
    assert _names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 1 MiB; skip where this account can't mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_becomes_full_leaves_nothing(
    tiny_checkpoint: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "_check_space", lambda *arguments: None)
    with pytest.raises(CheckpointError, match=r"disk of .* became full while converting.*nothing was written"):
        convert(tiny_checkpoint, small_disk / "out")
    assert _names(small_disk) == []


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(errno.ENOSPC, "became full"), (errno.EDQUOT, "became full"), (errno.EIO, "Input/output error.*nothing was")],
)
def test_a_disk_that_fails_leaves_the_old_folder(
    folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    before = (folder / "config.json").read_bytes()

    def failing(*arguments: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(convert_module, "write_safetensors", failing)
    with pytest.raises(CheckpointError, match=sentence):
        convert(tiny_checkpoint, folder, force=True)
    assert (folder / "config.json").read_bytes() == before and _names(folder.parent) == [folder.name]


def test_a_source_that_changes_meanwhile_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(tiny_checkpoint.read_bytes())

    def touch(done: int, total: int) -> None:
        os.utime(path, ns=(1, done))

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        convert(path, tmp_path / "out", progress=touch)
    assert _names(tmp_path) == ["a.pth"]


def test_foreign_models_are_refused_with_the_nearest_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    for block in range(2):
        resnet[f"layer1.{block}.conv1.weight"] = torch.zeros(64, 64, 3, 3)
        resnet[f"layer1.{block}.bn1.running_mean"] = torch.zeros(64)
    (tmp_path / "resnet.pth").write_bytes(saved(resnet))
    hybrid = {name: torch.zeros(shape) for name, shape in tensor_shapes(standard_config("tiny", "hybrid")).items()}
    clip = {name[len("clip_model.") :]: tensor for name, tensor in hybrid.items() if name.startswith("clip_model.")}
    save_file(clip, tmp_path / "clip.safetensors")
    rows = {"resnet.pth": "layer1.0-1.conv1.weight", "clip.safetensors": "text_model.encoder.layers.0-1"}
    for name, found in rows.items():
        assert cli.main(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert (
            "fits no architecture variant" in message
            and "expected those of a policy, such as the nearest, the " in message
        )
        assert found in message and "kosmos_model.text_model.* (all" in message
    assert not (tmp_path / "out").exists()


# --- what ends a run in the middle ---


@pytest.mark.parametrize("exchange", ["1", "0"])
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGINT"])
def test_ended_at_any_step_it_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, signal_name: str, exchange: str
) -> None:
    paths = [tmp_path / "first.pth", tmp_path / "second.pth"]
    for seed, path in enumerate(paths):
        path.write_bytes(saved(_pure_state(seed)))
    program = Path(__file__).with_name("crash_points.py")
    command = [sys.executable, str(program), *map(str, paths), str(tmp_path / "out"), signal_name, exchange]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    assert outcomes["first"] > 5 and outcomes["second"] > 2
    assert ("restored" in outcomes) == (signal_name == "SIGKILL" and exchange == "0")


def test_one_run_at_a_time(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with folder_swap.StagedFolder(out) as live:
        with pytest.raises(CheckpointError, match="is being written by another run"):
            convert(tiny_checkpoint, out)
        assert live.path.exists()
        convert(tiny_checkpoint, tmp_path / "other")
    convert(tiny_checkpoint, out)
    assert _names(tmp_path) == ["other", "out"]
