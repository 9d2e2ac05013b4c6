"""Training: batches compute what the policy computes, losses fall, interrupted trainings resume, files are whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mobile_vla_inference.bags.step_period import StepPeriod
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.policy.preprocess import InstructionEncoder
from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
from mobile_vla_inference.policy.storage.checkpoint_files import (
    ProcessorFolders,
    find_processors,
    processor_folders,
)
from mobile_vla_inference.policy.synthetic.processors import write_processors
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.sim.phrases import instruction, training_sentences
from mobile_vla_inference.sim.scenarios import SCENARIOS
from mobile_vla_inference.tools import cli
from mobile_vla_inference.training import curriculum
from mobile_vla_inference.training.dataset import TrainingEpisode, read_training_episodes, write_training_episodes
from mobile_vla_inference.training.network import SequenceModel, loaded_model, starting_config, starting_model
from mobile_vla_inference.training.trainer import (
    Recipe,
    Store,
    Trainer,
    baseline_errors,
    mean_absolute_error,
    predicted,
)

SIDE_PX = 56


def made_up_episode(seed: int, steps: int) -> TrainingEpisode:
    """Make an episode with a white bar on black: steer towards it, at the speed of the instruction."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((steps, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    places = rng.integers(0, SIDE_PX - 8, steps)
    for frame, place in zip(frames, places):
        frame[:, place : place + 8] = 255
    turn = 1.0 - places / (SIDE_PX - 8) * 2.0
    commands = np.stack([np.full(steps, 0.5 * (seed % 2)), np.zeros(steps), turn], axis=1).astype(np.float32)
    period = StepPeriod(f"made up {seed}", 0.3, steps - 1)
    return TrainingEpisode(frames, commands, "go fast" if seed % 2 else "stand still", "", seed, period=period)


@pytest.fixture
def tokenizers(tmp_path) -> ProcessorFolders:
    config, _ = starting_config("world")
    write_processors(tmp_path / "processors", config, training_sentences())
    return processor_folders(tmp_path / "processors", config)


@pytest.fixture
def encoder(tokenizers) -> InstructionEncoder:
    return InstructionEncoder(tokenizers, *starting_config("world"))


@pytest.fixture
def network(encoder) -> SequenceModel:
    return SequenceModel(starting_model(*starting_config("world"), seed=0), encoder)


@pytest.fixture(scope="module")
def episodes_file(tmp_path_factory) -> Path:
    pytest.importorskip("h5py")
    path = tmp_path_factory.mktemp("episodes") / "made_up.h5"
    write_training_episodes(path, [made_up_episode(seed, 4 + seed % 5) for seed in range(12)])
    return path


# --- episodes ---


def test_episodes_come_back_as_they_were_written(tmp_path):
    pytest.importorskip("h5py")
    targets = np.array([[1.0, np.nan], [0.5, 2.0], [0.0, 0.0]], dtype=np.float32)
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    commands = np.array([[0.5, 0.0, -1.0], [0.0, 0.25, 0.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    written = TrainingEpisode(frames, commands, "컵까지 가세요", "1box_vert_left", 7, "success", targets)
    write_training_episodes(tmp_path / "some.h5", [written, written])
    one, two = read_training_episodes(tmp_path, 8)
    assert (one.instruction, one.scenario, one.seed, one.outcome) == ("컵까지 가세요", "1box_vert_left", 7, "success")
    np.testing.assert_array_equal(one.frames, frames)
    np.testing.assert_array_equal(two.commands, commands)
    np.testing.assert_array_equal(two.auxiliary_targets, targets)


def test_the_original_layout_gives_the_instruction_by_its_name(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "episode_2box_hori_right_03.h5", "w") as file:
        file["images"] = np.zeros((18, 72, 128, 3), dtype=np.uint8)
        file["actions"] = np.full((18, 3), 1.15, dtype=np.float32)
        file.create_dataset("action_event_types", data=["key"] * 18, dtype=h5py.string_dtype())
    (episode,) = read_training_episodes(tmp_path, 14)
    assert episode.frames.shape == (18, 14, 14, 3)
    assert "오른쪽" in episode.instruction


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist, .*a folder with images/ and actions.csv, or the word world"),
        (lambda path: path.mkdir(), "is an empty folder"),
        (lambda path: path.write_bytes(b"no HDF5"), "can't be read as HDF5"),
        (lambda path: write_h5(path, images=np.zeros((2, 4, 4, 3), np.uint8)), "lacks the data set actions"),
        (lambda path: write_h5(path, images=np.zeros((2, 4, 4)), actions=np.zeros((2, 3))), "has images float64"),
        (
            lambda path: write_h5(path, images=np.zeros((2, 4, 4, 3), np.uint8), actions=np.full((2, 3), np.nan)),
            "NaN or Inf",
        ),
        (
            lambda path: write_h5(path, images=np.zeros((2, 4, 4, 3), np.uint8), actions=np.zeros((2, 3))),
            "has no instruction",
        ),
    ],
    ids=["nothing", "empty folder", "no HDF5", "no actions", "wrong images", "NaN", "no instruction"],
)
def test_what_is_no_episode_is_refused_in_a_sentence(tmp_path, make, message):
    pytest.importorskip("h5py")
    path = tmp_path / "data.h5"
    make(path)
    with pytest.raises(MobileVlaError, match=message):
        read_training_episodes(path, 8)


def write_h5(path: Path, **datasets: np.ndarray) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values


def test_real_frames_are_read_with_steering_to_the_left_positive(track_drive_dir):
    (episode,) = read_training_episodes(track_drive_dir, 28, "follow the track")
    assert episode.frames.shape == (600, 28, 28, 3)
    np.testing.assert_allclose(episode.commands[0], [0.539126, 0.0, -0.298604], rtol=1e-6)


# --- instructions ---


def test_instructions_of_different_meaning_never_encode_alike_and_none_is_unknown(encoder, tokenizers):
    sentences = {*training_sentences()} | {
        instruction(name, seed, "unseen") for name in SCENARIOS for seed in range(40)
    }
    unknown = AutoTokenizer.from_pretrained(tokenizers.kosmos).unk_token_id
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
    shuffled.add([TrainingEpisode(episode.frames[::-1].copy(), episode.commands, episode.instruction)])
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


def test_training_learns_from_image_and_instruction(network):
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
    _, settings = starting_config("world")
    store = Store(settings, capacity=3)
    store.add([made_up_episode(seed, 2 + seed) for seed in range(5)])
    assert [len(frames) for frames in store.frames] == [4, 5, 6]


def test_baselines():
    _, settings = starting_config("world")
    training, validation = Store(settings), Store(settings)
    episode = made_up_episode(1, 4)
    commands = np.array([[0.5, 0, 0], [0.25, 0, 0], [0.5, 0, 1.2], [0.5, 0, 1.2]], dtype=np.float32)
    for store in (training, validation):
        store.add([TrainingEpisode(episode.frames, commands, "go")])
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
    assert not open_checkpoint(out).settings.assumed
    assert (tmp_path / "small.loss.svg").read_text().startswith("<svg")
    assert not (tmp_path / "small.training").exists()
    policy = VlaPolicy.load(out)
    policy.set_instruction("go left")
    episode = made_up_episode(1, 3)
    model = loaded_model(out)
    folders = processor_folders(find_processors(out), model.config)
    network = SequenceModel(model, InstructionEncoder(folders, model.config, model.settings))
    store = Store(policy.settings)
    store.add([TrainingEpisode(episode.frames, episode.commands, "go left")])
    expected = predicted(network, store, memory=True)[0]
    for frame, values in zip(episode.frames, expected):
        np.testing.assert_allclose(policy.step(frame).values, values.numpy(), rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_an_interrupted_training_resumes(episodes_file, tmp_path, monkeypatch):
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
        (["world", "--resume"], "expected the progress of an interrupted training"),
        (["world", "--seed", "-1"], "expected 0 or more"),
    ],
)
def test_what_can_not_be_trained_is_refused(tmp_path, capsys, arguments, message):
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
def short_curriculum(monkeypatch):
    """A curriculum of four episodes, and two for validation."""
    pytest.importorskip("panda3d")
    pytest.importorskip("h5py")
    sizes = {"expert_episodes": 2, "round_episodes": 1, "expert_rounds": 1, "first_updates": 1, "round_updates": 1}
    monkeypatch.setattr(curriculum, "Curriculum", partial(curriculum.Curriculum, rounds=3, **sizes))
    monkeypatch.setattr("mobile_vla_inference.training.session._VALIDATION_EPISODES", 2)


def test_a_curriculum_in_the_world_resumes_where_it_was_interrupted(short_curriculum, tmp_path, monkeypatch):
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


def test_make_episodes_writes_what_train_reads(short_curriculum, tmp_path, capsys):
    assert cli.main(["make-episodes", str(tmp_path / "shown.h5"), "--episodes", "2", "--seed", "5"]) == 0
    assert "2 episodes" in capsys.readouterr().out
    one, two = read_training_episodes(tmp_path / "shown.h5", SIDE_PX)
    assert (one.scenario, two.scenario) == SCENARIOS[:2]
    assert len(one.frames) == len(one.commands) == len(one.auxiliary_targets)
    assert (one.period.period_s, one.period.steps) == (0.3, len(one.frames) - 1)
    assert cli.main(["make-episodes", str(tmp_path / "no.h5"), "--seed", "1000000"]) == 2
    assert "for evaluation" in capsys.readouterr().err
