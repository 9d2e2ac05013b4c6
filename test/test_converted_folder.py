"""Converted folders: verify finds every difference, and a folder that convert did not write like this is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.convert import convert
from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
from mobile_vla_inference.policy.storage.checksums import verify_folder
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.storage.settings_file import load_settings
from mobile_vla_inference.tools import cli


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the tiny checkpoint converted to two types."""
    parent = tmp_path_factory.mktemp("converted")
    return {dtype: convert(tiny_checkpoint, parent / dtype, dtype=dtype).folder for dtype in ("float16", "int8")}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy of a converted folder for one test."""
    return Path(shutil.copytree(folders["float16"], tmp_path / "model"))


# --- verify ---


def test_verify_finds_each_flipped_byte(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["verify", str(folder)]) == 0
    assert "files match their hashes" in capsys.readouterr().out
    generator = random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for turn in range(20):
        path = files[turn % len(files)]
        good = path.read_bytes()
        place = generator.randrange(len(good))
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << generator.randrange(8)]) + good[place + 1 :])
        assert cli.main(["verify", str(folder), "--json", str(tmp_path / "report.json")]) == 2
        output = capsys.readouterr()
        if path.name != "sha256sums.txt":
            name = path.relative_to(folder).as_posix()
            # An edited policy.json may be meant: the sentence says how to confirm it.
            sentence = "policy.json was changed" if name == "policy.json" else "1 bad, 0 missing, 0 extra"
            assert f"bad      {name}\n" in output.out and sentence in output.err
            report = json.loads((tmp_path / "report.json").read_text())
            assert report["bad"] == [name] and not report["passed"] and len(report["good"]) == len(files) - 2
        path.write_bytes(good)
    assert verify_folder(folder).passed


def test_any_flipped_bit_of_the_list_is_found(folder: Path) -> None:
    path = folder / "sha256sums.txt"
    good = path.read_bytes()
    line = good.index(b"\n") + 1  # of one line, with its end
    for place in range(line):
        for bit in range(8):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            try:
                assert not verify_folder(folder).passed
            except CheckpointError as error:
                assert "sha256sums.txt" in str(error)


def test_verify_names_what_is_missing_and_what_is_extra(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "policy.json").unlink()
    (folder / "processors/notes.txt").write_text("mine")
    assert cli.main(["verify", str(folder)]) == 2
    output = capsys.readouterr()
    assert output.out == "missing  policy.json\nextra    processors/notes.txt\n"
    assert "0 bad, 1 missing, 1 extra" in output.err


def test_verify_of_what_convert_did_not_write(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "sha256sums.txt").unlink()
    for path, sentence in ((folder, "has no sha256sums.txt"), (tmp_path / "nowhere", "is not a folder")):
        assert cli.main(["verify", str(path)]) == 2
        assert sentence in capsys.readouterr().err


def test_coreutils_agrees(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", "sha256sums.txt"]
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    assert subprocess.run(command, cwd=folder, check=False).returncode == 0
    (folder / "config.json").write_text("{}")
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 1


def test_confirmed_settings_keep_the_list_true(folder: Path) -> None:
    (folder / "policy.json").write_text(
        json.dumps({"format": 1, "settings": PolicySettings(step_period_s=0.5, assumed=("prompt",)).to_json()})
    )
    assert not verify_folder(folder).passed
    assert cli.main(["inspect", str(folder), "--confirm"]) == 0
    assert verify_folder(folder).passed and not load_settings(folder).settings.assumed


# --- folders that are not as convert wrote them ---


def test_shards_of_another_conversion_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architecture"]["cell"]["num_layers"] = 3  # as if the shards had lost the last layer
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="describes another architecture"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["{", '{"model_type": "mobile_vla"}', '{"model_type": "mobile_vla", "architecture": 3}']
)
def test_a_damaged_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json can't be read.*convert"):
        open_checkpoint(folder)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (os.mkfifo, "is a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.write_text('{"a":' * 100_000), "nested more than"),
        (lambda path: path.touch() or os.truncate(path, 1 << 40), "is larger than"),
        (lambda path: path.write_text('{"model_type": "x", "model_type": "mobile_vla"}'), "is given twice"),
    ],
)
def test_a_config_that_can_not_be_read_at_once_is_refused(folder: Path, make, sentence: str) -> None:
    (folder / "config.json").unlink()
    make(folder / "config.json")
    with pytest.raises(CheckpointError, match=rf"config\.json.* {sentence}"):
        open_checkpoint(folder)


@pytest.mark.timeout(30)
def test_verify_does_not_wait_for_pipes_and_devices(folder: Path) -> None:
    names = ("config.json", "model.safetensors.index.json", "policy.json")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / names[0])
    (folder / names[1]).symlink_to("/dev/zero")
    (folder / names[2]).symlink_to("nowhere")
    found = verify_folder(folder)
    assert {*names} <= {*found.bad, *found.extra}
    (folder / "sha256sums.txt").unlink()
    os.mkfifo(folder / "sha256sums.txt")
    with pytest.raises(CheckpointError, match="is a named pipe"):
        verify_folder(folder)


def test_a_config_of_another_program_is_left_alone(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "kosmos-2"}')
    assert open_checkpoint(folder).conversion is None


def test_int8_without_its_scale_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["int8"] / "model-00001-of-00001.safetensors")
    name = next(name for name in tensors if name.endswith(".weight_scale"))
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"weight_scale is float32 .*a scale for each row"):
        open_checkpoint(tmp_path / "short.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"weight is int8, expected"):
        open_checkpoint(tmp_path / "none.safetensors")
