"""OutputPump: a reader that does not read can't block the process; a reader that does gets every byte."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE_S = 30.0

PROGRAM = """
import os, sys, threading, time
from pathlib import Path
from mobile_vla_inference.control.output_pump import OutputPump

pump = OutputPump()
pump.start()
if len(sys.argv) > 2:
    pump.add_file(Path(sys.argv[2]))
for number in range(int(sys.argv[1])):
    print(f"line {number} " + 80 * "x", file=sys.stderr)
    if number % 1000 == 999:
        time.sleep(0.01)
pump.close(0.5)
Path("done").write_text(str(pump.dropped_lines))
"""


@pytest.fixture
def run(tmp_path) -> Iterator:
    """Return a function that runs the program with a given output."""
    started: list[subprocess.Popen] = []

    def start(lines: int, output: int, *more: str, program: str = PROGRAM) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", textwrap.dedent(program), str(lines), *more]
        started.append(subprocess.Popen(command, stdout=output, stderr=output, cwd=tmp_path, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def filled_pipe() -> tuple[int, int]:
    """Return a full pipe."""
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write_fd, bytes(4096))
    return read_fd, write_fd


def test_what_is_read_is_what_was_written(run, tmp_path):
    read_fd, write_fd = os.pipe()
    process = run(5000, write_fd, str(tmp_path / "log"))
    os.close(write_fd)
    with os.fdopen(read_fd) as output:
        lines = output.read().splitlines()
    assert [line.split()[1] for line in lines] == [str(number) for number in range(5000)]
    assert process.wait(PATIENCE_S) == 0
    assert (tmp_path / "log").read_text().splitlines() == lines
    assert (tmp_path / "done").read_text() == "0"


def test_a_pipe_that_is_not_read_blocks_nothing_and_lost_lines_are_counted(run, tmp_path):
    _read_fd, write_fd = filled_pipe()
    process = run(30_000, write_fd, str(tmp_path / "log"))
    assert process.wait(PATIENCE_S) == 0
    dropped = int((tmp_path / "done").read_text())
    assert 10_000 < dropped < 30_000, "a queue of 1 MiB holds some of the 2.7 MB"
    assert len((tmp_path / "log").read_text().splitlines()) == 30_000, "the log file has a queue of its own"


def test_a_terminal_that_was_stopped_blocks_nothing(run, tmp_path):
    master_fd, terminal_fd = pty.openpty()
    termios.tcflow(terminal_fd, termios.TCOOFF)  # Ctrl-S
    process = run(2000, terminal_fd)
    assert process.wait(PATIENCE_S) == 0
    assert (tmp_path / "done").exists()
    os.close(master_fd)


def test_output_resumes_when_the_pipe_is_read_again(run, tmp_path):
    read_fd, write_fd = filled_pipe()
    program = PROGRAM.replace("pump.close(0.5)", "Path('written').touch()\nsys.stdin.read()\npump.close(5.0)")
    process = run(30_000, write_fd, program=program)
    os.close(write_fd)
    deadline_s = time.monotonic() + PATIENCE_S
    while not (tmp_path / "written").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    text = b""
    while chunk := os.read(read_fd, 1 << 16):
        text += chunk
        if process.poll() is not None and not select.select([read_fd], [], [], 0)[0]:
            break
    assert b"line 0 " in text
    process.wait(PATIENCE_S)


def test_a_reader_that_exited_ends_nothing(run, tmp_path):
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    process = run(3000, write_fd, str(tmp_path / "log"))
    assert process.wait(PATIENCE_S) == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 3000


def test_a_full_disk_ends_nothing(run, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with Path("/dev/full").open("wb") as full:
        process = run(3000, full.fileno())
        assert process.wait(PATIENCE_S) == 0
    assert int((tmp_path / "done").read_text()) == 3000


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_descriptor_that_is_closed_from_the_start_ends_nothing(tmp_path, closed):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = f"exec {sys.executable} program.py 100 log {closed}"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, timeout=PATIENCE_S).returncode == 0
    if "2>&-" not in closed:
        assert len((tmp_path / "log").read_text().splitlines()) == 100


def test_the_traceback_of_a_crash_reaches_the_output_without_a_thread(run, tmp_path):
    with (tmp_path / "output").open("wb") as output:
        process = run(1, output.fileno(), program=PROGRAM.replace("pump.close(0.5)", "os.abort()"))
        assert process.wait(PATIENCE_S) < 0
    assert "Aborted" in (tmp_path / "output").read_text()
