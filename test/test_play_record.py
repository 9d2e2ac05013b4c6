"""`play` and `record` on a real graph: what is played is what is recorded, and no recording drives a robot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bag_files import stamps, write_drive

pytest.importorskip("rclpy")

from geometry_msgs.msg import Twist
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import String

from mobile_vla_inference.bags.reader import COMPRESSED_IMAGE, TWIST, BagReader
from mobile_vla_inference.bags.writer import STORAGES
from mobile_vla_inference.tools import cli
from mobile_vla_inference.tools.play import graph_topics

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def start_tool() -> Iterator[Callable[..., subprocess.Popen]]:
    """Return what starts a subcommand in a process that ends with the test."""
    processes: list[subprocess.Popen] = []

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "mobile_vla_inference", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def wait_for_line(process: subprocess.Popen, part: str) -> None:
    """Read the output until a line holds `part`; fail with all of it where it ends before."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if part in line:
            return
    pytest.fail(f"{part!r} was not told: {''.join(lines)}")


def contents(path: Path) -> dict[str, list[bytes]]:
    with BagReader(path) as bag:
        for message in bag.messages():
            bag.decode(message)
        assert bag.notes == []
        return {name: [m.data for m in bag.messages((name,))] for name in bag.topics}


@pytest.mark.parametrize(("storage", "number"), [("mcap", signal.SIGINT), ("sqlite3", signal.SIGTERM)])
def test_what_is_played_is_what_is_recorded(tmp_path, start_tool, storage, number):
    played = write_drive(tmp_path / "drive", stamps(10), storage=storage, instructions={0: "left", 5: "오른쪽"})
    recorded = tmp_path / "recorded"
    recorder = start_tool("record", str(recorded), "--storage", storage)
    player = start_tool("play", str(played), "--wait", "30")
    for _ in range(3):
        wait_for_line(recorder, "recording /")
    output, _ = player.communicate(timeout=60)
    assert player.returncode == 0, output
    assert "22 messages published" in output
    recorder.send_signal(number)
    output, _ = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, output
    before, after = contents(played), contents(recorded)
    assert set(after) == {"/image_raw", "/instruction", "/recorded/cmd_vel"}
    for topic, name in (("/image_raw",) * 2, ("/instruction",) * 2, ("/cmd_vel", "/recorded/cmd_vel")):
        assert len(after[name]) == len(before[topic])
        for got, sent in zip(after[name], before[topic]):
            assert got[: len(sent)] == sent
            assert len(got) - len(sent) < 4  # DDS fills up to whole words


def test_play_keeps_the_clock_and_the_rate_and_loops_until_it_is_stopped(tmp_path, start_tool, probe):
    path = write_drive(tmp_path / "drive", stamps(10), kind=COMPRESSED_IMAGE, image_topics=("/camera/compressed",))
    heard: dict[str, list] = {"clock": [], "image": [], "command": [], "text": []}
    news = threading.Event()

    def hear(kind: type, topic: str, name: str) -> None:
        def keep(message: object) -> None:
            heard[name].append(message)
            news.set()

        probe.node.create_subscription(kind, topic, keep, 100)

    hear(Clock, "/clock", "clock")
    hear(CompressedImage, "/image_raw/compressed", "image")
    hear(Twist, "/cmd_vel_of_a_person", "command")
    hear(String, "/instruction", "text")
    remaps = ("/camera/compressed:=/image_raw/compressed", "cmd_vel:=cmd_vel_of_a_person")
    options = [word for remap in remaps for word in ("--remap", remap)]
    player = start_tool("play", str(path), "--loop", "--rate", "5", "--start-offset", "0.2", "--wait", "30", *options)
    probe.wait_for("three rounds", lambda: len(heard["image"]) >= 18 and len(heard["command"]) >= 18)
    player.send_signal(signal.SIGINT)
    output, _ = player.communicate(timeout=30)
    assert player.returncode == 0, output
    assert "/cmd_vel as /cmd_vel_of_a_person" in output
    nanoseconds = [m.header.stamp.nanosec for m in heard["image"]]
    assert nanoseconds[:7] == [
        200_000_000,
        250_000_000,
        300_000_000,
        350_000_000,
        400_000_000,
        450_000_000,
        200_000_000,
    ]
    assert heard["text"] == []  # told before the offset
    clock = [m.clock.sec * 1_000_000_000 + m.clock.nanosec - stamps(1)[0] for m in heard["clock"]]
    assert min(clock) >= 0
    assert max(clock) <= 450_000_000
    assert not probe.commands


def test_a_recorded_velocity_is_never_played_on_its_own_topic_unless_asked(tmp_path):
    with BagReader(write_drive(tmp_path / "drive", stamps(2))) as bag:
        targets = graph_topics(bag, {}, None)
        assert targets == {"/instruction": "/instruction", "/cmd_vel": "/recorded/cmd_vel", "/image_raw": "/image_raw"}
        assert bag.topics["/cmd_vel"].type_name == TWIST
        assert graph_topics(bag, {"/cmd_vel": "/cmd_vel"}, ["cmd_vel"]) == {"/cmd_vel": "/cmd_vel"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--topics", "/nothing"], "has no topic /nothing, expected one of /instruction, /cmd_vel, /image_raw"),
        (["--remap", "/nothing:=/x"], "has no topic /nothing"),
    ],
)
def test_topics_that_the_bag_lacks_are_one_sentence(tmp_path, capsys, options, sentence):
    assert cli.main(["play", str(write_drive(tmp_path / "drive", stamps(2))), *options]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--rate", "0"], ["--rate", "fast"], ["--start-offset", "-1"], ["--remap", "a=b"], ["--wait", "nan"]]
)
def test_faulty_options_are_refused(tmp_path, options):
    with pytest.raises(SystemExit) as ending:
        cli.main(["play", str(tmp_path), *options])
    assert ending.value.code == 2


@pytest.mark.parametrize("storage", STORAGES)
def test_a_graph_with_nothing_to_record_is_told(tmp_path, start_tool, storage):
    recorder = start_tool("record", str(tmp_path / "out"), "--storage", storage, "--seconds", "1")
    output, _ = recorder.communicate(timeout=60)
    assert recorder.returncode == 2
    assert "nothing was recorded" in output
    assert contents(tmp_path / "out") == {}
