"""Episodes: files, figures, calibration by the stored error, and conversion to bags and back."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from bag_files import write_drive
from hypothesis import given
from hypothesis import strategies as st

from mobile_vla_inference.action import training_values
from mobile_vla_inference.bags.reader import BagReader
from mobile_vla_inference.episodes.episode import EpisodeError
from mobile_vla_inference.episodes.evaluation import predict
from mobile_vla_inference.episodes.figures import Prediction, confusion, direction_name, directions, figures
from mobile_vla_inference.episodes.find import find_episodes
from mobile_vla_inference.episodes.hdf5.writer import EpisodeWriter
from mobile_vla_inference.episodes.scenario_instructions import NO_SCENARIO, SCENARIO_INSTRUCTIONS
from mobile_vla_inference.policy.storage.settings_file import load_settings, save_settings, settings_path
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.tools import cli

AXES = ("linear.x", "angular.z")


def picture(index: int) -> np.ndarray:
    """Return coarse colour patches, uint8 RGB, wider than high."""
    patches = np.random.default_rng(index).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return patches.repeat(16, axis=0).repeat(16, axis=1)


def write_episode(path: Path, steps: int = 5, seed: int = 0, actions: np.ndarray | None = None) -> Path:
    """Write an episode as the original project did: everything at the root, the scenario in the name only."""
    keys = np.random.default_rng(seed).integers(-1, 2, (steps, 3)) * 1.15
    with h5py.File(path, "w") as file:
        file["images"] = np.stack([picture(100 * seed + index) for index in range(steps)])
        file["actions"] = (keys if actions is None else actions).astype(np.float32)
        file.create_dataset("action_event_types", data=[b"start_action"] * steps)
        file.attrs["episode_name"] = path.stem
        file.attrs["num_frames"] = steps
        file.attrs["total_duration"] = 18.87
    return path


@pytest.fixture
def episodes_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "episodes"
    folder.mkdir()
    write_episode(folder / "episode_20250808_123136_1box_vert_left.h5", seed=1)
    write_episode(folder / "episode_20250808_123200_2box_hori_right.h5", seed=2)
    return folder


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_original_format_is_read(episodes_dir):
    first, second = find_episodes(episodes_dir)
    assert (first.scenario, second.scenario) == ("1box_vert_left", "2box_hori_right")
    assert first.instruction == "박스를 왼쪽으로 돌아서 컵까지 가세요"
    assert (first.size_px, first.duration_s, first.events[0]) == ((64, 48), 18.87, "start_action")
    assert first.commands.shape == (5, 3)
    assert [np.array_equal(frame, picture(100 + index)) for index, frame in enumerate(first.frames())] == [True] * 5


def test_channels_are_turned_where_the_files_are_bgr(episodes_dir):
    episode = find_episodes(episodes_dir, channel_order="bgr")[0]
    assert np.array_equal(next(episode.frames()), picture(100)[..., ::-1])


def test_groups_of_one_file_are_episodes_with_their_own_instructions(tmp_path):
    with h5py.File(tmp_path / "all.h5", "w") as file:
        for name in ("b", "a"):
            group = file.create_group(name)
            group["images"] = np.zeros((2, 4, 6, 3), np.uint8)
            group["actions"] = np.zeros((2, 3), np.float32)
            group.attrs["instruction"] = f"go to {name}"
    episodes = find_episodes(tmp_path / "all.h5")
    assert [(each.name, each.instruction, each.scenario) for each in episodes] == [
        ("a", "go to a", NO_SCENARIO),
        ("b", "go to b", NO_SCENARIO),
    ]


def test_the_command_line_replaces_the_recorded_instruction(episodes_dir):
    assert find_episodes(episodes_dir, instruction="go  home")[1].instruction == "go home"
    mapped = find_episodes(episodes_dir, instructions={"1box_vert_left": "left"})
    assert [each.instruction for each in mapped] == ["left", SCENARIO_INSTRUCTIONS["2box_hori_right"]]


def _bad(path: Path, **datasets: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.write_bytes(b"no HDF5"), "can't be read as HDF5"),
        (lambda path: _bad(path), "is empty"),
        (lambda path: _bad(path, actions=np.zeros((2, 3))), "lacks the data set images"),
        (lambda path: _bad(path, images=np.zeros((2, 4, 4, 3), np.uint8)), "lacks the data set actions"),
        (lambda path: _bad(path, images=np.zeros((2, 4, 4, 3)), actions=np.zeros((2, 3))), "has images float64"),
        (lambda path: _bad(path, images=np.zeros((2, 4, 4, 3), np.uint8), actions=np.zeros((3, 3))), r"\[3, 3\]"),
        (
            lambda path: _bad(path, images=np.zeros((1, 4, 4, 3), np.uint8), actions=np.full((1, 3), np.nan)),
            "NaN or Inf",
        ),
    ],
)
def test_a_file_that_is_not_an_episode_is_one_sentence(tmp_path, make, sentence):
    make(tmp_path / "bad.h5")
    with pytest.raises(EpisodeError, match=sentence):
        find_episodes(tmp_path / "bad.h5")


def test_nothing_to_read_is_one_sentence(tmp_path, tiny_checkpoint, capsys):
    with pytest.raises(EpisodeError, match="is an empty folder"):
        find_episodes(tmp_path)
    with pytest.raises(EpisodeError, match="does not exist"):
        find_episodes(tmp_path / "nowhere")
    write_episode(tmp_path / "plain.h5")
    assert cli.main(["evaluate", str(tmp_path), "--checkpoint", str(tiny_checkpoint)]) == 2
    assert "give --instruction" in capsys.readouterr().err


def test_an_episode_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new.h5"

    def interrupted() -> None:
        with EpisodeWriter(path, (64, 48), instruction="go") as episode:
            episode.add(0.0, picture(0), (1.0, 0.0, 0.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_errors_are_given_in_both_units_with_those_of_the_baselines():
    recorded = np.array([[1.15, 0.0], [1.15, -1.15], [0.0, 1.15]])
    drives = [Prediction("a", recorded + 0.1, recorded), Prediction("b", recorded - 0.3, recorded)]
    result = figures(drives, AXES, (2.0, 2.0), (0.0, 0.0))
    total = result["all"]
    assert (total["episodes"], total["steps"]) == (2, 6)
    assert total["command_units"]["policy"]["all"]["mae"] == pytest.approx(0.2)
    assert total["normalised_units"]["policy"]["all"]["mae"] == pytest.approx(0.1)
    assert total["command_units"]["zero"]["linear.x"]["mae"] == pytest.approx(2.3 / 3)
    # Each episode's first step follows standstill, not the end of the episode before.
    assert total["command_units"]["previous"]["linear.x"]["mae"] == pytest.approx(2 * 1.15 / 3)
    assert result["scenarios"]["b"]["command_units"]["policy"]["angular.z"]["mae"] == pytest.approx(0.3)


def test_directions_are_the_nearest_keys():
    said = directions(np.array([[0.5, -0.7], [0.6, 9.0]]), 1.15)
    assert said.tolist() == [[0, -1], [1, 1]]
    assert [direction_name(row, AXES) for row in said] == ["turn right", "forward + turn left"]
    assert direction_name((0, 0), AXES) == "stop"


@given(st.lists(st.tuples(*[st.integers(-1, 1)] * 4), min_size=1, max_size=30))
def test_the_confusion_table_counts_every_step_once(rows):
    keys = np.array(rows)
    said, meant = keys[:, :2], keys[:, 2:]
    counts = confusion(said, meant, AXES)
    assert sum(sum(row.values()) for row in counts.values()) == len(rows)
    right = sum(counts[name][name] for name in counts)
    assert right == int((said == meant).all(axis=1).sum())


def test_training_clipped_and_scaled():
    assert training_values(np.array([[3.0, -1.15]]), (2.0, 2.3), (0.0, 0.0)).tolist() == [[1.0, -0.5]]


# ---- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_writes_the_errors_of_the_policys_actions(episodes_dir, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "figures.json"
    arguments = [str(episodes_dir), "--checkpoint", str(tiny_checkpoint), "--json", str(out), "--device", "cpu"]
    assert cli.main(["evaluate", *arguments]) == 0
    content = json.loads(out.read_text())
    policy = VlaPolicy.load(tiny_checkpoint)
    expected = []
    for episode in find_episodes(episodes_dir):
        policy.set_instruction(episode.instruction)
        policy.reset()
        said = np.array([policy.step(frame).values for frame in episode.frames()])
        expected.append(np.abs(said - episode.commands[:, [0, 2]] / 2.0))
    assert content["all"]["normalised_units"]["policy"]["all"]["mae"] == pytest.approx(np.concatenate(expected).mean())
    assert set(content["scenarios"]) == {"1box_vert_left", "2box_hori_right"}
    printed = capsys.readouterr()
    assert "MAE, normalised units" in printed.out
    assert "MAE, command units" in printed.out
    assert "along linear.y" in printed.err


# ---- calibrate -------------------------------------------------------------------------------------------------------

TRUE = {"kosmos_pooling": "last", "head_activation": "tanh", "channel_order": "bgr", "clip_text_feature": "normalized"}


@pytest.fixture
def puzzle(tmp_path, tiny_checkpoint) -> tuple[Path, Path]:
    """Return a checkpoint that assumes some settings, and episodes whose error by the true ones it stores."""
    checkpoint = tmp_path / "policy.pth"
    shutil.copytree(tiny_checkpoint.with_suffix(".processors"), checkpoint.with_suffix(".processors"))
    shutil.copy(tiny_checkpoint, checkpoint)
    confirmed = load_settings(tiny_checkpoint).settings
    save_settings(checkpoint, replace(confirmed, **TRUE))
    folder = tmp_path / "episodes"
    folder.mkdir()
    for seed, scenario in enumerate(("1box_vert_left", "2box_vert_right")):
        write_episode(folder / f"episode_{scenario}.h5", steps=6, seed=seed)
    policy = VlaPolicy.load(checkpoint)
    predictions = predict(policy, find_episodes(folder))
    stored = figures(predictions, policy.settings.action_axes, (2.0, 2.0), (0.0, 0.0))["all"]
    content = torch.load(checkpoint, weights_only=False)
    content["val_mae"] = stored["normalised_units"]["policy"]["all"]["mae"]
    torch.save(content, checkpoint)
    save_settings(checkpoint, replace(confirmed, assumed=tuple(sorted(TRUE))))
    return checkpoint, folder


def calibrate(checkpoint: Path, folder: Path, *more: str) -> int:
    return cli.main(["evaluate", str(folder), "--checkpoint", str(checkpoint), "--calibrate", "--device", "cpu", *more])


def test_calibrate_finds_the_settings_and_confirms_them_only_when_asked(puzzle, tmp_path, capsys):
    checkpoint, folder = puzzle
    assert calibrate(checkpoint, folder, "--json", str(tmp_path / "trials.json")) == 0
    found = load_settings(checkpoint).settings
    assert {name: getattr(found, name) for name in TRUE} == TRUE
    assert found.assumed == tuple(sorted(TRUE))
    content = json.loads((tmp_path / "trials.json").read_text())
    distances = [trial["distance"] for trial in content["trials"]]
    assert distances == sorted(distances)
    assert distances[0] < 1e-6 < distances[1]
    assert len(distances) == 3 * 3 * 2 * 2  # pooled text is as wide as nothing that fits
    assert "confirmed by this run: nothing" in capsys.readouterr().out
    assert calibrate(checkpoint, folder, "--confirm") == 0
    assert not load_settings(checkpoint).settings.assumed


def test_an_error_that_chance_could_give_confirms_nothing(puzzle, capsys):
    checkpoint, folder = puzzle
    before = settings_path(checkpoint).read_bytes()
    assert calibrate(checkpoint, folder, "--confirm", "--val-mae", "0.4321") == 2
    assert "by chance" in capsys.readouterr().err
    assert settings_path(checkpoint).read_bytes() == before


def test_a_person_can_choose_a_candidate(puzzle):
    checkpoint, folder = puzzle
    assert calibrate(checkpoint, folder, "--confirm", "2") == 0
    chosen = load_settings(checkpoint).settings
    assert not chosen.assumed
    assert {name: getattr(chosen, name) for name in TRUE} != TRUE


def test_the_joined_features_and_their_order_are_found(puzzle):
    checkpoint, folder = puzzle
    true = replace(load_settings(checkpoint).settings, **TRUE)
    assumed = ("action_axes", "action_scale", "fusion_features", "head_tanh", "image_normalization")
    save_settings(checkpoint, replace(true, fusion_features=None, assumed=assumed))
    assert calibrate(checkpoint, folder) == 0
    found = load_settings(checkpoint).settings
    assert found.fusion_features == ("kosmos_text", "clip_text")
    assert replace(found, head_tanh=None, assumed=()) == replace(true, assumed=())


def test_calibrate_needs_an_error_and_something_to_find(puzzle, capsys):
    checkpoint, folder = puzzle
    assert cli.main(["evaluate", str(folder), "--checkpoint", str(checkpoint), "--confirm"]) == 2
    save_settings(checkpoint, replace(load_settings(checkpoint).settings, assumed=()))
    assert calibrate(checkpoint, folder) == 2
    assert "no assumed setting" in capsys.readouterr().err


# ---- bags ------------------------------------------------------------------------------------------------------------


def test_to_bags_and_back(episodes_dir, tmp_path):
    assert cli.main(["episodes-to-bag", str(episodes_dir), str(tmp_path / "bags"), "--raw", "--period", "0.3"]) == 0
    bag = tmp_path / "bags" / "episode_20250808_123136_1box_vert_left"
    with BagReader(bag) as reader:
        assert {topic.name: topic.count for topic in reader.topics.values()} == {
            "/instruction": 1,
            "/cmd_vel": 5,
            "/image_raw": 5,
        }
    arguments = [str(bag), str(tmp_path / "again"), "--scenario", "1box_vert_left"]
    assert cli.main(["bag-to-episodes", *arguments]) == 0
    before, after = find_episodes(episodes_dir)[0], find_episodes(tmp_path / "again")[0]
    assert (after.instruction, after.scenario) == (before.instruction, before.scenario)
    assert np.array_equal(after.commands, before.commands)
    assert all(np.array_equal(*frames) for frames in zip(after.frames(), before.frames()))
    assert len(list(after.frames())) == 5


def test_a_drive_is_thinned_to_the_period_and_split_at_each_new_instruction(tmp_path):
    bag = write_drive(tmp_path / "drive", instructions={0: "left", 12: "right"})
    assert cli.main(["bag-to-episodes", str(bag), str(tmp_path / "out")]) == 0
    episodes = find_episodes(tmp_path / "out")
    assert [(each.instruction, len(each.commands)) for each in episodes] == [("left", 2), ("right", 2)]
    assert episodes[0].commands[1] == pytest.approx([0.6, 0.0, -0.06])


def stamped(path: Path, commands: np.ndarray, stamps_s: np.ndarray | None, duration_s: float | None = None) -> Path:
    """Write an episode with stamps, with a duration, or without either."""
    with h5py.File(path, "w") as file:
        file["images"] = np.stack([picture(index) for index in range(len(commands))])
        file["actions"] = commands.astype(np.float32)
        file.attrs["instruction"] = "go"
        if stamps_s is not None:
            file["stamps_s"] = stamps_s
        if duration_s is not None:
            file.attrs["total_duration"] = duration_s
    return path


@pytest.mark.parametrize(
    ("stamps_s", "duration_s", "more", "expected_s"),
    [
        ([5.0, 5.05, 5.1, 5.2], None, [], [0.0, 0.05, 0.1, 0.2]),
        (None, 1.5, [], [0.0, 0.5, 1.0, 1.5]),
        ([5.0, 5.05, 5.1, 5.2], None, ["--period", "0.3"], [0.0, 0.3, 0.6, 0.9]),
        (None, None, ["--period", "0.3"], [0.0, 0.3, 0.6, 0.9]),
    ],
)
def test_a_bag_has_the_times_of_its_episode(tmp_path, stamps_s, duration_s, more, expected_s):
    stamped(tmp_path / "one.h5", np.ones((4, 3)), stamps_s and np.array(stamps_s), duration_s)
    assert cli.main(["episodes-to-bag", str(tmp_path / "one.h5"), str(tmp_path / "bags"), "--raw", *more]) == 0
    with BagReader(tmp_path / "bags" / "one") as reader:
        times_ns = [message.time_ns for message in reader.messages(("/image_raw",))]
    assert [(time_ns - times_ns[0]) * 1e-9 for time_ns in times_ns] == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("stamps_s", "message"),
    [
        (None, "contains neither stamps_s nor total_duration"),
        (np.array([0.0, 0.1, 0.1]), "expected stamps that increase"),
        (np.array([0.0, 0.1]), r"stamps_s float64 \[2\], expected \[3\]"),
        (np.array([b"a", b"b", b"c"]), "expected \\[3\\] numbers"),
        (np.array([0.0, 0.1, np.inf]), "NaN or Inf"),
    ],
)
def test_impossible_times_are_one_sentence(tmp_path, capsys, stamps_s, message):
    stamped(tmp_path / "one.h5", np.ones((3, 3)), stamps_s)
    assert cli.main(["episodes-to-bag", str(tmp_path / "one.h5"), str(tmp_path / "bags")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "bags").exists()


def test_evaluate_warns_if_period_scale_or_keys_differ_from_the_policys(tmp_path, tiny_checkpoint, capsys):
    commands = np.tile([2.5, 0.0, 0.4], (4, 1))
    stamped(tmp_path / "fast.h5", commands, np.arange(4) * 0.05)
    stamped(tmp_path / "silent.h5", commands, None)
    arguments = [str(tmp_path), "--checkpoint", str(tiny_checkpoint), "--device", "cpu"]
    assert cli.main(["evaluate", *arguments, "--json", str(tmp_path / "out.json")]) == 0
    notes = " ".join(json.loads((tmp_path / "out.json").read_text())["notes"])
    assert "1 of 2 episodes have another step period" in notes
    assert "0.05 s) than the policy, 0.3 s: its LSTM runs at another rate" in notes
    assert "1 of 2 episodes contain neither stamps_s nor total_duration" in notes
    assert "100.0% of the recorded linear.x is beyond the 2" in notes
    assert "give --key-speed" in notes
    assert "give --key-speed" in capsys.readouterr().err


def test_evaluate_warns_of_nothing_if_everything_agrees(tmp_path, tiny_checkpoint, capsys):
    stamped(tmp_path / "good.h5", np.tile([1.15, 0.0, -1.15], (4, 1)), np.arange(4) * 0.3)
    assert cli.main(["evaluate", str(tmp_path), "--checkpoint", str(tiny_checkpoint), "--device", "cpu"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_bag_to_episodes_prints_what_it_leaves_out(tmp_path, capsys):
    bag = write_drive(tmp_path / "drive", instructions={5: "left"})
    assert cli.main(["bag-to-episodes", str(bag), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "every 0.3 s (--period)" in printed.out
    assert "5 without an instruction" in printed.out
    assert "12 between the steps" in printed.out
    assert printed.err == ""
    assert cli.main(["bag-to-episodes", str(bag), str(tmp_path / "fast"), "--period", "0.01"]) == 0
    assert "the steps are 0.05 s apart, not the 0.01 s of --period" in capsys.readouterr().err


def test_a_bag_without_commands_is_one_sentence(tmp_path, capsys):
    bag = write_drive(tmp_path / "drive", commands=False)
    assert cli.main(["bag-to-episodes", str(bag), str(tmp_path / "out")]) == 2
    assert "no recorded velocity" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["episodes-to-bag", "evaluate"])
def test_ctrl_c_leaves_nothing_half_written(tool, episodes_dir, tiny_checkpoint, tmp_path):
    """The signal comes while the episodes are read: the first frame is there, the others never come."""
    out = tmp_path / "out"
    code = (
        "import sys, os, signal\n"
        "from mobile_vla_inference.episodes.hdf5.reader import Hdf5Episode\n"
        "frames = Hdf5Episode.frames\n"
        "def interrupted(self):\n"
        "    yield next(frames(self))\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    signal.sigtimedwait([], 10)\n"
        "Hdf5Episode.frames = interrupted\n"
        "from mobile_vla_inference.tools.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    more = [str(out)] if tool == "episodes-to-bag" else ["--checkpoint", str(tiny_checkpoint), "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", code, tool, str(episodes_dir), *more], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists() or list(out.iterdir()) == []
