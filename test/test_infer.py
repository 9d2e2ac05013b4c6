"""`mobile_vla infer` over a folder of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from mobile_vla_inference.errors import FrameError, InstructionError, MobileVlaError
from mobile_vla_inference.frames import read_image
from mobile_vla_inference.policy.storage.config import standard_config
from mobile_vla_inference.policy.synthetic.checkpoint import make_checkpoint
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.tools import infer

INSTRUCTION = "박스를 왼쪽으로 돌아서 컵까지 가세요"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    make_checkpoint(path, standard_config("tiny", "hybrid"), seed=0)
    return path


@pytest.fixture(scope="module")
def frames_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    generator = np.random.default_rng(0)
    for name in ("b.png", "a.png", "c.jpg"):
        patches = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / name), patches.repeat(30, axis=0).repeat(30, axis=1))
    return folder


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    infer.add_arguments(parser)
    return infer.run(parser.parse_args([str(argument) for argument in arguments]))


def report(checkpoint: Path, frames_dir: Path, file: Path, *more: str) -> dict:
    options = ("--instruction", INSTRUCTION, "--device", "cpu", "--json", file)
    assert run("--checkpoint", checkpoint, "--frames", frames_dir, *options, *more) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def test_actions_are_the_policys_in_name_order(checkpoint: Path, frames_dir: Path, tmp_path: Path) -> None:
    data = report(checkpoint, frames_dir, tmp_path / "out.json")
    policy = VlaPolicy.load(checkpoint)
    policy.set_instruction(INSTRUCTION)
    expected = [list(policy.step(read_image(frames_dir / name)).values) for name in ("a.png", "b.png", "c.jpg")]
    assert data["frames"] == ["a.png", "b.png", "c.jpg"]
    assert data["actions"] == expected
    assert data["velocities"] == [[2.0 * a, 0.0, 2.0 * b] for a, b in expected]
    assert data["instruction"] == INSTRUCTION
    assert {"checkpoint", "units", "version"} <= data.keys()


def test_reset_each_forgets_the_frames_before(checkpoint: Path, frames_dir: Path, tmp_path: Path) -> None:
    carried = report(checkpoint, frames_dir, tmp_path / "carried.json")["actions"]
    alone = report(checkpoint, frames_dir, tmp_path / "alone.json", "--reset-each")["actions"]
    assert alone[0] == carried[0]
    assert alone[1] != carried[1]


def test_without_json_a_table_is_printed(
    checkpoint: Path, frames_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--checkpoint", checkpoint, "--frames", frames_dir, "--instruction", INSTRUCTION, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["frame", "a.png", "b.png", "c.jpg"]


def test_what_cannot_be_used_is_one_sentence(checkpoint: Path, frames_dir: Path, tmp_path: Path) -> None:
    usual = ("--checkpoint", checkpoint, "--instruction", INSTRUCTION, "--device", "cpu")
    with pytest.raises(FrameError, match="no image files"):
        run(*usual, "--frames", tmp_path)
    with pytest.raises(InstructionError, match="empty"):
        run("--checkpoint", checkpoint, "--frames", frames_dir, "--instruction", " ")
    with pytest.raises(MobileVlaError, match="not a folder"):
        run(*usual, "--frames", frames_dir, "--json", tmp_path / "missing" / "out.json")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(FrameError, match=r"broken\.jpg"):
        run(*usual, "--frames", tmp_path, "--json", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
