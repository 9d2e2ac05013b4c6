"""Ctrl-C at the steps where a subcommand writes: status 130, no traceback, the old file or nothing at the output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bag_files import stamps, write_drive

#: Interrupts itself at the first event of the interpreter's audit that names the text.
INTERRUPTED = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)
event, part = sys.argv[1:3]
sent = False


def watch(name, arguments):
    global sent
    if not sent and name == event and any(part in str(argument) for argument in arguments):
        sent = True
        os.kill(os.getpid(), signal.SIGINT)


from mobile_vla_inference.tools.cli import main

sys.addaudithook(watch)
sys.exit(main(sys.argv[3:]))
"""


def interrupted(folder: Path, event: str, part: str, arguments: list[str]) -> None:
    """Run a subcommand that gets SIGINT at an audit event, and require that it ends as documented."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, event, part, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "Traceback" not in done.stderr


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("event", "part"),
    [("import", "h5py"), ("tempfile.mkstemp", ".drive_000"), ("os.rename", "drive_000.h5")],
)
def test_bag_to_episodes_leaves_no_part_of_an_episode(tmp_path, event, part):
    write_drive(tmp_path / "drive", stamps(10))
    interrupted(tmp_path, event, part, ["bag-to-episodes", "drive", "out"])
    assert names(tmp_path) in (["drive"], ["drive", "out"])
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("event", "part"),
    [("tempfile.mkdtemp", ".out."), ("os.rename", "out"), ("shutil.rmtree", ".out.")],
)
def test_make_checkpoint_leaves_no_work_folder(tmp_path, event, part):
    interrupted(tmp_path, event, part, ["make-checkpoint", "out.pth", "--size", "tiny"])
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


@pytest.mark.parametrize(
    ("event", "part"),
    [("import", "torch"), ("tempfile.mkstemp", ".out.json."), ("os.rename", "out.json")],
)
def test_replay_leaves_the_old_file(tmp_path, tiny_checkpoint, event, part):
    write_drive(tmp_path / "drive", stamps(10))
    (tmp_path / "out.json").write_text('{"old": true}')
    arguments = ["replay", "drive", "--checkpoint", str(tiny_checkpoint), "--json", "out.json"]
    interrupted(tmp_path, event, part, arguments)
    assert names(tmp_path) == ["drive", "out.json"]
    assert (tmp_path / "out.json").read_text() == '{"old": true}'


@pytest.mark.parametrize("event", ["tempfile.mkdtemp", "os.rename", "shutil.rmtree"])
def test_make_bag_leaves_no_work_folder(tmp_path, event):
    import cv2
    import numpy as np

    (tmp_path / "frames" / "images").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "frames" / "images" / "0.png"), np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "frames" / "actions.csv").write_text(
        "frame,stamp_s,image,steering,throttle\n0,0.0,images/0.png,0.0,0.5\n"
    )
    interrupted(tmp_path, event, "out", ["make-bag", "frames", "out"])
    assert [name for name in names(tmp_path) if name.startswith(".")] == []
