"""VlaPolicy on a tiny checkpoint: instruction, state, faults; and that loading stays offline."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from mobile_vla_inference.errors import CheckpointError, DeviceError, FrameError, InstructionError, PolicyError
from mobile_vla_inference.frames import reduce_frame
from mobile_vla_inference.policy.engines.flat import FlatEngine
from mobile_vla_inference.policy.engines.operations import TorchOperations
from mobile_vla_inference.policy.loading import load_model
from mobile_vla_inference.policy.preprocess import FrameNormalizer, InstructionEncoder
from mobile_vla_inference.policy.storage.checkpoint_files import find_processors, processor_folders
from mobile_vla_inference.policy.storage.config import standard_config
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.storage.settings_file import save_settings
from mobile_vla_inference.policy.synthetic.checkpoint import make_checkpoint
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.policy_facts import PolicyFacts

KOREAN = "박스를 왼쪽으로 돌아서 컵까지 가세요"
ENGLISH = "go to the cup"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    make_checkpoint(path, standard_config("tiny", "hybrid"), seed=0)
    return path


@pytest.fixture
def policy(checkpoint: Path) -> VlaPolicy:
    return VlaPolicy.load(checkpoint)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """Return images of a few large patches, so that frames differ in more than their noise."""
    generator = np.random.default_rng(0)
    patches = generator.integers(0, 256, (5, 3, 4, 3), dtype=np.uint8)
    return [patch.repeat(40, axis=0).repeat(40, axis=1) for patch in patches]


def actions(policy: VlaPolicy, frames: list[np.ndarray]) -> np.ndarray:
    return np.array([policy.step(frame).values for frame in frames])


@pytest.mark.parametrize("variant", ["hybrid", "pure"])
def test_steps_equal_one_call_of_the_cell_over_all_frames(
    tmp_path: Path, frames: list[np.ndarray], variant: str
) -> None:
    path = tmp_path / "model.pth"
    settings = make_checkpoint(path, standard_config("tiny", variant), seed=3)
    policy = VlaPolicy.load(path)
    policy.warm_up()
    policy.set_instruction(KOREAN)
    found = actions(policy, frames)

    model, config = load_model(path), policy.config
    encoder = InstructionEncoder(processor_folders(find_processors(path), config), config, settings)
    normalize = FrameNormalizer(settings, "cpu", torch.float32)
    pixel_values = torch.cat([normalize(reduce_frame(frame, config.image_size)) for frame in frames])
    with torch.inference_mode():
        text = None
        if variant == "hybrid":
            model.set_clip_eos_token_id(encoder.clip_eos_token_id)
            text = model.clip_text_feature(encoder.clip_ids(KOREAN))
        features = model.fused_features(pixel_values, encoder.prompt(KOREAN), text)
        expected = model.actions(model.rnn(features)[0])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_the_state_is_carried_until_reset(policy: VlaPolicy, frames: list[np.ndarray]) -> None:
    policy.set_instruction(ENGLISH)
    first = actions(policy, frames[:1] * 2)
    assert np.abs(first[0] - first[1]).max() > 1e-3, "the same frame again acts on a state"
    policy.reset()
    np.testing.assert_array_equal(actions(policy, frames[:1])[0], first[0])


def test_a_changed_instruction_resets_and_the_same_one_does_not(policy: VlaPolicy, frames: list[np.ndarray]) -> None:
    policy.set_instruction(ENGLISH)
    expected = actions(policy, frames)
    policy.reset()
    found = []
    for frame in frames:
        policy.set_instruction(f"  {ENGLISH}\n")
        found.append(policy.step(frame).values)
    np.testing.assert_array_equal(found, expected)
    policy.set_instruction(KOREAN)
    korean = actions(policy, frames[:1])[0]
    assert np.abs(korean - expected[0]).max() > 1e-2, "the instruction makes no difference"
    policy.set_instruction(ENGLISH)
    np.testing.assert_array_equal(actions(policy, frames[:1])[0], expected[0])


def test_clip_text_is_computed_once_per_instruction(policy: VlaPolicy, frames: list[np.ndarray]) -> None:
    calls = []

    def note(module: torch.nn.Module, *_: object) -> None:
        if isinstance(module, CLIPTextEmbeddings):
            calls.append(module)

    with register_module_forward_hook(note):
        policy.set_instruction(KOREAN)
        actions(policy, frames)
        policy.reset()
        actions(policy, frames)
    assert len(calls) == 1


def test_no_instruction_means_no_step(policy: VlaPolicy, frames: list[np.ndarray]) -> None:
    with pytest.raises(InstructionError, match="no instruction"):
        policy.step(frames[0])
    policy.set_instruction(KOREAN)
    policy.step(frames[0])
    policy.set_instruction(" \n ")
    with pytest.raises(InstructionError, match="no instruction"):
        policy.step(frames[0])


def test_warm_up_leaves_no_instruction_and_no_state(policy: VlaPolicy, frames: list[np.ndarray]) -> None:
    policy.set_instruction(ENGLISH)
    expected = actions(policy, frames[:1])
    policy.warm_up()
    with pytest.raises(InstructionError):
        policy.step(frames[0])
    policy.set_instruction(ENGLISH)
    np.testing.assert_array_equal(actions(policy, frames[:1]), expected)


def test_a_refused_instruction_leaves_the_former_one(policy: VlaPolicy, frames: list[np.ndarray]) -> None:
    policy.set_instruction(ENGLISH)
    first = actions(policy, frames[:1])
    for text in ("\ufffd", "x" * 5000, "🚗" * 1000):
        with pytest.raises(InstructionError):
            policy.set_instruction(text)
    policy.reset()
    np.testing.assert_array_equal(actions(policy, frames[:1]), first)


def test_frames_of_any_size_are_taken_and_others_refused(policy: VlaPolicy) -> None:
    policy.set_instruction(ENGLISH)
    for height, width in ((720, 1280), (56, 56), (10, 33)):
        action = policy.step(np.zeros((height, width, 3), np.uint8))
        assert len(action.values) == 2
        assert action.step_s > 0
    with pytest.raises(FrameError):
        policy.step(np.zeros((56, 56), np.uint8))


@pytest.mark.filterwarnings("error")
def test_a_read_only_frame_is_taken_as_it_is(policy: VlaPolicy) -> None:
    frame = np.zeros((policy.config.image_size, policy.config.image_size, 3), np.uint8)
    frame.flags.writeable = False  # as the frame in the worker's shared memory
    policy.set_instruction(ENGLISH)
    policy.step(frame)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_action_that_is_not_finite_is_refused_and_the_state_cleared(
    checkpoint: Path, frames: list[np.ndarray], value: float
) -> None:
    loaded = VlaPolicy.load(checkpoint)
    model = load_model(checkpoint)
    model.set_clip_eos_token_id(loaded.encoder.clip_eos_token_id)
    engine = FlatEngine(model, TorchOperations(torch.float32), torch.device("cpu"))  # reads the model's own weights
    policy = VlaPolicy(engine, loaded.encoder, loaded.config, loaded.settings, loaded.describe())
    policy.set_instruction(ENGLISH)
    expected = actions(policy, frames[:1])
    bias = model.actions.mlp[8].bias
    before = bias.clone()
    bias[0] = value
    with pytest.raises(PolicyError, match="finite"):
        policy.step(frames[1])
    bias.copy_(before)
    np.testing.assert_array_equal(actions(policy, frames[:1]), expected)


def test_a_state_that_is_not_finite_is_refused(policy: VlaPolicy, frames: list[np.ndarray]) -> None:
    policy.set_instruction(ENGLISH)
    policy.step(frames[0])
    with torch.inference_mode():
        policy._engine._state[1][0, 0] = float("inf")  # h and the action stay finite
    with pytest.raises(PolicyError, match="state"):
        policy.step(frames[0])


def test_describe_is_json_ready_and_names_what_is_assumed(checkpoint: Path, tmp_path: Path) -> None:
    assert VlaPolicy.load(checkpoint).describe().assumed_settings == ()
    path = tmp_path / "unconfirmed.pth"
    path.write_bytes(checkpoint.read_bytes())
    policy = VlaPolicy.load(path, processors=find_processors(checkpoint))
    description = json.loads(json.dumps(policy.describe().to_json()))
    assert policy.describe().difference(PolicyFacts.from_json(description)) == ""
    assert description["assumed_settings"] == sorted(PolicySettings.all_assumed().assumed)
    assert description["checkpoint_id"] == VlaPolicy.load(checkpoint).describe().checkpoint_id  # the same weights
    assert description["parameters"] == 762_819
    assert (description["variant"], description["dtype"], description["device"]) == ("hybrid", "float32", "cpu")


def test_half_precision_stays_close(checkpoint: Path, policy: VlaPolicy, frames: list[np.ndarray]) -> None:
    half = VlaPolicy.load(checkpoint, dtype="bfloat16")
    for loaded in (half, policy):
        loaded.set_instruction(ENGLISH)
    np.testing.assert_allclose(actions(half, frames), actions(policy, frames), atol=0.15)
    assert half.describe().dtype == "bfloat16"


def test_progress_names_the_stages(checkpoint: Path) -> None:
    stages: list[str] = []
    VlaPolicy.load(checkpoint, progress=stages.append)
    assert stages[0] == "reading the checkpoint"
    assert stages[-1] == "loading the weights: 100 %"
    assert len(stages) == len(set(stages)) <= 12


def test_loading_opens_no_connection(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"connects to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    VlaPolicy.load(checkpoint).warm_up()


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"dtype": "int3"}])
def test_an_unknown_device_or_type_is_named(checkpoint: Path, options: dict[str, str]) -> None:
    with pytest.raises(DeviceError, match=next(iter(options.values()))):
        VlaPolicy.load(checkpoint, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_sentence(checkpoint: Path) -> None:
    with pytest.raises(DeviceError, match="cuda"):
        VlaPolicy.load(checkpoint, device="cuda")


def test_axes_that_do_not_fit_the_actions_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "three.pth"
    path.write_bytes(checkpoint.read_bytes())
    axes = ("linear.x", "linear.y", "angular.z")
    save_settings(path, PolicySettings(action_axes=axes, action_scale=(2.0,) * 3, action_offset=(0.0,) * 3))
    with pytest.raises(CheckpointError, match="action_axes"):
        VlaPolicy.load(path, processors=find_processors(checkpoint))


def test_the_bgr_setting_swaps_the_channels(checkpoint: Path, tmp_path: Path, frames: list[np.ndarray]) -> None:
    path = tmp_path / "bgr.pth"
    path.write_bytes(checkpoint.read_bytes())
    save_settings(path, PolicySettings(channel_order="bgr"))
    swapped = VlaPolicy.load(path, processors=find_processors(checkpoint))
    save_settings(path, PolicySettings())
    plain = VlaPolicy.load(path, processors=find_processors(checkpoint))
    for loaded in (swapped, plain):
        loaded.set_instruction(ENGLISH)
    reversed_frames = [frame[..., ::-1] for frame in frames]
    np.testing.assert_allclose(actions(swapped, reversed_frames), actions(plain, frames), atol=1e-6)


def test_a_cut_instruction_is_logged(policy: VlaPolicy, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        policy.set_instruction("컵 박스 " * 60)
    assert "CLIP reads only 77" in caplog.text
