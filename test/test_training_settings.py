"""Settings that training takes from the episodes: step period, scale, axes, which steps; and their contradictions."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mobile_vla_inference.policy.storage.settings_file import load_settings, save_settings
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.tools import arguments, cli
from mobile_vla_inference.training.dataset import read_training_episodes
from mobile_vla_inference.training.trainer import (
    Store,
)


def recording(path: Path, commands: np.ndarray, period_s: float | None = 0.05, duration_s: float | None = None) -> Path:
    """Write an episode with the commands [steps, 3] and even stamps, with a duration only, or without both."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 256, (len(commands), 8, 8, 3), dtype=np.uint8)
        file["actions"] = commands.astype(np.float32)
        file.attrs["instruction"] = "go"
        if period_s is not None:
            file["stamps_s"] = 100.0 + np.arange(len(commands)) * period_s
        if duration_s is not None:
            file.attrs["total_duration"] = duration_s
    return path


def driven(steps: int = 20, x: float = 0.4, y: float = 0.0, z: float = 0.8) -> np.ndarray:
    """Return commands up to the given speeds, in both directions for y and z."""
    share = np.linspace(-1.0, 1.0, steps)
    return np.stack([np.abs(share) * x, share * y, share * z], axis=1)


def train(source: Path, out: Path, *more: str) -> int:
    return cli.main(["train", str(source), "--out", str(out), "--batch", "1", "--updates", "1", "--window", "8", *more])


@pytest.fixture
def two(tmp_path) -> Path:
    """Write two episodes at 20 Hz, up to 0.4 m/s and 0.8 rad/s."""
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a.h5", "b.h5"):
        recording(folder / name, driven())
    return folder


SMALL_POLICY = str(arguments.SMALL_POLICY)


def test_period_and_scale_come_from_the_episodes_and_are_reported(two, tmp_path, capsys):
    out = tmp_path / "x.pth"
    assert train(two, out) == 0
    settings = load_settings(out).settings
    assert (settings.step_period_s, settings.action_scale, not settings.assumed) == (0.05, (0.4, 0.8), True)
    shown = capsys.readouterr().out
    assert "step period: 0.05 s, from the stamps of 2 episodes" in shown
    assert "action scale: linear.x 0.4 m/s, angular.z 0.8 rad/s" in shown
    assert shown.count("0.0% of 40 samples clipped") == 2


def test_a_duration_gives_the_period_where_there_are_no_stamps(tmp_path):
    for name in ("a.h5", "b.h5"):
        recording(tmp_path / name, driven(31), None, 3.0)
    assert train(tmp_path, tmp_path / "x.pth") == 0
    assert load_settings(tmp_path / "x.pth").settings.step_period_s == 0.1


def test_without_stamps_and_duration_the_option_is_required_and_used(tmp_path, capsys):
    for name in ("a.h5", "b.h5"):
        recording(tmp_path / name, driven(), None)
    out = tmp_path / "x.pth"
    assert train(tmp_path, out) == 2
    assert "give --step-period-s" in capsys.readouterr().err
    assert not out.exists()
    assert train(tmp_path, out, "--step-period-s", "0.25") == 0
    assert load_settings(out).settings.step_period_s == 0.25


def test_a_start_that_was_trained_at_another_period_needs_the_option(two, tmp_path, capsys):
    out = tmp_path / "x.pth"
    assert train(two, out, "--init", SMALL_POLICY) == 2
    error = capsys.readouterr().err
    assert "was trained with 0.3 s per step" in error
    assert "bag-to-episodes --period 0.3" in error
    assert "give --step-period-s 0.05" in error
    assert train(two, out, "--init", SMALL_POLICY, "--step-period-s", "0.05") == 0
    settings = load_settings(out).settings
    assert (settings.step_period_s, settings.action_scale) == (
        0.05,
        (0.5, 1.2),
    )  # the head's own scale: no sample is beyond it
    assert "small_policy had 0.3 s" in capsys.readouterr().out


def test_a_start_of_the_same_period_keeps_it_to_the_digit(tmp_path):
    for name in ("a.h5", "b.h5"):
        recording(tmp_path / name, driven(), 0.303)
    assert train(tmp_path, tmp_path / "x.pth", "--init", SMALL_POLICY) == 0
    assert load_settings(tmp_path / "x.pth").settings.step_period_s == 0.3


def test_assumed_settings_of_a_start_contradict_nothing_and_are_confirmed_afterwards(two, tmp_path, tiny_checkpoint):
    start = tmp_path / "start.pth"
    shutil.copy(tiny_checkpoint, start)
    shutil.copytree(tiny_checkpoint.with_suffix(".processors"), start.with_suffix(".processors"))
    confirmed = load_settings(tiny_checkpoint).settings
    save_settings(start, replace(confirmed, assumed=("action_scale", "prompt", "step_period_s")))
    out = tmp_path / "out" / "x.pth"
    out.parent.mkdir()
    assert train(two, out, "--init", str(start)) == 0
    settings = load_settings(out).settings
    assert (settings.step_period_s, settings.assumed) == (0.05, ("prompt",))


@pytest.mark.parametrize(
    ("second", "more", "message"),
    [
        (
            {"period_s": 0.3},
            [],
            "has 0.3 s between steps, .* has 0.05 s|has 0.05 s between steps, .* has 0.3 s",
        ),
        ({}, ["--step-period-s", "0.3"], r"--step-period-s is 0.3, but .* has 0.05 s .* by its stamps"),
        ({"period_s": None, "duration_s": 60.0}, [], "expected the same in all"),
        ({"period_s": None, "duration_s": -1.0}, [], "total_duration is -1 s"),
        ({"period_s": None}, [], "b.h5 has neither stamps_s nor total_duration"),
        ({"period_s": 50.0}, [], "check that its times are in seconds"),
        ({"period_s": -0.05}, [], "expected stamps that increase"),
        ({"period_s": float("nan")}, [], "stamps that are NaN"),
        ({"commands": driven(y=0.3)}, [], r"% of the samples move along linear.y \(up to 0.3 m/s\)"),
        ({"commands": driven(x=400.0)}, [], "linear.x reaches 400 .* at most 10; convert the units"),
        ({"commands": driven(z=57.0)}, [], "angular.z reaches 57 .* at most 20"),
        (
            {},
            ["--action-scale", "0.3,0.8"],
            r"beyond one normalised unit of linear.x, 0.3 m/s .*1.33 times.*--action-scale 0.4,0.8",
        ),
        ({"commands": driven(x=0.6)}, ["--init", SMALL_POLICY, "--step-period-s", "0.05"], "--action-scale 0.6,1.2"),
        ({}, ["--action-axes", "linear.x,angular.z,linear.y", "--init", SMALL_POLICY], "drives linear.x,angular.z"),
        ({}, ["--action-axes", "linear.x,linear.y"], r"% of the samples move along angular.z|linear.y is 0"),
        ({}, ["--max-linear-mps", "2"], "contains m/s and rad/s already"),
        ({}, ["--steps", "0:10"], "given without --validate-steps, .*such as --steps 0:10 --validate-steps 10:20"),
        ({}, ["--validate-steps", "5:9"], "given without --steps, .*such as --steps 0:5 --validate-steps 5:9"),
        (
            {},
            ["--steps", "0:12", "--validate-steps", "10:20"],
            "both contain 10:12.* --steps 0:18 --validate-steps 18:20",
        ),
        (
            {},
            ["--steps", "0:10", "--validate-steps", "10:30"],
            "has 20 steps, expected 30 or more; .* --steps 0:18 --validate-steps 18:20",
        ),
        ({}, ["--action-scale", "1"], "--action-scale has 1 number, expected 2"),
    ],
)
def test_a_contradiction_is_one_sentence_and_leaves_nothing(tmp_path, capsys, second, more, message):
    folder = tmp_path / "episodes"
    folder.mkdir()
    recording(folder / "a.h5", driven())
    recording(folder / "b.h5", **{"commands": driven(), **second})
    out = tmp_path / "out" / "x.pth"
    out.parent.mkdir()
    assert train(folder, out, *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert list(out.parent.iterdir()) == []


def test_few_samples_beyond_the_scale_are_clipped_and_reported_but_more_need_the_option(tmp_path, capsys):
    commands = driven(200)
    commands[7, 0] = 0.45
    for name in ("a.h5", "b.h5"):
        recording(tmp_path / name, commands)
    assert train(tmp_path, tmp_path / "x.pth", "--action-scale", "0.4,0.8") == 0
    assert " to 0.45 in the episodes, 0.5% of 400 samples clipped" in capsys.readouterr().out
    assert train(tmp_path, tmp_path / "y.pth", "--action-scale", "0.2,0.8") == 2
    assert "--max-clipped 0.5 to clip them" in capsys.readouterr().err
    assert train(tmp_path, tmp_path / "y.pth", "--action-scale", "0.2,0.8", "--max-clipped", "0.5") == 0


def test_an_unused_axis_needs_the_option_and_a_constant_one_is_reported(tmp_path, capsys):
    straight = driven(z=0.0)
    straight[:, 0] = 0.3
    for name in ("a.h5", "b.h5"):
        recording(tmp_path / name, straight)
    assert train(tmp_path, tmp_path / "x.pth") == 2
    assert "angular.z is 0 in all 40 samples" in capsys.readouterr().err
    assert train(tmp_path, tmp_path / "x.pth", "--action-scale", "0.3,1") == 0
    warnings = capsys.readouterr().err
    assert "linear.x is 0.3 m/s in every sample" in warnings
    assert "angular.z is 0 in every sample" in warnings


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        (-driven(), "linear.x is never positive"),
        (np.abs(driven()), "only turns left"),
        (driven() * [1, 1, 0] - np.abs(driven()) * [0, 0, 1], "only turns right"),
    ],
)
def test_a_sign_that_can_be_wrong_is_reported(tmp_path, capsys, commands, message):
    for name in ("a.h5", "b.h5"):
        recording(tmp_path / name, commands)
    assert train(tmp_path, tmp_path / "x.pth") == 0
    assert message in capsys.readouterr().err


def test_three_axes_are_learned_and_drive_where_they_are_asked_for(tmp_path, capsys):
    for name in ("a.h5", "b.h5"):
        recording(tmp_path / name, driven(y=0.3))
    out = tmp_path / "x.pth"
    assert train(tmp_path, out, "--action-axes", "linear.x,linear.y,angular.z") == 0
    policy = VlaPolicy.load(out)
    assert policy.settings.action_scale == (0.4, 0.3, 0.8)
    policy.set_instruction("go")
    assert len(policy.step(np.zeros((8, 8, 3), np.uint8)).values) == 3
    assert train(tmp_path, tmp_path / "y.pth", "--action-axes", "linear.x,angular.z") == 0
    assert "move along linear.y, which is left out" in capsys.readouterr().err


def test_what_is_validated_on_is_not_trained_on(monkeypatch, tmp_path):
    for name in ("a.h5", "b.h5", "c.h5"):
        recording(tmp_path / name, driven())
    seen = []
    add = Store.add
    monkeypatch.setattr(Store, "add", lambda self, episodes: (seen.append(episodes), add(self, episodes))[1])
    assert train(tmp_path, tmp_path / "x.pth") == 0
    names = [[Path(episode.where).name for episode in episodes] for episodes in seen]
    assert names == [["a.h5", "b.h5"], ["c.h5"]]


def test_an_instruction_in_place_of_the_recorded_one_is_reported(two, tmp_path, capsys):
    assert train(two, tmp_path / "x.pth", "--instruction", "turn back") == 0
    assert "--instruction replaces the recorded instruction of 2 of 2 episodes" in capsys.readouterr().err


def test_channels_are_turned_where_the_files_are_bgr(two):
    plain, turned = (read_training_episodes(two, 8, channel_order=order)[0].frames for order in ("rgb", "bgr"))
    np.testing.assert_array_equal(turned, plain[..., ::-1])


def frames_folder(folder: Path, lines: list[tuple[float, float, float]]) -> Path:
    """Write a folder with images/ and actions.csv: (stamp_s, steering, throttle) for each frame."""
    cv2 = pytest.importorskip("cv2")
    (folder / "images").mkdir(parents=True)
    rows = ["frame,stamp_s,image,steering,throttle"]
    for index, (stamp_s, steering, throttle) in enumerate(lines):
        cv2.imwrite(str(folder / f"images/{index}.png"), np.full((8, 8, 3), index, np.uint8))
        rows.append(f"{index},{stamp_s},images/{index}.png,{steering},{throttle}")
    (folder / "actions.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_a_frames_folder_gives_its_period_and_full_speed_is_reported(tmp_path, capsys):
    lines = [(0.1 * index, 0.5 - index / 20, 0.6) for index in range(20)]
    folder, out = frames_folder(tmp_path / "drive", lines), tmp_path / "x.pth"
    halves = ["--instruction", "go", "--steps", "0:15", "--validate-steps", "15:20"]
    assert train(folder, out, *halves, "--max-linear-mps", "2", "--max-angular-radps", "3") == 0
    settings = load_settings(out).settings
    assert (settings.step_period_s, settings.action_scale) == (0.1, (1.2, 1.5))
    shown = capsys.readouterr()
    assert "full throttle is 2 m/s, full steering 3 rad/s" in shown.out
    assert "from the stamps of 1 episode, 0 of 19 steps uneven" in shown.out
    assert "linear.x is 1.2 m/s in every sample" in shown.err


@pytest.mark.parametrize(
    ("lines", "text", "message"),
    [
        ([(0.1 * index, 30.0, 0.5) for index in range(20)], "go", "line 2 has steering 30, expected -1 to 1"),
        ([(0.1 * index, 0.3, 0.5) for index in range(20)], " ", "has no instruction"),
        ([(0.1 * index + index // 5, 0.3 - index / 20, 0.5) for index in range(20)], "go", "3 of 19 steps"),
        ([(0.1 * index, 0.3, 0.5) for index in range(60)], "go", "of 60 steps, .* --steps 0:54 --validate-steps 54:60"),
    ],
)
def test_a_wrong_frames_folder_is_refused(tmp_path, capsys, lines, text, message):
    folder = frames_folder(tmp_path / "drive", lines)
    halves = [] if len(lines) == 60 else ["--steps", "0:15", "--validate-steps", "15:20"]
    assert train(folder, tmp_path / "x.pth", "--instruction", text, *halves) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_persons_real_drive_is_neither_slowed_down_nor_clipped(track_drive_dir, tmp_path, capsys):
    out = tmp_path / "track.pth"
    parts = ["--instruction", "follow the track", "--steps", "0:300", "--validate-steps", "300:316"]
    assert train(track_drive_dir, out, *parts) == 0
    settings = load_settings(out).settings
    assert (settings.step_period_s, settings.action_scale, not settings.assumed) == (0.05, (0.78, 0.9), True)
    capsys.readouterr()
    again = [*parts, "--init", SMALL_POLICY, "--step-period-s", "0.05"]
    assert train(track_drive_dir, tmp_path / "y.pth", *again) == 2
    error = capsys.readouterr().err
    assert "beyond one normalised unit of linear.x, 0.5 m/s" in error
    assert not (tmp_path / "y.pth").exists()


def test_the_world_refuses_another_period_and_a_scale_below_the_experts(tmp_path, capsys):
    for more, message in (
        (["--step-period-s", "0.1"], "stepped at the policy's own 0.3 s"),
        (["--action-scale", "0.2,1.2"], "the world's expert drives up to 0.5 m/s"),
    ):
        assert cli.main(["train", "world", "--out", str(tmp_path / "x.pth"), *more]) == 2
        assert message in capsys.readouterr().err


def test_a_resumed_training_has_the_units_that_it_began_with(two, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.pth"
    with monkeypatch.context() as patch:
        patch.setattr("mobile_vla_inference.training.session._finish", interrupt)
        assert train(two, out) == 130
    recording(two / "a.h5", driven(x=0.9))
    assert train(two, out, "--resume") == 2
    assert "the training started with [0.05, 0.4, 0.8]" in capsys.readouterr().err


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
