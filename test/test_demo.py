"""`mobile_vla demo` as a user starts it: real processes on a real graph, and none of them left afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mobile_vla_inference.harness.processes import NodeProcess, last_error
from mobile_vla_inference.sim.world import OUTCOMES

pytest.importorskip("rclpy")

REPOSITORY = Path(__file__).resolve().parent.parent
MARK = "MOBILE_VLA_TEST_RUN"
DEADLINE_S = 90.0

FIGURES = {
    "frames_received",
    "steps",
    "commands_published",
    "cmd_vel_hz",
    "step_ms",
    "frames_dropped",
    "node_rss_mib",
    "worker_rss_mib",
    "final_command",
    "episodes",
}


class Demo:
    """A running demo, and everything that it starts, known by a mark in the environment."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._mark = uuid.uuid4().hex
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mobile_vla_inference", "demo", *arguments],
            cwd=folder,
            env={**os.environ, MARK: self._mark, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_line(self, part: str) -> None:
        """Read until a line contains `part`."""
        for line in self.process.stdout:
            self.lines.append(line)
            if part in line:
                return
        pytest.fail(f"the demo ended without {part!r}: {self.output}")

    def finish(self) -> int:
        """Read to the end; return the exit status."""
        self.lines.append(self.process.communicate(timeout=DEADLINE_S)[0])
        return self.process.returncode

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def family(self) -> list[psutil.Process]:
        """Every process that carries the mark, however it was started."""
        return [process for process in psutil.process_iter() if self._is_marked(process)]

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def member(self, module: str) -> psutil.Process:
        (process,) = [process for process in self.family() if module in process.cmdline()]
        return process

    def assert_nothing_is_left(self) -> None:
        deadline_s = time.monotonic() + 10.0
        while left := self.family():
            assert time.monotonic() < deadline_s, f"still running: {left}"
            psutil.wait_procs(left, timeout=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the demos of this module start."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture
def start(folder) -> Iterator[Callable[..., Demo]]:
    demos: list[Demo] = []

    def start_demo(*arguments: str) -> Demo:
        demos.append(Demo(folder, *arguments))
        return demos[-1]

    yield start_demo
    for started in demos:
        for process in started.family():
            process.kill()
        started.process.wait()
        started.process.stdout.close()


def test_it_drives_the_simulated_robot_and_writes_the_figures(start, tmp_path):
    figures = tmp_path / "figures with spaces.json"
    run = start("--seconds", "2", "--instruction", "박스를 왼쪽으로 돌아서 컵까지 가세요", "--json", str(figures))
    assert run.finish() == 0, run.output
    run.assert_nothing_is_left()
    summary = json.loads(figures.read_text())
    assert set(summary) == FIGURES
    assert summary["frames_received"] >= summary["steps"] > 0
    assert summary["frames_dropped"] > 0
    assert summary["commands_published"] > summary["steps"]
    assert summary["cmd_vel_hz"] > 1.0
    assert summary["step_ms"]["p95"] >= summary["step_ms"]["p50"] > 0.0
    assert 0.0 < summary["node_rss_mib"] < summary["worker_rss_mib"]
    assert set(summary["final_command"]) == {"linear_x_mps", "linear_y_mps", "angular_z_radps"}
    assert any(summary["final_command"].values())
    assert "Traceback" not in run.output
    assert "commands published" in run.output
    assert f"frames skipped      {summary['frames_dropped']} (" in run.output


def test_one_instruction_follows_the_other(start, tmp_path):
    pytest.importorskip("panda3d")
    figures = tmp_path / "figures.json"
    run = start("--seconds", "14", "--json", str(figures))
    assert run.finish() == 0, run.output
    (first, *_) = json.loads(figures.read_text())["episodes"]
    assert first["outcome"] in OUTCOMES
    assert first["scenario"] == "1box_hori_left"
    assert f"{first['outcome']:<20}{first['path_m']:.1f} m, {first['instruction']}" in run.output
    # The next world has begun, and the robot moves in it.
    last_line = [line for line in run.output.splitlines() if "m/s, turn" in line][-2]
    assert first["instruction"] not in last_line
    assert run.output.splitlines()[-1].startswith("unfinished          after ")


def test_it_drives_on_real_frames(start, tmp_path, track_drive_dir):
    figures = tmp_path / "figures.json"
    run = start("--frames", str(track_drive_dir / "images"), "--seconds", "2", "--json", str(figures))
    assert run.finish() == 0, run.output
    assert json.loads(figures.read_text())["steps"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_stop_request_ends_everything_with_the_summary(start, number):
    run = start("--seconds", "600")
    run.wait_for_line("m/s")
    run.process.send_signal(number)
    assert run.finish() == 0, run.output
    assert "final command       x" in run.output
    assert "Traceback" not in run.output
    run.assert_nothing_is_left()


def test_a_stop_request_before_the_robot_moves_is_an_interruption(start, tmp_path):
    figures = tmp_path / "figures.json"
    figures.write_text('{"of": "a former demo"}')
    run = start("--seconds", "600", "--json", str(figures))
    run.wait_for_line("starting the nodes")
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130, run.output
    assert "Traceback" not in run.output
    assert figures.read_text() == '{"of": "a former demo"}'
    run.assert_nothing_is_left()


def test_a_killed_demo_leaves_no_process(start):
    run = start("--seconds", "600")
    run.wait_for_line("m/s")
    assert len(run.family()) >= 4  # the demo, the node, its worker, the robot
    run.process.kill()
    run.assert_nothing_is_left()


def test_a_killed_node_ends_the_demo_and_is_named(start):
    run = start("--seconds", "600")
    run.wait_for_line("m/s")
    run.member("mobile_vla_inference.ros.node").kill()
    assert run.finish() == 2, run.output
    assert "mobile_vla: error: vla_node was killed by SIGKILL" in run.output
    run.assert_nothing_is_left()


def test_a_foreign_checkpoint_is_reported_in_the_nodes_own_words(start, tmp_path):
    foreign = tmp_path / "policy.pth"
    foreign.write_bytes(b"no checkpoint" * 1000)
    run = start("--checkpoint", str(foreign), "--json", str(tmp_path / "figures.json"))
    assert run.finish() == 2, run.output
    error = run.output.strip().splitlines()[-1]
    assert error.startswith("mobile_vla: error: vla_node ended with status 2: ")
    assert str(foreign) in error
    assert "Traceback" not in run.output
    assert json.loads((tmp_path / "figures.json").read_text())["final_command"] is None
    run.assert_nothing_is_left()


def test_an_unreadable_frame_is_reported_in_the_robots_own_words(start, tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"no image")
    run = start("--frames", str(tmp_path))
    assert run.finish() == 2, run.output
    assert f"{tmp_path / '0.jpg'} contains 8 bytes" in run.output.strip().splitlines()[-1]
    run.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--frames", "missing"], "missing is not a folder, expected one with image files; check the path"),
        (["--frames", "empty"], "empty contains no image files, expected some of .jpg"),
        (["--checkpoint", "missing.pth"], "missing.pth does not exist, expected a checkpoint file or folder"),
        (["--checkpoint", "empty.pth"], "empty.pth is empty, expected a checkpoint"),
        (["--instruction", " \n"], "the instruction is empty, expected a sentence"),
        (["--instruction", "x" * 5000], "instruction is 5000 bytes long, expected at most 4096"),
        (["--json", "missing/figures.json"], "missing is not a folder, expected one to write figures.json to"),
        (["--seconds", "-1"], "--seconds: -1 is not a number above 0"),
        (["--seconds", "soon"], "--seconds: soon is not a number above 0"),
        (["--seconds", "nan"], "--seconds: nan is not a number above 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(start, folder, arguments, sentence):
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "empty.pth").touch()
    run = start(*arguments)
    assert run.finish() == 2
    assert sentence in run.output.splitlines()[-1]
    assert "ROS_DOMAIN_ID" not in run.output


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", "it printed nothing"),
        ("one\ntwo\n\n", "two"),
        ("[ERROR] [1.5] [vla_node]: a: b\n[INFO] [1.6] [vla_node]: bye\n", "a: b"),
        ("[INFO] [1.5] [vla_node]: no error: really\nlast\n", "last"),
        ("Traceback\nValueError: bad\n[WARN] [1.5] [vla_node]: bye\n", "ValueError: bad"),
        ("[FATAL] [1.5] [a.b]: 컵\xff\n", "컵\xff"),
    ],
)
def test_the_last_error_of_a_log_is_found(tmp_path, log, line):
    (tmp_path / "log").write_text(log, encoding="utf-8")
    assert last_error(tmp_path / "log") == line


def test_a_child_that_ignores_the_request_to_end_is_killed_with_its_children(tmp_path):
    (tmp_path / "stubborn.py").write_text(
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "print(child.pid, flush=True)\n"
        "signal.pause()\n"
    )
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environment)
        process = NodeProcess("stubborn", "stubborn", {}, log)
    while not log.read_text().endswith("\n"):
        assert process.fault() is None
    grandchild = psutil.Process(int(log.read_text()))
    process.stop(timeout_s=0.1)
    assert process.fault() == f"stubborn was killed by SIGKILL: {grandchild.pid}"
    psutil.wait_procs([grandchild], timeout=10.0)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
