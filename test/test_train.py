"""Training: batches compute what the policy computes, losses fall, what is interrupted goes on, files are whole."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mobile_vla_inference.bags.step_period import StepPeriod
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.policy.checkpoint import open_checkpoint
from mobile_vla_inference.policy.preprocess import InstructionEncoder
from mobile_vla_inference.policy.storage.checkpoint_files import processor_folders
from mobile_vla_inference.policy.storage.settings_file import load_settings, save_settings
from mobile_vla_inference.policy.synthetic.processors import write_processors
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.sim.scenarios import SCENARIOS, instruction, training_sentences
from mobile_vla_inference.tools import cli
from mobile_vla_inference.training import curriculum as course
from mobile_vla_inference.training.dataset import Lesson, read_lessons, write_lessons
from mobile_vla_inference.training.network import SequenceModel, loaded_model, starting_member, starting_model
from mobile_vla_inference.training.trainer import (
    Recipe,
    Store,
    Trainer,
    baseline_errors,
    mean_absolute_error,
    predicted,
)

SIDE_PX = 56


def made_up_episode(seed: int, steps: int) -> Lesson:
    """A white bar on black: steer towards it, as fast as the instruction says."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((steps, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    places = rng.integers(0, SIDE_PX - 8, steps)
    for frame, place in zip(frames, places):
        frame[:, place : place + 8] = 255
    turn = 1.0 - places / (SIDE_PX - 8) * 2.0
    commands = np.stack([np.full(steps, 0.5 * (seed % 2)), np.zeros(steps), turn], axis=1).astype(np.float32)
    period = StepPeriod(f"made up {seed}", 0.3, steps - 1)
    return Lesson(frames, commands, "go fast" if seed % 2 else "stand still", "", seed, period=period)


@pytest.fixture
def network(tmp_path) -> SequenceModel:
    config, settings = starting_member("world")
    write_processors(tmp_path / "processors", config, training_sentences())
    encoder = InstructionEncoder(processor_folders(tmp_path / "processors", config), config, settings)
    return SequenceModel(starting_model(config, settings, seed=0), encoder)


@pytest.fixture(scope="module")
def episodes_file(tmp_path_factory) -> Path:
    pytest.importorskip("h5py")
    path = tmp_path_factory.mktemp("episodes") / "made_up.h5"
    write_lessons(path, [made_up_episode(seed, 4 + seed % 5) for seed in range(12)])
    return path


# --- episodes ---


def test_episodes_come_back_as_they_were_written(tmp_path):
    pytest.importorskip("h5py")
    sight = np.array([[1.0, np.nan], [0.5, 2.0], [0.0, 0.0]], dtype=np.float32)
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    commands = np.array([[0.5, 0.0, -1.0], [0.0, 0.25, 0.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    written = Lesson(frames, commands, "컵까지 가세요", "1box_vert_left", 7, "success", sight)
    write_lessons(tmp_path / "some.h5", [written, written])
    one, two = read_lessons(tmp_path, 8)
    assert (one.instruction, one.scenario, one.seed, one.outcome) == ("컵까지 가세요", "1box_vert_left", 7, "success")
    np.testing.assert_array_equal(one.frames, frames)
    np.testing.assert_array_equal(two.commands, commands)
    np.testing.assert_array_equal(two.sight, sight)


def test_the_original_layout_tells_the_instruction_by_its_name(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "episode_2box_hori_right_03.h5", "w") as file:
        file["images"] = np.zeros((18, 72, 128, 3), dtype=np.uint8)
        file["actions"] = np.full((18, 3), 1.15, dtype=np.float32)
        file.create_dataset("action_event_types", data=["key"] * 18, dtype=h5py.string_dtype())
    (episode,) = read_lessons(tmp_path, 14)
    assert episode.frames.shape == (18, 14, 14, 3)
    assert "오른쪽" in episode.instruction


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist, .*a folder with images/ and actions.csv, or the word world"),
        (lambda path: path.mkdir(), "is an empty folder"),
        (lambda path: path.write_bytes(b"no HDF5"), "can't be read as HDF5"),
        (lambda path: write_h5(path, images=np.zeros((2, 4, 4, 3), np.uint8)), "lacks .*called actions"),
        (lambda path: write_h5(path, images=np.zeros((2, 4, 4)), actions=np.zeros((2, 3))), "has images float64"),
        (
            lambda path: write_h5(path, images=np.zeros((2, 4, 4, 3), np.uint8), actions=np.full((2, 3), np.nan)),
            "NaN or Inf",
        ),
        (
            lambda path: write_h5(path, images=np.zeros((2, 4, 4, 3), np.uint8), actions=np.zeros((2, 3))),
            "tells no instruction",
        ),
    ],
    ids=["nothing", "empty folder", "no HDF5", "no actions", "wrong images", "NaN", "no instruction"],
)
def test_what_is_no_episode_is_refused_in_a_sentence(tmp_path, make, message):
    pytest.importorskip("h5py")
    path = tmp_path / "data.h5"
    make(path)
    with pytest.raises(MobileVlaError, match=message):
        read_lessons(path, 8)


def write_h5(path: Path, **datasets: np.ndarray) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values


def test_real_frames_are_read_with_steering_to_the_left_positive(track_drive_dir):
    (episode,) = read_lessons(track_drive_dir, 28, "follow the track")
    assert episode.frames.shape == (600, 28, 28, 3)
    np.testing.assert_allclose(episode.commands[0], [0.539126, 0.0, -0.298604], rtol=1e-6)


# --- instructions ---


def test_instructions_of_different_meaning_never_encode_alike_and_none_is_unknown(network):
    sentences = {*training_sentences()} | {
        instruction(name, seed, "unseen") for name in SCENARIOS for seed in range(40)
    }
    encoder = network.texts._encoder
    unknown = encoder._kosmos.unk_token_id
    kosmos, clip = set(), set()
    for sentence in sentences:
        ids = encoder.prompt(sentence).input_ids[0].tolist()
        assert unknown not in ids
        kosmos.add(tuple(ids))
        clip_ids = encoder.clip_ids(sentence)[0].tolist()
        assert clip_ids.count(encoder.clip_eos_token_id) == 1  # also CLIP's unknown token
        clip.add(tuple(clip_ids))
    assert len(kosmos) == len(sentences)
    assert len(clip) == len({sentence.lower() for sentence in sentences})


# --- the network and the loop ---


def test_a_padded_batch_computes_what_each_sequence_computes_alone(network):
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.integers(0, 256, (6, SIDE_PX, SIDE_PX, 3), dtype=np.uint8))
    texts = ["go left", "박스를 오른쪽으로 돌아서 컵까지 가세요 그리고 천천히 멈추세요"]
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    with torch.no_grad():
        together = network.features(frames, network.texts(texts), rows)
        for row, text in enumerate(texts):
            part = frames[rows == row]
            alone = network.features(part, network.texts([text]), torch.zeros(3, dtype=torch.long))
            torch.testing.assert_close(together[rows == row], alone, rtol=1e-4, atol=1e-5)


def test_without_memory_a_step_does_not_depend_on_the_one_before(network):
    store = Store(network.model.settings)
    store.add([made_up_episode(1, 6)])
    shuffled = Store(network.model.settings)
    episode = made_up_episode(1, 6)
    shuffled.add([Lesson(episode.frames[::-1].copy(), episode.commands, episode.instruction)])
    forward, backward = (predicted(network, each, memory=False)[0] for each in (store, shuffled))
    torch.testing.assert_close(forward, backward.flip(0))
    remembered = predicted(network, store, memory=True)[0]
    assert not torch.allclose(remembered[1:], forward[1:])


def trained(network: SequenceModel, updates: int, **recipe) -> Trainer:
    torch.manual_seed(0)
    store = Store(network.model.settings)
    store.add([made_up_episode(seed, 8) for seed in range(16)])
    trainer = Trainer(network, Recipe(updates, 8, learning_rate=3e-3, **recipe))
    trainer.run(store, updates)
    return trainer


def test_training_learns_from_picture_and_instruction(network):
    store = Store(network.model.settings)
    store.add([made_up_episode(seed, 8) for seed in range(100, 110)])
    before = mean_absolute_error(network, store)
    trained(network, 120)
    after = mean_absolute_error(network, store)
    assert after < 0.5 * before
    assert after < 0.5 * baseline_errors(store, store)["mean of training"]


def test_frozen_towers_stay_as_they_are(network):
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    trained(network, 3, frozen_towers=True)
    changed = {name for name, value in network.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(("feature_fusion.", "rnn.", "actions.")) for name in changed)


def test_long_episodes_go_through_in_windows_with_the_state_carried(network):
    store = Store(network.model.settings)
    store.add([made_up_episode(1, 40)])
    trainer = Trainer(network, Recipe(5, 2, window_steps=8))
    trainer.run(store, 5)
    assert trainer.update == len(trainer.losses) == 5
    assert np.isfinite(trainer.losses).all()


def test_a_store_keeps_the_newest():
    _, settings = starting_member("world")
    store = Store(settings, capacity=3)
    store.add([made_up_episode(seed, 2 + seed) for seed in range(5)])
    assert [len(frames) for frames in store.frames] == [4, 5, 6]


def test_baselines():
    _, settings = starting_member("world")
    training, validation = Store(settings), Store(settings)
    episode = made_up_episode(1, 4)
    commands = np.array([[0.5, 0, 0], [0.25, 0, 0], [0.5, 0, 1.2], [0.5, 0, 1.2]], dtype=np.float32)
    for store in (training, validation):
        store.add([Lesson(episode.frames, commands, "go")])
    errors = baseline_errors(training, validation)
    assert errors["zero"] == pytest.approx((0.5 + 3 + 2) / 8)
    assert errors["previous action"] == pytest.approx((0.5 + 0.5 + 1) / 6)


# --- the command ---


def options(out: Path) -> list[str]:
    return ["--out", str(out), "--batch", "2", "--updates", "4", "--seed", "3"]


def test_train_writes_a_checkpoint_that_drives(episodes_file, tmp_path, capsys):
    out = tmp_path / "small.pth"
    assert cli.main(["train", str(episodes_file), *options(out)]) == 0
    shown = capsys.readouterr().out
    assert "previous action" in shown
    content = torch.load(out, weights_only=False)
    assert set(content) == {"epoch", "model_state_dict", "optimizer_state_dict", "val_mae", "args"}
    assert content["args"].seed == 3
    assert open_checkpoint(out).settings.confirmed
    assert (tmp_path / "small.loss.svg").read_text().startswith("<svg")
    assert not (tmp_path / "small.training").exists()
    policy = VlaPolicy.load(out)
    policy.set_instruction("go left")
    episode = made_up_episode(1, 3)
    network = SequenceModel(loaded_model(out), policy._encoder)
    store = Store(policy.settings)
    store.add([Lesson(episode.frames, episode.commands, "go left")])
    expected = predicted(network, store, memory=True)[0]
    for frame, values in zip(episode.frames, expected):
        np.testing.assert_allclose(policy.step(frame).values, values.numpy(), rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_an_interrupted_training_goes_on(episodes_file, tmp_path, monkeypatch):
    monkeypatch.setattr("mobile_vla_inference.training.session._SAVE_EVERY_UPDATES", 2)
    whole, broken = tmp_path / "whole.pth", tmp_path / "broken.pth"
    cli.main(["train", str(episodes_file), *options(whole)])
    run = Trainer.run

    def interrupted(self, store, updates, progress=None):
        if self.update >= 2:
            raise KeyboardInterrupt
        return run(self, store, updates, progress)

    monkeypatch.setattr(Trainer, "run", interrupted)
    assert cli.main(["train", str(episodes_file), *options(broken)]) == 130
    assert not broken.exists()
    monkeypatch.setattr(Trainer, "run", run)
    assert cli.main(["train", str(episodes_file), *options(broken), "--resume", "--frozen-towers"]) == 2
    assert cli.main(["train", str(episodes_file), *options(broken), "--resume"]) == 0
    first, second = (torch.load(path, weights_only=False)["model_state_dict"] for path in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.h5"], "nowhere.h5"),
        (["world", "--resume"], "expected it to go on from"),
        (["world", "--seed", "-1"], "expected 0 or more"),
    ],
)
def test_what_can_not_be_trained_is_told(tmp_path, capsys, arguments, message):
    pytest.importorskip("h5py")
    assert cli.main(["train", *arguments, "--out", str(tmp_path / "x.pth")]) == 2
    assert message in capsys.readouterr().err


def test_weights_of_int8_are_not_trained(tiny_checkpoint, tmp_path):
    from mobile_vla_inference.policy.convert import convert

    convert(tiny_checkpoint, tmp_path / "int8", dtype="int8")
    with pytest.raises(MobileVlaError, match="int8"):
        loaded_model(tmp_path / "int8")


def test_a_converted_folder_of_fp16_is_trained_in_fp32(tiny_checkpoint, tmp_path):
    from mobile_vla_inference.policy.convert import convert

    convert(tiny_checkpoint, tmp_path / "half", dtype="float16")
    model = loaded_model(tmp_path / "half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.fixture
def short_course(monkeypatch):
    """A course of four episodes, and two for validation."""
    pytest.importorskip("panda3d")
    pytest.importorskip("h5py")
    sizes = {"shown_episodes": 2, "round_episodes": 1, "shown_rounds": 1, "first_updates": 1, "round_updates": 1}
    monkeypatch.setattr(course, "Course", partial(course.Course, rounds=3, **sizes))
    monkeypatch.setattr("mobile_vla_inference.training.session._VALIDATION_EPISODES", 2)


def test_a_course_in_the_world_goes_on_where_it_was_interrupted(short_course, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.pth", tmp_path / "broken.pth"
    assert cli.main(["train", "world", "--out", str(whole), "--batch", "2"]) == 0
    assert not whole.with_suffix(".episodes").exists()
    run = Trainer.run

    def interrupted(self, store, updates, progress=None):
        if self.update == 2:
            raise KeyboardInterrupt
        return run(self, store, updates, progress)

    monkeypatch.setattr(Trainer, "run", interrupted)
    assert cli.main(["train", "world", "--out", str(broken), "--batch", "2"]) == 130
    monkeypatch.setattr(Trainer, "run", run)
    assert cli.main(["train", "world", "--out", str(broken), "--batch", "2", "--resume"]) == 0
    first, second = (torch.load(path, weights_only=False)["model_state_dict"] for path in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_make_episodes_writes_what_train_reads(short_course, tmp_path, capsys):
    assert cli.main(["make-episodes", str(tmp_path / "shown.h5"), "--episodes", "2", "--seed", "5"]) == 0
    assert "2 episodes" in capsys.readouterr().out
    one, two = read_lessons(tmp_path / "shown.h5", SIDE_PX)
    assert (one.scenario, two.scenario) == SCENARIOS[:2]
    assert len(one.frames) == len(one.commands) == len(one.sight)
    assert (one.period.period_s, one.period.steps) == (0.3, len(one.frames) - 1)
    assert cli.main(["make-episodes", str(tmp_path / "no.h5"), "--seed", "1000000"]) == 2
    assert "for evaluation" in capsys.readouterr().err


# --- what the episodes say ---


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
    """Return commands that use the axes up to the speeds given, both ways for y and z."""
    share = np.linspace(-1.0, 1.0, steps)
    return np.stack([np.abs(share) * x, share * y, share * z], axis=1)


def train(source: Path, out: Path, *more: str) -> int:
    return cli.main(["train", str(source), "--out", str(out), "--batch", "1", "--updates", "1", "--window", "8", *more])


@pytest.fixture
def two(tmp_path) -> Path:
    """Two episodes at 20 Hz, up to 0.4 m/s and 0.8 rad/s."""
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a.h5", "b.h5"):
        recording(folder / name, driven())
    return folder


SMALL_POLICY = str(Path(course.__file__).resolve().parents[1] / "data/small_policy")


def test_period_and_scale_come_from_the_episodes_and_are_told(two, tmp_path, capsys):
    out = tmp_path / "x.pth"
    assert train(two, out) == 0
    settings = load_settings(out).settings
    assert (settings.step_period_s, settings.action_scale, settings.confirmed) == (0.05, (0.4, 0.8), True)
    shown = capsys.readouterr().out
    assert "step period: 0.05 s, by the stamps of 2 episodes" in shown
    assert "action scale: linear.x 0.4 m/s, angular.z 0.8 rad/s" in shown
    assert shown.count("0.0% of 40 samples clipped") == 2


def test_a_duration_tells_the_period_where_there_are_no_stamps(tmp_path):
    for name in ("a.h5", "b.h5"):
        recording(tmp_path / name, driven(31), None, 3.0)
    assert train(tmp_path, tmp_path / "x.pth") == 0
    assert load_settings(tmp_path / "x.pth").settings.step_period_s == 0.1


def test_without_stamps_and_duration_the_option_is_demanded_and_taken(tmp_path, capsys):
    for name in ("a.h5", "b.h5"):
        recording(tmp_path / name, driven(), None)
    out = tmp_path / "x.pth"
    assert train(tmp_path, out) == 2
    assert "give --step-period-s" in capsys.readouterr().err
    assert not out.exists()
    assert train(tmp_path, out, "--step-period-s", "0.25") == 0
    assert load_settings(out).settings.step_period_s == 0.25


def test_a_start_that_learned_at_another_period_needs_the_option(two, tmp_path, capsys):
    out = tmp_path / "x.pth"
    assert train(two, out, "--init", SMALL_POLICY) == 2
    error = capsys.readouterr().err
    assert "has learned at 0.3 s a step" in error
    assert "bag-to-episodes --period 0.3" in error
    assert "give --step-period-s 0.05" in error
    assert train(two, out, "--init", SMALL_POLICY, "--step-period-s", "0.05") == 0
    settings = load_settings(out).settings
    assert (settings.step_period_s, settings.action_scale) == (
        0.05,
        (0.5, 1.2),
    )  # the head's own scale: nothing is over
    assert "small_policy had 0.3 s" in capsys.readouterr().out


def test_a_start_of_the_same_period_keeps_it_to_the_digit(tmp_path):
    for name in ("a.h5", "b.h5"):
        recording(tmp_path / name, driven(), 0.303)
    assert train(tmp_path, tmp_path / "x.pth", "--init", SMALL_POLICY) == 0
    assert load_settings(tmp_path / "x.pth").settings.step_period_s == 0.3


def test_what_a_start_only_assumes_contradicts_nothing_and_is_known_afterwards(two, tmp_path, tiny_checkpoint):
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
            "has 0.3 s from step to step, .* has 0.05 s|has 0.05 s from step to step, .* has 0.3 s",
        ),
        ({}, ["--step-period-s", "0.3"], r"--step-period-s is 0.3, but .* has 0.05 s .* by its stamps"),
        ({"period_s": None, "duration_s": 60.0}, [], "expected the same in all"),
        ({"period_s": None, "duration_s": -1.0}, [], "total_duration is -1 s"),
        ({"period_s": None}, [], "b.h5 tells neither stamps_s nor total_duration"),
        ({"period_s": 50.0}, [], "check that its times are in seconds"),
        ({"period_s": -0.05}, [], "expected stamps that rise"),
        ({"period_s": float("nan")}, [], "stamps that are NaN"),
        ({"commands": driven(y=0.3)}, [], r"% of the samples move along linear.y \(up to 0.3 m/s\)"),
        ({"commands": driven(x=400.0)}, [], "linear.x reaches 400 .* at most 10; convert the units"),
        ({"commands": driven(z=57.0)}, [], "angular.z reaches 57 .* at most 20"),
        (
            {},
            ["--action-scale", "0.3,0.8"],
            r"beyond one unit of linear.x, 0.3 m/s .*1.33 times.*--action-scale 0.4,0.8",
        ),
        ({"commands": driven(x=0.6)}, ["--init", SMALL_POLICY, "--step-period-s", "0.05"], "--action-scale 0.6,1.2"),
        ({}, ["--action-axes", "linear.x,angular.z,linear.y", "--init", SMALL_POLICY], "drives linear.x,angular.z"),
        ({}, ["--action-axes", "linear.x,linear.y"], r"% of the samples move along angular.z|linear.y is 0"),
        ({}, ["--max-linear-mps", "2"], "holds m/s and rad/s already"),
        ({}, ["--steps", "0:10"], "given without --validate-steps, .*such as --steps 0:10 --validate-steps 10:20"),
        ({}, ["--validate-steps", "5:9"], "given without --steps, .*such as --steps 0:5 --validate-steps 5:9"),
        ({}, ["--steps", "0:12", "--validate-steps", "10:20"], "both name 10:12.* --steps 0:18 --validate-steps 18:20"),
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


def test_few_samples_beyond_the_scale_are_clipped_and_told_more_need_the_option(tmp_path, capsys):
    commands = driven(200)
    commands[7, 0] = 0.45
    for name in ("a.h5", "b.h5"):
        recording(tmp_path / name, commands)
    assert train(tmp_path, tmp_path / "x.pth", "--action-scale", "0.4,0.8") == 0
    assert " to 0.45 in the episodes, 0.5% of 400 samples clipped" in capsys.readouterr().out
    assert train(tmp_path, tmp_path / "y.pth", "--action-scale", "0.2,0.8") == 2
    assert "--max-clipped 0.5 to clip them" in capsys.readouterr().err
    assert train(tmp_path, tmp_path / "y.pth", "--action-scale", "0.2,0.8", "--max-clipped", "0.5") == 0


def test_an_axis_that_nobody_used_needs_the_option_and_one_that_never_changes_is_told(tmp_path, capsys):
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
        (np.abs(driven()), "only ever turns left"),
        (driven() * [1, 1, 0] - np.abs(driven()) * [0, 0, 1], "only ever turns right"),
    ],
)
def test_a_sign_that_may_be_wrong_is_told(tmp_path, capsys, commands, message):
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


def test_an_instruction_in_place_of_the_recorded_one_is_told(two, tmp_path, capsys):
    assert train(two, tmp_path / "x.pth", "--instruction", "turn back") == 0
    assert "--instruction replaces the recorded instruction of 2 of 2 episodes" in capsys.readouterr().err


def test_channels_are_turned_where_the_files_are_bgr(two):
    plain, turned = (read_lessons(two, 8, channel_order=order)[0].frames for order in ("rgb", "bgr"))
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


def test_a_frames_folder_tells_its_period_and_full_speed_is_told(tmp_path, capsys):
    lines = [(0.1 * index, 0.5 - index / 20, 0.6) for index in range(20)]
    folder, out = frames_folder(tmp_path / "drive", lines), tmp_path / "x.pth"
    halves = ["--instruction", "go", "--steps", "0:15", "--validate-steps", "15:20"]
    assert train(folder, out, *halves, "--max-linear-mps", "2", "--max-angular-radps", "3") == 0
    settings = load_settings(out).settings
    assert (settings.step_period_s, settings.action_scale) == (0.1, (1.2, 1.5))
    shown = capsys.readouterr()
    assert "full throttle is 2 m/s, full steering 3 rad/s" in shown.out
    assert "by the stamps of 1 episode, 0 of 19 steps uneven" in shown.out
    assert "linear.x is 1.2 m/s in every sample" in shown.err


@pytest.mark.parametrize(
    ("lines", "told", "message"),
    [
        ([(0.1 * index, 30.0, 0.5) for index in range(20)], "go", "line 2 has steering 30, expected -1 to 1"),
        ([(0.1 * index, 0.3, 0.5) for index in range(20)], " ", "tells no instruction"),
        ([(0.1 * index + index // 5, 0.3 - index / 20, 0.5) for index in range(20)], "go", "3 of 19 steps"),
        ([(0.1 * index, 0.3, 0.5) for index in range(60)], "go", "of 60 steps, .* --steps 0:54 --validate-steps 54:60"),
    ],
)
def test_a_frames_folder_that_can_not_be_is_refused(tmp_path, capsys, lines, told, message):
    folder = frames_folder(tmp_path / "drive", lines)
    halves = [] if len(lines) == 60 else ["--steps", "0:15", "--validate-steps", "15:20"]
    assert train(folder, tmp_path / "x.pth", "--instruction", told, *halves) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_persons_real_drive_is_neither_slowed_down_nor_clipped(track_drive_dir, tmp_path, capsys):
    out = tmp_path / "track.pth"
    parts = ["--instruction", "follow the track", "--steps", "0:300", "--validate-steps", "300:316"]
    assert train(track_drive_dir, out, *parts) == 0
    settings = load_settings(out).settings
    assert (settings.step_period_s, settings.action_scale, settings.confirmed) == (0.05, (0.78, 0.9), True)
    capsys.readouterr()
    again = [*parts, "--init", SMALL_POLICY, "--step-period-s", "0.05"]
    assert train(track_drive_dir, tmp_path / "y.pth", *again) == 2
    error = capsys.readouterr().err
    assert "beyond one unit of linear.x, 0.5 m/s" in error
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
    assert "the training began with [0.05, 0.4, 0.8]" in capsys.readouterr().err


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
