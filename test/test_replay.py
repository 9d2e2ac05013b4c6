"""Replay: the node's rules offline, the same bytes twice, comparison, and the same actions as the real node."""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from bag_files import PERIOD_NS, START_NS, picture, raw, stamps, storage_file, write_drive
from hypothesis import given
from hypothesis import strategies as st
from made_up_facts import made_up_facts

from mobile_vla_inference.action import Action, VelocityCommand
from mobile_vla_inference.bags.messages import twist_message
from mobile_vla_inference.bags.reader import COMPRESSED_IMAGE, IMAGE, STRING, TWIST, BagError, BagReader, typestore
from mobile_vla_inference.bags.writer import STORAGES, BagWriter
from mobile_vla_inference.control.gate import GateLimits
from mobile_vla_inference.errors import InstructionError, MobileVlaError
from mobile_vla_inference.policy_facts import PolicyFacts
from mobile_vla_inference.replay.gate_model import GateModel, limited_by
from mobile_vla_inference.replay.offline import DUE, STEPS_FILE, ReplayOptions, replay
from mobile_vla_inference.replay.summary import Step, read_steps, result_json
from mobile_vla_inference.tools import cli


class CountingPolicy:
    """A policy whose action tells how many steps its state has seen, and which instruction it follows."""

    def __init__(self, assumed: tuple[str, ...] = (), fail_at: tuple[int, ...] = ()) -> None:
        self.frames: list[np.ndarray] = []
        self.instruction = ""
        self.state = 0
        self._assumed = assumed
        self._fail_at = fail_at

    def describe(self) -> PolicyFacts:
        return made_up_facts(
            checkpoint="counting", step_period_s=0.3, action_scale=(2.0, 2.0), assumed_settings=self._assumed
        )

    def set_instruction(self, text: str) -> None:
        self.instruction = text

    def reset(self) -> None:
        self.state = 0

    def step(self, frame: np.ndarray) -> Action:
        self.frames.append(frame.copy())
        if len(self.frames) - 1 in self._fail_at:
            raise MobileVlaError("not finite")
        self.state += 1
        return Action((0.1 * self.state, 0.01 * len(self.instruction)), 0.001)


def states(result) -> list[int | None]:
    """Return how many steps the state had seen at each frame."""
    return [None if frame.action is None else round(10 * frame.action[0]) for frame in result.frames]


def run(path: Path, policy: CountingPolicy | None = None, **options):
    return replay(path, policy or CountingPolicy(), ReplayOptions(**options))


def test_a_recorded_command_that_is_not_finite_counts_as_none_and_the_result_can_be_read_back(tmp_path):
    path = tmp_path / "drive"
    with BagWriter(path) as bag:
        for topic, kind in (("/instruction", STRING), ("/cmd_vel", TWIST), ("/image_raw", IMAGE)):
            bag.add_topic(topic, kind)
        bag.write_message("/instruction", START_NS, typestore().types[STRING](data="go"))
        for index, speed in enumerate((0.1, math.nan, math.inf, 0.2)):
            time_ns = START_NS + index * PERIOD_NS
            bag.write_message("/cmd_vel", time_ns, twist_message(speed, 0.0))
            bag.write_message("/image_raw", time_ns, raw(picture(index), time_ns))
    result = run(path)
    assert [frame.recorded for frame in result.frames] == [(0.1, 0.0, 0.0), None, None, (0.2, 0.0, 0.0)]
    written = tmp_path / "drive.json"
    written.write_text(result_json(result))
    assert len(read_steps(written)) == 4


# ---- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_every_frame_is_stepped_with_the_state_kept(tmp_path, storage):
    policy = CountingPolicy()
    result = run(write_drive(tmp_path / "drive", storage=storage), policy)
    assert states(result) == list(range(1, 21))
    assert all(np.array_equal(frame, picture(index)) for index, frame in enumerate(policy.frames))
    assert (result.drops, result.resets, result.instructions) == ({}, {"start": 1}, ("follow the track",))
    assert result.frames[3].command == pytest.approx((0.8, 0.0, 0.02 * len("follow the track")))
    assert result.frames[3].recorded == pytest.approx((0.3, 0.0, -0.03))
    assert result.frames[3].latency_s == 0.001


def test_compressed_images_are_decoded(tmp_path):
    policy = CountingPolicy()
    run(write_drive(tmp_path / "drive", kind=COMPRESSED_IMAGE), policy)
    assert [frame.shape for frame in policy.frames] == [(48, 64, 3)] * 20


def test_due_steps_at_the_period_of_the_policy(tmp_path):
    result = run(write_drive(tmp_path / "drive"), pace=DUE)
    assert [frame.index for frame in result.frames if frame.stepped] == [0, 6, 12, 18]
    assert result.drops == {"not_due": 16}


def test_a_late_step_begins_the_period_anew(tmp_path):
    times_ns = [START_NS + round(s * 1e9) for s in (0.0, 0.35, 0.6, 0.65, 0.9)]
    result = run(write_drive(tmp_path / "drive", times_ns), pace=DUE)
    assert [frame.stepped for frame in result.frames] == [True, True, False, True, False]


def test_max_frames_ends_early(tmp_path):
    result = run(write_drive(tmp_path / "drive"), max_frames=7)
    assert len(result.frames) == 7
    assert result.frames[6].recorded is not None


def test_a_changed_instruction_clears_the_state_and_a_repeated_one_does_not(tmp_path):
    path = write_drive(tmp_path / "drive", stamps(8), instructions={0: "left", 2: " left ", 5: "right"})
    result = run(path)
    assert states(result) == [1, 2, 3, 4, 5, 1, 2, 3]
    assert result.resets == {"start": 1, "instruction": 1}
    assert result.instructions == ("left", "right")


def test_frames_without_an_instruction_are_dropped(tmp_path):
    path = write_drive(tmp_path / "drive", stamps(8), instructions={3: "left", 6: ""})
    result = run(path)
    assert states(result) == [None, None, None, 1, 2, 3, None, None]
    assert result.drops == {"no_instruction": 5}
    assert result.reasons["no_instruction"] == 5


def test_the_given_instruction_replaces_those_of_the_bag(tmp_path):
    path = write_drive(tmp_path / "drive", stamps(8), instructions={3: "left"})
    result = run(path, instruction="back  up")
    assert result.instructions == ("back up",)
    assert states(result) == list(range(1, 9))


def test_a_gap_and_time_that_runs_backwards_clear_the_state(tmp_path):
    seconds = (1.0, 1.1, 4.0, 4.1, 2.0, 2.1)
    result = run(write_drive(tmp_path / "drive", [START_NS + round(s * 1e9) for s in seconds]))
    assert [frame.reset for frame in result.frames] == ["start", "", "image_gap", "", "time_backwards", ""]
    assert states(result) == [1, 2, 1, 2, 1, 2]


def test_stamps_that_the_node_refuses_are_refused(tmp_path):
    result = run(write_drive(tmp_path / "drive", [0, START_NS, START_NS, START_NS + PERIOD_NS]))
    assert [frame.drop for frame in result.frames] == ["no_stamp", "", "repeated_stamp", ""]
    assert result.frames[0].reason == "image_refused"


def test_a_step_that_fails_clears_the_state(tmp_path):
    result = run(write_drive(tmp_path / "drive", stamps(5)), CountingPolicy(fail_at=(2,)))
    assert states(result) == [1, 2, None, 1, 2]
    assert (result.drops, result.resets) == ({"step_failed": 1}, {"start": 1, "step_failed": 1})


def test_unreadable_images_are_dropped_and_stop_the_robot(tmp_path):
    path = tmp_path / "drive"
    with BagReader(write_drive(tmp_path / "whole", stamps(12))) as whole, BagWriter(path) as bag:
        for topic in whole.topics.values():
            bag.add_topic(topic.name, topic.type_name)
        seen = 0
        for topic, time_ns, data in whole.messages():
            seen += topic == "/image_raw"
            bag.write(topic, time_ns, data[:900] if topic == "/image_raw" and seen == 9 else data)
    result = run(path)
    assert result.drops == {"unreadable": 1}
    assert [frame.reason for frame in result.frames[7:10]] == ["moving", "image_refused", "moving"]
    assert result.frames[8].gated == (0.0, 0.0, 0.0)


# ---- the gate --------------------------------------------------------------------------------------------------------


def test_the_gate_limits_speed_and_acceleration_over_the_bags_time(tmp_path):
    gated = [frame.gated for frame in run(write_drive(tmp_path / "drive", stamps(60))).frames]
    speeds = [velocity[0] for velocity in gated]
    assert speeds[0] == 0.0
    assert max(speeds) == 0.5
    assert max(after - before for before, after in itertools.pairwise(speeds)) <= 1.0 * 0.05 + 1e-6


def test_the_gate_stays_latched_after_a_gap(tmp_path):
    times_ns = [*stamps(10), *(time_ns + 5_000_000_000 for time_ns in stamps(5))]
    result = run(write_drive(tmp_path / "drive", times_ns))
    assert {frame.reason for frame in result.frames[10:]} == {"image_stale"}
    assert all(frame.gated in (None, (0.0, 0.0, 0.0)) for frame in result.frames[10:])


def test_what_the_limits_changed_is_counted_by_limit(tmp_path):
    """The policy wants 0.2 m/s more at each frame, so all but the first two are beyond 0.5 m/s: 0, 0.05 m/s, ..."""
    result = run(write_drive(tmp_path / "drive", stamps(60)))
    held_back = sum(frame.gated[0] < 0.5 - 1e-6 for frame in result.frames if frame.reason == "moving")
    assert result.gate["moving"] == result.reasons["moving"] == 57
    assert result.gate["changed"] == 57
    assert result.gate["by"] == {"speed of linear.x": 57, "acceleration": held_back}
    assert 5 < held_back < 15
    assert result.gate["frames"][0] is None
    assert result.gate["frames"][-1] == ["speed of linear.x"]
    assert result.gate["limits"]["max_linear_x_mps"] == 0.5


def test_limits_that_change_nothing_count_nothing(tmp_path):
    wide = GateLimits(1e3, 1e3, 1e3, 1e6, 1e6)
    result = run(write_drive(tmp_path / "drive", stamps(30)), limits=wide)
    assert (result.gate["moving"], result.gate["changed"], result.gate["by"]) == (27, 0, {})


def test_between_due_steps_the_last_command_is_in_force(tmp_path):
    result = run(write_drive(tmp_path / "drive", stamps(60)), pace="due")
    moving = [index for index, frame in enumerate(result.frames) if frame.reason == "moving"]
    wanted = [frame.command or None for frame in result.frames]
    in_force = [next(value for value in wanted[index::-1] if value) for index in moving]
    too_fast = sum(command[0] > 0.5 for command in in_force)
    assert len(moving) > sum(value is not None for value in wanted)
    assert result.gate["by"]["speed of linear.x"] == too_fast > 0


@given(
    st.tuples(*[st.floats(-3.0, 3.0)] * 3),
    st.tuples(*[st.floats(-3.0, 3.0)] * 3),
    st.floats(0.0, 2.0),
)
def test_a_limit_is_named_exactly_where_the_gate_changed_a_command(first, second, elapsed_s):
    limits = GateLimits()
    gate = GateModel(limits, True)
    gate.instruction_changed(True)
    gate.advance(0.0)
    gated = []
    for stamp_s, command in ((1.0, first), (1.0 + elapsed_s, second)):
        gate.advance(stamp_s)
        gate.image_accepted()
        gate.action_ready(VelocityCommand(*command))
        gated.append(gate.decide().command.values)
    for command, values in zip((first, second), gated):
        names = limited_by(command, values, limits)
        assert bool(names) == (max(abs(a - b) for a, b in zip(command, values)) > 1e-6)
        for axis, wanted, most in zip(("linear.x", "linear.y", "angular.z"), command, limits.max_velocity):
            assert (f"speed of {axis}" in names) == (abs(wanted) > most + 1e-6)


def test_the_limits_stand_in_the_summary_and_in_json(tmp_path, tiny_checkpoint, capsys):
    path, out = write_drive(tmp_path / "drive", stamps(12)), tmp_path / "replay.json"
    assert cli.main(["replay", str(path), "--checkpoint", str(tiny_checkpoint), "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    gate = content["gate"]
    assert gate["changed"] == sum(bool(names) for names in content["frame_limits"]) > 0
    assert gate["moving"] == sum(names is not None for names in content["frame_limits"])
    printed = capsys.readouterr()
    assert f"changed {gate['changed']} of {gate['moving']} moving frames" in printed.out.replace("\n", " ")
    assert "the policy was stepped every 0.05 s, but its step period is 0.3 s" in printed.err
    assert cli.main(["replay", str(path), "--checkpoint", str(tiny_checkpoint), "--due"]) == 0
    assert "was stepped every" not in capsys.readouterr().err


def test_assumed_settings_never_move(tmp_path):
    result = run(write_drive(tmp_path / "drive"), CountingPolicy(assumed=("action_scale",)))
    assert result.reasons == {"settings_assumed": 20}


# ---- what was recorded -----------------------------------------------------------------------------------------------


def test_a_recorded_command_counts_up_to_half_a_second(tmp_path):
    path = tmp_path / "drive"
    with BagReader(write_drive(tmp_path / "plain", stamps(30), commands=False)) as plain, BagWriter(path) as bag:
        for topic in plain.topics.values():
            bag.add_topic(topic.name, topic.type_name)
        bag.add_topic("/cmd_vel", TWIST)
        for topic, time_ns, data in plain.messages():
            bag.write(topic, time_ns, data)
            if topic == "/image_raw" and time_ns == START_NS + 4 * PERIOD_NS:
                bag.write_message("/cmd_vel", time_ns, twist_message(1.0, 0.0))
    recorded = [frame.recorded is not None for frame in run(path).frames]
    assert recorded == [False] * 4 + [True] * 11 + [False] * 15


def test_a_bag_without_commands_has_no_comparison(tmp_path):
    result = run(write_drive(tmp_path / "drive", commands=False))
    assert (result.comparison, result.command_topic) == (None, None)


def test_the_comparison_is_over_the_policys_axes_in_both_units(tmp_path):
    comparison = run(write_drive(tmp_path / "drive")).comparison
    predicted = np.array([0.2 * (index + 1) for index in range(20)])
    recorded = np.array([0.1 * index for index in range(20)])
    mae = float(np.abs(predicted - recorded).mean())
    assert comparison["frames"] == 20
    assert comparison["units"] == {"linear.x": "m/s", "angular.z": "rad/s"}
    assert comparison["command_units"]["policy"]["linear.x"]["mae"] == pytest.approx(mae)
    assert comparison["normalised_units"]["policy"]["linear.x"]["mae"] == pytest.approx(mae / 2)
    assert set(comparison["command_units"]) == {"policy", "zero", "mean", "previous"}


# ---- bags that can't be replayed -------------------------------------------------------------------------------------


def test_two_image_topics_are_asked_about(tmp_path):
    path = write_drive(tmp_path / "drive", image_topics=("/front", "/rear"))
    with pytest.raises(BagError, match="2 image topics \\(/front, /rear\\): choose one with --image-topic"):
        run(path)
    assert run(path, image_topic="/rear").image_topic == "/rear"
    assert run(path, image_topic="rear").image_topic == "/rear"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_topic": "/nothing"}, "has no topic /nothing"),
        ({"image_topic": "/cmd_vel"}, "/cmd_vel is of type geometry_msgs/msg/Twist, expected sensor_msgs/msg/Image"),
        ({"command_topic": "/image_raw"}, "is of type sensor_msgs/msg/Image, expected geometry_msgs/msg/Twist"),
        ({"command_topic": "/nothing"}, "/nothing is missing"),
    ],
)
def test_topics_that_do_not_fit_are_one_sentence(tmp_path, options, sentence):
    with pytest.raises(BagError, match=sentence):
        run(write_drive(tmp_path / "drive", stamps(2)), **options)


def test_a_bag_without_images_is_one_sentence(tmp_path):
    with pytest.raises(BagError, match="contains no image topic, only /instruction"):
        run(write_drive(tmp_path / "drive", image_topics=()))
    with pytest.raises(BagError, match="contains no image on /image_raw"):
        run(_with_empty_image_topic(tmp_path / "without"))


def _with_empty_image_topic(path: Path) -> Path:
    with BagWriter(path) as bag:
        bag.add_topic("/image_raw", IMAGE)
        bag.add_topic("/instruction", STRING)
        bag.write_message("/instruction", START_NS, typestore().types[STRING](data="go"))
    return path


def test_an_empty_bag_is_one_sentence(tmp_path):
    with BagWriter(tmp_path / "empty"):
        pass
    with pytest.raises(BagError, match="contains no messages"):
        run(tmp_path / "empty")


def test_a_bag_without_an_instruction_asks_for_one(tmp_path):
    path = write_drive(tmp_path / "drive", instructions={})
    with pytest.raises(InstructionError, match="give one with --instruction"):
        run(path)
    assert run(path, instruction="go").drops == {}


def test_wrong_types_of_instruction_and_command_are_told(tmp_path):
    with BagReader(write_drive(tmp_path / "right", stamps(3))) as right, BagWriter(tmp_path / "wrong") as bag:
        bag.add_topic("/instruction", TWIST)
        bag.add_topic("/cmd_vel", STRING)
        bag.add_topic("/image_raw", IMAGE)
        for topic, time_ns, data in right.messages(("/image_raw",)):
            bag.write(topic, time_ns, data)
    with pytest.raises(BagError, match="/instruction of type geometry_msgs/msg/Twist"):
        run(tmp_path / "wrong")
    result = run(tmp_path / "wrong", instruction="go")
    assert result.comparison is None
    assert any("/cmd_vel is of type std_msgs/msg/String" in note for note in result.notes)


def test_a_cut_bag_is_replayed_up_to_there_and_says_so(tmp_path):
    path = write_drive(tmp_path / "drive", stamps(300))
    file = storage_file(path)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * 0.7)])
    result = run(path)
    assert 0 < len(result.frames) < 300
    assert "cut off" in result.notes[0]


# ---- steps, images, JSON ---------------------------------------------------------------------------------------------


def test_the_steps_of_one_replay_give_the_same_actions_in_another(tmp_path):
    path = write_drive(tmp_path / "drive", stamps(40), instructions={0: "left", 11: "right"})
    due = run(path, pace=DUE)
    (tmp_path / "due.json").write_text(result_json(due))
    again = run(path, pace=STEPS_FILE, steps=read_steps(tmp_path / "due.json"))
    assert [frame.action for frame in again.frames] == [frame.action for frame in due.frames]
    assert [bool(frame.reset) for frame in again.frames] == [bool(frame.reset) for frame in due.frames]


def test_steps_of_another_bag_are_refused(tmp_path):
    path = write_drive(tmp_path / "drive")
    with pytest.raises(BagError, match=r"step 0 of 1 has the stamp 3\.5"):
        run(path, pace=STEPS_FILE, steps=(Step(3.5, True, "go"),))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "can't be read as JSON"),
        ("[]", "contains no steps"),
        ('{"steps": [{}]}', "contains no steps"),
        ('{"steps": []}', "contains an empty list of steps"),
    ],
)
def test_a_steps_file_that_is_none_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "steps.json").write_text(text)
    with pytest.raises(BagError, match=sentence):
        read_steps(tmp_path / "steps.json")


@pytest.mark.parametrize("kind", [IMAGE, COMPRESSED_IMAGE])
def test_the_frames_can_be_had_again_as_jpeg(tmp_path, kind):
    result = run(write_drive(tmp_path / "drive", stamps(6), kind=kind))
    frames = list(result.frames_jpeg(max_width=32, indices=(1, 4)))
    assert [index for index, _ in frames] == [1, 4]
    for _, jpeg in frames:
        assert cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).shape == (24, 32, 3)
    assert [index for index, _ in result.frames_jpeg(max_width=1000)] == list(range(6))


def test_the_json_says_one_action_per_frame(tmp_path):
    content = json.loads(result_json(run(write_drive(tmp_path / "drive"), pace=DUE)))
    assert len(content["actions"]) == len(content["stamps_s"]) == 20
    assert [action is not None for action in content["actions"]].count(True) == len(content["steps"]) == 4


# ---- the command line ------------------------------------------------------------------------------------------------


def timeless(path: Path) -> str:
    content = json.loads(path.read_text())
    del content["timing"]
    return json.dumps(content)


def test_replay_twice_gives_the_same_bytes(tmp_path, tiny_checkpoint, capsys):
    path = write_drive(tmp_path / "drive")
    for name in ("a.json", "b.json"):
        assert (
            cli.main(["replay", str(path), "--checkpoint", str(tiny_checkpoint), "--json", str(tmp_path / name)]) == 0
        )
    assert timeless(tmp_path / "a.json") == timeless(tmp_path / "b.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert all(math.isfinite(value) for action in content["actions"] for value in action)
    assert content["timing"]["overhead_ms"]["p50"] > 0.0
    assert "outside the policy" in capsys.readouterr().out


def test_replay_is_what_infer_does_over_the_same_frames(tmp_path, tiny_checkpoint):
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(5):
        cv2.imwrite(str(frames / f"{index}.png"), picture(index)[..., ::-1])
    text = "go to the cup"
    shared = ["--checkpoint", str(tiny_checkpoint), "--instruction", text]
    assert cli.main(["infer", *shared, "--frames", str(frames), "--json", str(tmp_path / "infer.json")]) == 0
    path = write_drive(tmp_path / "drive", stamps(5))
    assert cli.main(["replay", str(path), *shared, "--json", str(tmp_path / "replay.json")]) == 0
    infer, replayed = (json.loads((tmp_path / name).read_text()) for name in ("infer.json", "replay.json"))
    assert replayed["actions"] == infer["actions"]


def test_the_out_bag_holds_the_drive_and_the_predicted_commands(tmp_path, tiny_checkpoint):
    path = write_drive(tmp_path / "drive", stamps(12))
    out, report = tmp_path / "out", tmp_path / "replay.json"
    options = ["--checkpoint", str(tiny_checkpoint), "--out-bag", str(out), "--json", str(report)]
    assert cli.main(["replay", str(path), *options]) == 0
    with BagReader(out) as bag:
        counts = {name: topic.count for name, topic in bag.topics.items()}
        predicted = [bag.decode(message) for message in bag.messages(("/replay/cmd_vel",))]
    assert counts.items() >= {"/image_raw": 12, "/cmd_vel": 12, "/instruction": 1, "/replay/cmd_vel": 12}.items()
    content = json.loads(report.read_text())
    assert [p.twist.angular.z for p in predicted] == [command[2] for command in content["commands"]]
    first = predicted[0].header.stamp
    assert first.sec + first.nanosec * 1e-9 == content["stamps_s"][0]


def test_two_engines_side_by_side(tmp_path, tiny_checkpoint, capsys):
    path = write_drive(tmp_path / "drive", stamps(12))
    arguments = ["--checkpoint", str(tiny_checkpoint), "--against", str(tiny_checkpoint), "--json", str(tmp_path / "j")]
    assert cli.main(["replay", str(path), *arguments, "--against-dtype", "bfloat16"]) == 0
    content = json.loads((tmp_path / "j").read_text())
    assert content["against"]["policy"]["dtype"] == "bfloat16"
    assert 0.0 < content["against"]["difference"]["max"]["linear.x"] < 0.2
    assert "bfloat16" in capsys.readouterr().out


def test_a_faulty_call_leaves_nothing_behind(tmp_path, tiny_checkpoint, capsys):
    path = write_drive(tmp_path / "drive", instructions={})
    outputs = ["--out-bag", str(tmp_path / "out"), "--json", str(tmp_path / "j")]
    assert cli.main(["replay", str(path), "--checkpoint", str(tiny_checkpoint), *outputs]) == 2
    assert "--instruction" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["drive"]


def test_ctrl_c_leaves_nothing_behind(tmp_path, tiny_checkpoint):
    path = write_drive(tmp_path / "drive", stamps(3000))
    outputs = ["--out-bag", str(tmp_path / "out"), "--json", str(tmp_path / "j")]
    arguments = ["replay", str(path), "--checkpoint", str(tiny_checkpoint), *outputs]
    process = subprocess.Popen([sys.executable, "-m", "mobile_vla_inference", *arguments], stderr=subprocess.PIPE)
    while process.poll() is None and not any(file.stat().st_size for file in tmp_path.glob(".out.*/out/*.mcap")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert b"Traceback" not in error
    assert [file.name for file in tmp_path.iterdir()] == ["drive"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--checkpoint", "missing"], "missing does not exist"),
        (["--instruction", "  "], "--instruction is empty"),
        (["--json", "nowhere/file"], "is not a folder"),
        (["--json", "."], "is a folder"),
        (["--json", "drive/drive.mcap"], "drive/drive.mcap would overwrite the input"),
        (["--json", "/proc/file"], "can't be written"),
        (["--against-dtype", "float16"], "without --against"),
        (["--node", "--out-bag", "out"], "writes no bag"),
        (["--steps", "missing.json"], "missing.json does not exist"),
    ],
)
def test_faulty_arguments_are_one_sentence(tmp_path, monkeypatch, tiny_checkpoint, arguments, sentence, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_drive(tmp_path / "drive", stamps(2))
    assert cli.main(["replay", str(path), "--checkpoint", str(tiny_checkpoint), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_the_report_is_written_from_the_result(tmp_path, monkeypatch, tiny_checkpoint):
    written = []
    module = SimpleNamespace(write_report=lambda *arguments: written.append(arguments))
    monkeypatch.setitem(sys.modules, "mobile_vla_inference.replay.report.page", module)
    path = write_drive(tmp_path / "drive", stamps(3))
    report = tmp_path / "report.html"
    assert cli.main(["replay", str(path), "--checkpoint", str(tiny_checkpoint), "--report", str(report)]) == 0
    ((result, where, against, more),) = written
    assert (len(result.frames), where, against, more) == (3, report, None, [])


def test_a_real_drive_is_replayed_and_compared(tmp_path, tiny_checkpoint, track_drive_dir):
    out = tmp_path / "drive"
    assert cli.main(["make-bag", str(track_drive_dir), str(out), "--compressed"]) == 0
    arguments = ["--checkpoint", str(tiny_checkpoint), "--max-frames", "60", "--json", str(tmp_path / "j")]
    assert cli.main(["replay", str(out), *arguments]) == 0
    content = json.loads((tmp_path / "j").read_text())
    first_line = (track_drive_dir / "actions.csv").read_text().splitlines()[1].split(",")
    assert content["recorded"][0] == [float(first_line[4]), 0.0, -float(first_line[3])]
    assert content["comparison"]["frames"] == 60


def test_the_real_nodes_steps_give_the_same_actions_offline(tmp_path, tiny_checkpoint):
    """The bag goes through vla_node in real time; offline, the same steps give bit for bit the same actions."""
    pytest.importorskip("rclpy")
    path = write_drive(tmp_path / "drive", stamps(40), instructions={0: "go left", 15: "go right"})
    arguments = ["replay", str(path), "--checkpoint", str(tiny_checkpoint)]
    # In a process of its own, because it changes the environment to use a private ROS graph.
    played = subprocess.run(
        [sys.executable, "-m", "mobile_vla_inference", *arguments, "--node", "--json", str(tmp_path / "node.json")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert played.returncode == 0, played.stderr
    node = json.loads((tmp_path / "node.json").read_text())
    assert node["pace"] == "node"
    assert len(node["steps"]) >= 2
    assert node["steps"][0]["reset"]
    assert [step["instruction"] for step in node["steps"]][-1] == "go right"
    assert cli.main([*arguments, "--steps", str(tmp_path / "node.json"), "--json", str(tmp_path / "offline.json")]) == 0
    offline = json.loads((tmp_path / "offline.json").read_text())
    assert offline["actions"] == node["actions"]
    assert offline["steps"] == node["steps"]
