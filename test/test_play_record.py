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
from bag_files import PERIOD_NS, START_NS, picture, raw, stamps, write_drive

pytest.importorskip("rclpy")

import rclpy
from geometry_msgs.msg import Twist
from mcap.writer import Writer as McapWriter
from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Bool, Float64, String

from mobile_vla_inference.bags.reader import CLOCK, COMPRESSED_IMAGE, IMAGE, STRING, TWIST, BagReader, typestore
from mobile_vla_inference.bags.writer import STORAGES, BagWriter
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.bag_graph import BagPlayer, message_class
from mobile_vla_inference.tools import cli
from mobile_vla_inference.tools.play import check_offset, graph_topics

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
    """Read the output until a line contains `part`; fail with all of it if it ends before."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if part in line:
            return
    pytest.fail(f"{part!r} was not printed: {''.join(lines)}")


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
    received: dict[str, list] = {"clock": [], "image": [], "command": [], "text": []}
    news = threading.Event()

    def receive(kind: type, topic: str, name: str) -> None:
        def keep(message: object) -> None:
            received[name].append(message)
            news.set()

        probe.node.create_subscription(kind, topic, keep, 100)

    receive(Clock, "/clock", "clock")
    receive(CompressedImage, "/image_raw/compressed", "image")
    receive(Twist, "/cmd_vel_of_a_person", "command")
    receive(String, "/instruction", "text")
    remaps = ("/camera/compressed:=/image_raw/compressed", "cmd_vel:=cmd_vel_of_a_person")
    options = [word for remap in remaps for word in ("--remap", remap)]
    player = start_tool("play", str(path), "--loop", "--rate", "5", "--start-offset", "0.2", "--wait", "30", *options)
    probe.wait_for("three rounds", lambda: len(received["image"]) >= 18 and len(received["command"]) >= 18)
    player.send_signal(signal.SIGINT)
    output, _ = player.communicate(timeout=30)
    assert player.returncode == 0, output
    assert "/cmd_vel as /cmd_vel_of_a_person" in output
    nanoseconds = [m.header.stamp.nanosec for m in received["image"]]
    assert nanoseconds[:7] == [
        200_000_000,
        250_000_000,
        300_000_000,
        350_000_000,
        400_000_000,
        450_000_000,
        200_000_000,
    ]
    assert received["text"] == []  # sent before the offset
    clock = [m.clock.sec * 1_000_000_000 + m.clock.nanosec - stamps(1)[0] for m in received["clock"]]
    assert min(clock) >= 0
    assert max(clock) <= 450_000_000
    assert not probe.commands


def test_a_recorded_velocity_is_never_played_on_its_own_topic_unless_asked(tmp_path):
    with BagReader(write_drive(tmp_path / "drive", stamps(2))) as bag:
        targets = graph_topics(bag, {}, None)
        assert targets == {"/instruction": "/instruction", "/cmd_vel": "/recorded/cmd_vel", "/image_raw": "/image_raw"}
        assert bag.topics["/cmd_vel"].type_name == TWIST
        assert graph_topics(bag, {"/cmd_vel": "/cmd_vel"}, ["cmd_vel"]) == {"/cmd_vel": "/cmd_vel"}


# ---- what is played, and where ---------------------------------------------------------------------------------------

#: Topics that make a robot move, stop or forget its stop, and others that belong to whoever publishes them live.
OTHERS = {
    "/cmd_vel": TWIST,
    "/robot1/base/twist_in": "geometry_msgs/msg/TwistStamped",
    "/forward_velocity_controller/commands": "std_msgs/msg/Float64MultiArray",
    "/motor_pwm": "std_msgs/msg/Float64",
    "/arm_controller/joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
    "/goal_pose": "geometry_msgs/msg/PoseStamped",
    "/initialpose": "geometry_msgs/msg/PoseWithCovarianceStamped",
    "/joy": "sensor_msgs/msg/Joy",
    "/stop": "std_msgs/msg/Bool",
    "/speech": STRING,
    "/clock": CLOCK,
    "/tf": "tf2_msgs/msg/TFMessage",
    "/odom": "nav_msgs/msg/Odometry",
    "/scan": "sensor_msgs/msg/LaserScan",
    "/diagnostics": "diagnostic_msgs/msg/DiagnosticArray",
    "/rosout": "rcl_interfaces/msg/Log",
    "/parameter_events": "rcl_interfaces/msg/ParameterEvent",
    "/vla_node/debug_image": IMAGE,
}
FED = {"/camera/color/image": IMAGE, "/image_raw/compressed": COMPRESSED_IMAGE, "/robot1/instruction": STRING}


@pytest.fixture
def all_topics(tmp_path) -> Iterator[BagReader]:
    """Return a bag of a whole robot, and of one ROS 2 driving by ackermann messages that the typestore lacks."""
    path = tmp_path / "all.mcap"
    with path.open("wb") as stream:
        writer = McapWriter(stream)
        writer.start(profile="ros2")
        types = {
            **OTHERS,
            **FED,
            "/ackermann_cmd": "ackermann_msgs/msg/AckermannDriveStamped",
            "/spin/_action/feedback": "nav2_msgs/action/Spin_FeedbackMessage",
        }
        for topic, type_name in types.items():
            schema = writer.register_schema(type_name, "ros2msg", b"")
            channel = writer.register_channel(topic, "cdr", schema)
            writer.add_message(channel, START_NS, b"\0\1\0\0", START_NS)
        writer.finish()
    with BagReader(path) as bag:
        yield bag


def test_only_inputs_of_a_policy_are_played_under_their_own_names(all_topics):
    own = {name for name, target in graph_topics(all_topics, {}, None).items() if name == target}
    assert own == set(FED)
    everything = graph_topics(all_topics, {}, None, everything=True)
    assert set(everything) == set(all_topics.topics) - {"/spin/_action/feedback"}
    assert {name for name, target in everything.items() if name == target} == set(FED)


@pytest.mark.parametrize("name", [*OTHERS, "/ackermann_cmd"])
def test_a_topic_that_is_chosen_goes_below_recorded_and_to_its_own_only_by_a_remap(all_topics, name):
    assert graph_topics(all_topics, {}, [name]) == {name: f"/recorded{name}"}
    assert graph_topics(all_topics, {name: "/elsewhere"}, None)[name] == "/elsewhere"
    if name == "/clock":
        with pytest.raises(MobileVlaError, match="where play publishes the time"):
            graph_topics(all_topics, {name: name}, None)
    else:
        assert graph_topics(all_topics, {name: name}, None)[name] == name


def test_nothing_takes_the_place_of_the_clock(all_topics):
    with pytest.raises(MobileVlaError, match="where play publishes the time"):
        graph_topics(all_topics, {"/robot1/instruction": "/clock"}, None)


@pytest.mark.parametrize(
    "type_name", ["", "Image", "sensor_msgs", "os/path/join", "a/../b", "json/msg/tool", "os/msg/x y"]
)
def test_a_type_that_is_none_has_no_class_and_imports_nothing(type_name):
    before = set(sys.modules)
    assert message_class(type_name) is None
    assert set(sys.modules) == before


def test_topics_that_can_not_be_published_are_left_out_with_a_warning(tmp_path, start_tool):
    path = tmp_path / "odd.mcap"
    with path.open("wb") as stream:
        writer = McapWriter(stream)
        writer.start(profile="ros2")
        for topic, type_name in {"/1st camera/image": IMAGE, "/image_raw": IMAGE, "/x/instruction": STRING}.items():
            channel = writer.register_channel(topic, "cdr", writer.register_schema(type_name, "ros2msg", b""))
            data = typestore().serialize_cdr(
                raw(picture(0), START_NS) if type_name == IMAGE else typestore().types[STRING](data="x"), type_name
            )
            writer.add_message(channel, START_NS, bytes(data), START_NS)
        for topic, encoding in (("/bare", "cdr"), ("/speech", "json")):
            schema = writer.register_schema(STRING, "jsonschema", b"{}") if encoding == "json" else 0
            writer.add_message(writer.register_channel(topic, encoding, schema), START_NS, b"\0\1\0\0", START_NS)
        writer.finish()
    player = start_tool("play", str(path), "--all-topics", "--wait", "0")
    output, _ = player.communicate(timeout=60)
    assert player.returncode == 0, output
    assert "'/1st camera/image' is not a valid topic name: /1st camera/image is left out" in output
    assert "/bare is left out" in output
    assert "/speech is in the encoding 'json', not ROS 2's: it is left out" in output
    assert "2 messages published" in output


def simulated(path: Path, count: int = 20) -> Path:
    """Write a drive of a simulation: its clock began 12 s before the first image, and images bear its stamps."""
    types = typestore().types
    with BagWriter(path) as bag:
        bag.add_topic("/clock", CLOCK)
        bag.add_topic("/image_raw", IMAGE)
        for index in range(count):
            simulated_ns = 12_000_000_000 + index * PERIOD_NS
            stamp = types["builtin_interfaces/msg/Time"](
                sec=simulated_ns // 1_000_000_000, nanosec=simulated_ns % 1_000_000_000
            )
            bag.write_message("/clock", START_NS + index * PERIOD_NS, types[CLOCK](clock=stamp))
            bag.write_message("/image_raw", START_NS + index * PERIOD_NS, raw(picture(index), simulated_ns))
    return path


def test_a_bag_of_a_simulation_is_played_by_its_own_clock(tmp_path, start_tool, probe):
    times, images = [], []
    probe.node.create_subscription(Clock, "/clock", lambda m: times.append(m.clock.sec + m.clock.nanosec * 1e-9), 1000)
    # The clock as it stands when an image is there: the image's age.
    probe.node.create_subscription(Image, "/played", lambda m: images.append(m.header.stamp), 100)
    options = ("--remap", "/image_raw:=/played", "--wait", "30", "--start-offset", "0.2")
    player = start_tool("play", str(simulated(tmp_path / "drive")), *options)
    output, _ = player.communicate(timeout=60)
    assert player.returncode == 0, output
    probe.wait_for("all images", lambda: len(images) == 16)
    probe.wait_for("the last time", lambda: bool(times) and times[-1] == pytest.approx(12.95))
    assert times == sorted(times)
    assert 12.2 - 1e-6 <= times[0] <= 12.95


def test_a_graph_with_a_live_camera_is_refused(tmp_path, start_tool, probe):
    probe.start_images()
    player = start_tool("play", str(write_drive(tmp_path / "drive", stamps(3))), "--wait", "5", "--loop")
    output, _ = player.communicate(timeout=60)
    assert player.returncode == 2, output
    assert "/image_raw is published by /probe on this graph, expected only this bag" in output


def test_a_graph_with_a_live_clock_is_refused(tmp_path, start_tool, probe):
    probe.node.create_publisher(Clock, "/clock", 10)
    options = ("--wait", "5", "--loop", "--remap", "/image_raw:=/played")
    player = start_tool("play", str(write_drive(tmp_path / "drive", stamps(3))), *options)
    output, _ = player.communicate(timeout=60)
    assert player.returncode == 2, output
    assert "/clock is published by /probe" in output


def test_a_recorded_instruction_reaches_no_node_with_other_images(tmp_path, start_tool, probe):
    """A robot that stands in front of a live camera, waiting for an instruction, would drive off."""
    received = []
    probe.node.create_subscription(String, "/instruction", received.append, 10)
    path = write_drive(tmp_path / "drive", stamps(60), instructions=dict.fromkeys(range(0, 60, 5), "go"))
    options = ("--wait", "5", "--loop", "--remap", "/image_raw:=/played")
    player = start_tool("play", str(path), *options)
    output, _ = player.communicate(timeout=60)
    assert player.returncode == 2, output
    assert "/instruction is subscribed by /probe, which does not receive this bag's images" in output
    assert received == []
    player = start_tool("play", str(path), *options, "--remap", "/instruction:=/instruction")
    probe.wait_for("the instruction that was asked for by name", lambda: bool(received))
    player.send_signal(signal.SIGINT)
    player.communicate(timeout=30)
    assert player.returncode == 0


def test_recorded_velocities_and_a_recorded_stop_reach_no_robot(tmp_path, start_tool, probe):
    """A recorded `stop` false would release the stop of a person."""
    types = typestore().types
    path = tmp_path / "drive"
    with BagWriter(path) as bag:
        for topic, kind in (("/stop", "Bool"), ("/motor_pwm", "Float64"), ("/instruction", "String")):
            bag.add_topic(topic, f"std_msgs/msg/{kind}")
        for time_ns in stamps(10):
            bag.write_message("/stop", time_ns, types["std_msgs/msg/Bool"](data=False))
            bag.write_message("/motor_pwm", time_ns, types["std_msgs/msg/Float64"](data=0.7))
            bag.write_message("/instruction", time_ns, types[STRING](data="go"))
    own, below = [], []
    probe.node.create_subscription(Bool, "/stop", own.append, 10)
    probe.node.create_subscription(Float64, "/motor_pwm", own.append, 10)
    probe.node.create_subscription(Bool, "/recorded/stop", below.append, 10)
    probe.node.create_subscription(Float64, "/recorded/motor_pwm", below.append, 10)
    player = start_tool("play", str(path), "--topics", "/stop", "/motor_pwm", "--wait", "30")
    output, _ = player.communicate(timeout=60)
    assert player.returncode == 0, output
    probe.wait_for("what was recorded", lambda: len(below) == 20)
    assert own == []


@pytest.mark.parametrize("storage", STORAGES)
def test_a_latched_topic_is_recorded_and_played_as_such(tmp_path, start_tool, probe, storage):
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    publisher = probe.node.create_publisher(CameraInfo, "/camera_info", latched)
    publisher.publish(CameraInfo(width=64))
    path = tmp_path / "latched"
    recorder = start_tool("record", str(path), "--topics", "/camera_info", "--storage", storage)
    wait_for_line(recorder, "recording /camera_info")
    probe.wait_for("the recorder", lambda: publisher.get_subscription_count() == 1)
    assert publisher.wait_for_all_acked(Duration(seconds=30))
    recorder.send_signal(signal.SIGINT)
    output, _ = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, output
    with BagReader(path) as bag:
        assert bag.topics["/camera_info"].latched
        node = rclpy.create_node("late", context=probe.node.context)
        try:
            player = BagPlayer(node, bag, {"/camera_info": "/played"})
            player.play(threading.Event())
            received = []
            probe.node.create_subscription(CameraInfo, "/played", received.append, latched)
            probe.wait_for("a message that was sent before", lambda: len(received) == 1)
        finally:
            node.destroy_node()


@pytest.mark.timeout(120)
def test_a_topic_that_can_not_be_written_does_not_end_the_recording_of_others(tmp_path, start_tool, probe):
    service_msgs = pytest.importorskip("service_msgs.msg")  # no type of the distributions that bags are written for
    odd = probe.node.create_publisher(service_msgs.ServiceEventInfo, "/odd", 10)
    recorder = start_tool("record", str(tmp_path / "out"), "--topics", "/odd", "/instruction")
    awaited = {
        "/odd is of type service_msgs/msg/ServiceEventInfo, expected a standard ROS 2 message type",
        "recording /instruction",
    }
    for line in recorder.stdout:
        awaited = {part for part in awaited if part not in line}
        if not awaited:
            break
    probe.wait_for("the recorder", lambda: probe.instructions.get_subscription_count() == 1)
    probe.instructions.publish(String(data="go"))
    assert probe.instructions.wait_for_all_acked(Duration(seconds=30))
    recorder.send_signal(signal.SIGINT)
    output, _ = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, output
    assert len(contents(tmp_path / "out")["/instruction"]) == 1
    assert odd.get_subscription_count() == 0


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


def test_a_start_after_the_end_is_one_sentence_with_the_end(tmp_path):
    with BagReader(write_drive(tmp_path / "drive", stamps(3))) as bag:
        length_s = (stamps(3)[-1] - stamps(3)[0]) / 1e9
        check_offset(bag, ["/image_raw"], length_s / 2.0)
        with pytest.raises(
            MobileVlaError, match=rf"--start-offset is 100 s, but .* is after {length_s:.3g} s, expected less"
        ):
            check_offset(bag, ["/image_raw"], 100.0)


@pytest.mark.parametrize(
    "options", [["--rate", "0"], ["--rate", "fast"], ["--start-offset", "-1"], ["--remap", "a=b"], ["--wait", "nan"]]
)
def test_faulty_options_are_refused(tmp_path, options):
    with pytest.raises(SystemExit) as ending:
        cli.main(["play", str(tmp_path), *options])
    assert ending.value.code == 2


@pytest.mark.parametrize("storage", STORAGES)
def test_a_graph_with_nothing_to_record_is_reported(tmp_path, start_tool, storage):
    recorder = start_tool("record", str(tmp_path / "out"), "--storage", storage, "--seconds", "1")
    output, _ = recorder.communicate(timeout=60)
    assert recorder.returncode == 2
    assert "nothing was recorded" in output
    assert contents(tmp_path / "out") == {}
