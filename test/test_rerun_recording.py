"""`replay --rerun`: a recording that Rerun itself reads, and one sentence where rerun-sdk is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bag_files import write_drive

from mobile_vla_inference.tools import cli


def replay(tiny_checkpoint: Path, folder: Path, *options: str) -> int:
    write_drive(folder / "drive")
    bag, out = str(folder / "drive"), str(folder / "drive.rrd")
    return cli.main(["replay", bag, "--checkpoint", str(tiny_checkpoint), "--rerun", out, *options])


def test_rerun_reads_the_recording(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("rerun", reason="rerun-sdk is an extra: requirements/rerun.txt")
    options = ["--max-frames", "5", "--against", str(tiny_checkpoint), "--against-engine", "eager"]
    assert replay(tiny_checkpoint, tmp_path, *options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drive", "drive.rrd"]
    rerun = [sys.executable, "-m", "rerun", "rrd"]
    subprocess.run([*rerun, "verify", tmp_path / "drive.rrd"], check=True, timeout=60)
    found = subprocess.run(
        [*rerun, "print", tmp_path / "drive.rrd"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    for entity in ("/camera", "/linear.x/predicted", "/angular.z/against", "/gate", "/instruction", "/step_ms"):
        assert entity in found, entity


def test_a_missing_rerun_is_named_before_anything_is_loaded(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    checkpoint = tmp_path / "policy.pth"
    checkpoint.write_bytes(b"never read")
    assert replay(checkpoint, tmp_path) == 2
    assert "pip install -r requirements/rerun.txt" in capsys.readouterr().err
    assert not (tmp_path / "drive.rrd").exists()
