"""The console: every command through a real terminal, through a pipe, and on folders, bags and without a camera."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from bag_files import picture, write_drive

from mobile_vla_inference.errors import FrameError, MobileVlaError
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.tools import cli
from mobile_vla_inference.tools.console import Commands, QuitRequest
from mobile_vla_inference.tools.console_session import (
    BagFrames,
    ConsoleSession,
    FolderFrames,
    SimulatedFrames,
    open_frames,
)

pexpect = pytest.importorskip("pexpect")
rich_console = pytest.importorskip("rich.console")

REPOSITORY = Path(__file__).resolve().parent.parent
#: The prompt turns bracketed paste on when it begins to read a line, and off when it has one.
READS, HAS_READ = "\x1b[?2004h", "\x1b[?2004l"
START_S = 100.0


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }


class Terminal:
    """A console on a pty; the escape sequences of its prompt are taken out of what it shows."""

    def __init__(self, checkpoint: Path, environment: dict[str, str]) -> None:
        arguments = ["-m", "mobile_vla_inference", "console", "--checkpoint", str(checkpoint), "--device", "cpu"]
        self.process = pexpect.spawn(
            sys.executable, arguments, env=environment, encoding="utf-8", timeout=START_S, dimensions=(40, 200)
        )
        self.process.expect_exact(READS)

    def ask(self, line: str) -> str:
        self.process.sendline(line)
        return self.shown()

    def shown(self) -> str:
        """Return what is shown between the line that was typed and the next prompt."""
        self.process.expect_exact(HAS_READ)
        self.process.expect_exact(READS)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.process.before)


@pytest.fixture
def terminal(tiny_checkpoint, environment) -> Iterator[Terminal]:
    terminal = Terminal(tiny_checkpoint, environment)
    yield terminal
    terminal.process.close(force=True)


def test_every_command_answers_on_a_terminal(terminal, tmp_path):
    assert cv2.imwrite(str(tmp_path / "own picture.png"), picture(0))
    assert re.search(r"simulated 0: action [+-]\d\.\d{3} .*step 1", terminal.ask("infer"))
    assert "step 2" in terminal.ask("infer")
    assert "the LSTM state is reset" in terminal.ask("reset")
    assert "step 1" in terminal.ask("infer")
    assert "3 of 3" in terminal.ask("benchmark 3")
    assert "simulated 2" in terminal.ask("continuous 3")
    memory = terminal.ask("memory")
    assert "process, resident" in memory
    assert "system, available" in memory
    assert "freed (MiB)" in terminal.ask("clear")
    assert "simulated 3, 320 x 240 px" in terminal.ask("frame next")
    assert "simulated 7" in terminal.ask("frame 7")
    assert "own picture.png, 64 x 48 px" in terminal.ask(f"frame {tmp_path / 'own picture.png'}")
    assert "own picture.png" in terminal.ask("frame")
    assert "박스를 왼쪽으로" in terminal.ask("instruction 박스를 왼쪽으로 돌아서 컵까지 가세요")
    info = terminal.ask("info")
    assert "hybrid" in info
    assert "박스를" in info
    assert "continuous [n]" in terminal.ask("help")
    assert "unknown command fly" in terminal.ask("fly")
    assert "did you mean infer?" in terminal.ask("infr")
    assert "can't be read" in terminal.ask("frame /nowhere.png")
    terminal.process.sendline("quit")
    terminal.process.expect(pexpect.EOF)
    assert terminal.process.wait() == 0


@pytest.mark.parametrize("command", ["continuous", "benchmark 1000000"])
def test_ctrl_c_stops_a_command_and_not_the_console(terminal, command):
    terminal.process.sendline(command)
    terminal.process.expect("a step every|benchmark:")
    terminal.process.sendintr()
    terminal.process.expect_exact("stopped")
    terminal.process.expect_exact(READS)
    assert "step 1" in terminal.ask("reset") + terminal.ask("infer")


def test_ctrl_c_at_the_prompt_drops_the_line_and_ctrl_d_exits(terminal):
    terminal.process.send("qui")
    terminal.process.expect_exact("qui")
    terminal.process.sendintr()
    terminal.process.expect_exact(READS)
    assert "step 1" in terminal.ask("infer")
    terminal.process.sendeof()
    terminal.process.expect(pexpect.EOF)
    assert terminal.process.wait() == 0


def test_tab_completes_and_history_is_kept(tiny_checkpoint, environment, terminal):
    terminal.process.send("res")
    terminal.process.expect_exact("reset")  # the menu
    terminal.process.send("\t")
    terminal.process.expect_exact("et")
    terminal.process.sendline("")
    terminal.process.expect_exact("the LSTM state is reset")
    terminal.process.expect_exact(READS)
    terminal.process.sendeof()
    terminal.process.expect(pexpect.EOF)
    history = Path(environment["XDG_STATE_HOME"]) / "mobile_vla" / "console_history"
    assert history.read_text().splitlines()[-1] == "+reset"


# ---- pipes -----------------------------------------------------------------------------------------------------------


def piped(text: str, checkpoint: Path, environment: dict[str, str], *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mobile_vla_inference", "console", "--checkpoint", str(checkpoint), *more],
        input=text,
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_S,
    )


def test_a_pipe_is_answered_line_by_line(tiny_checkpoint, environment):
    done = piped("# a remark\n\ninfer\nframe next\ninfer", tiny_checkpoint, environment)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[1:]] == ["simulated 0", "image", "simulated 1"]
    assert "\x1b" not in done.stdout


def test_a_failed_command_sets_the_exit_status_of_a_pipe(tiny_checkpoint, environment):
    done = piped("fly\ncontinuous\ninfer 3\nbenchmark many\nreset\n", tiny_checkpoint, environment)
    assert done.returncode == 2
    assert done.stdout.count("error: ") == 4
    assert "the LSTM state is reset" in done.stdout


# ---- without a process -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tiny_checkpoint) -> VlaPolicy:
    return VlaPolicy.load(tiny_checkpoint)


def test_the_state_is_kept_and_a_benchmark_resets_it(policy):
    session = ConsoleSession(policy, SimulatedFrames(), "go to the cup")
    session.reset()
    first, second = session.infer().action, session.infer().action
    assert first != second
    assert len(list(session.measure(2))) == 2
    assert session.infer().action == first
    assert session.steps == 1


def test_another_instruction_resets_the_state_and_the_same_does_not(policy):
    session = ConsoleSession(policy, SimulatedFrames(), "go to the cup")
    session.infer()
    session.set_instruction("go to the cup")
    assert session.steps == 1
    session.set_instruction("go back")
    assert session.steps == 0


def test_clear_returns_the_figures_before_and_after(policy):
    before, after = ConsoleSession(policy, SimulatedFrames(), "go").clear()
    assert min(before.process_mib, after.process_mib) > 0.0
    assert after.system_total_mib == before.system_total_mib


def test_quit_asks_to_exit(policy):
    commands = Commands(ConsoleSession(policy, SimulatedFrames(), "go"), rich_console.Console(file=io.StringIO()))
    with pytest.raises(QuitRequest):
        commands.answer("quit")


def test_the_simulated_camera_shows_the_same_for_the_same_number():
    frames = SimulatedFrames()
    assert np.array_equal(frames.read(5)[1], SimulatedFrames().read(5)[1])
    assert not np.array_equal(frames.read(5)[1], frames.read(6)[1])


def test_a_folder_is_read_in_name_order_and_starts_again_after_its_end(policy, tmp_path):
    for name in ("b.png", "a.png"):
        cv2.imwrite(str(tmp_path / name), picture(ord(name[0])))
    session = ConsoleSession(policy, open_frames(str(tmp_path)), "go")
    names = [session.frame_name]
    for _ in range(2):
        session.next_frame()
        names.append(session.frame_name)
    assert names == ["a.png", "b.png", "a.png"]
    with pytest.raises(FrameError, match="expected 0 to 1"):
        session.show_frame(2)


def test_a_broken_image_is_skipped(policy, tmp_path):
    for name in ("a.png", "c.png"):
        cv2.imwrite(str(tmp_path / name), picture(0))
    (tmp_path / "b.png").write_bytes(b"no image")
    session = ConsoleSession(policy, FolderFrames(tmp_path), "go")
    with pytest.raises(FrameError, match=r"b\.png"):
        session.next_frame()
    session.next_frame()
    assert session.frame_name == "c.png"


def test_a_bag_is_read_forwards_and_backwards(tmp_path):
    frames = open_frames(str(write_drive(tmp_path / "drive")))
    assert isinstance(frames, BagFrames)
    for index in (0, 1, 5, 3, 19):
        assert np.array_equal(frames.read(index)[1], picture(index))
    frames.close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--frames", "/nowhere"], "is not a folder"),
        (["--frames", "97"], "camera 97 can't be opened"),
        (["--checkpoint", "/nowhere.pth"], "nowhere.pth"),
        (["--instruction", " "], "--instruction is empty"),
    ],
)
def test_what_can_not_be_used_is_one_sentence(tiny_checkpoint, arguments, sentence, capsys):
    assert cli.main(["console", "--checkpoint", str(tiny_checkpoint), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mobile_vla: error: ")
    assert sentence in error


def test_without_a_checkpoint_the_bundled_policy_starts_and_leaves_nothing_behind(environment, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "mobile_vla_inference", "console", "--device", "cpu"],
        input="infer\n",
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode == 0, done.stderr
    assert "the bundled small policy" in done.stdout
    assert list(folder.iterdir()) == []


def test_ctrl_c_while_it_is_piped_ends_it(tiny_checkpoint, environment):
    process = subprocess.Popen(
        [sys.executable, "-m", "mobile_vla_inference", "console", "--checkpoint", str(tiny_checkpoint)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write("infer\n")
    process.stdin.flush()
    while "simulated 0" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=START_S)
    assert (process.returncode, errors) == (130, "")


def test_an_error_while_a_command_runs_is_printed(policy, tmp_path, monkeypatch):
    shown = io.StringIO()
    session = ConsoleSession(policy, SimulatedFrames(), "go")

    def fail(frame: np.ndarray) -> None:
        raise MobileVlaError("not finite")

    monkeypatch.setattr(session.policy, "step", fail)
    assert not Commands(session, rich_console.Console(file=shown)).answer("infer")
    assert "not finite" in shown.getvalue()
