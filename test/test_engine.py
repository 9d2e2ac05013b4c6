"""Engines: the flat arithmetic is the modules' for every kind of member, and a captured step is the step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mobile_vla_inference.errors import DeviceError, PolicyError
from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.engines.engine import EagerEngine
from mobile_vla_inference.policy.engines.flat import FlatEngine
from mobile_vla_inference.policy.engines.forward import TorchOperations
from mobile_vla_inference.policy.preprocess import Prompt
from mobile_vla_inference.policy.storage.config import PolicySettings, family_member
from mobile_vla_inference.policy.storage.layout import tensor_shapes
from mobile_vla_inference.policy.synthetic.checkpoint import synthetic_settings
from mobile_vla_inference.policy.synthetic.weights import parameter_values
from mobile_vla_inference.policy.vla_policy import VlaPolicy

CPU = torch.device("cpu")
INSTRUCTION = "go around the box on the left to the cup"
TOLERANCE = 1e-5

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def member(variant: str = "hybrid", fusion_in: int | None = None, cell: str = "lstm", **changes: object) -> HybridModel:
    """Return a tiny member with synthetic weights on the CPU; `changes` are settings."""
    config = family_member("tiny", variant, fusion_in)
    config = replace(config, cell=replace(config.cell, kind=cell))
    heads = synthetic_settings(family_member("tiny", variant)).attention_heads
    model = HybridModel(config, PolicySettings(attention_heads=heads, **changes))
    weights = {
        name: torch.from_numpy(np.concatenate(list(parameter_values(name, shape, config, 0)))).view(shape)
        for name, shape in tensor_shapes(config).items()
    }
    model.load_state_dict(weights)
    model.materialize_buffers(CPU)
    return model.requires_grad_(False)


def prompt_of(model: HybridModel, words: int) -> tuple[Prompt, torch.Tensor | None]:
    """Return a prompt of so many words after the image, and CLIP's ids."""
    generator = torch.Generator().manual_seed(words)
    latents = model.config.latent_query_num
    tokens = 3 + latents + words
    ids = torch.randint(4, 900, (1, tokens), generator=generator)
    image = torch.zeros_like(ids)
    image[:, 2 : 2 + latents] = 1
    clip_ids = torch.randint(4, 900, (1, words + 1), generator=generator)
    clip_ids[0, -1] = 1023
    return Prompt(ids, torch.ones_like(ids), image), clip_ids if model.reads_clip_text else None


def frames_of(model: HybridModel, count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    side = model.config.image_size
    return [generator.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


MEMBERS = {
    "hybrid": {},
    "pure": {"variant": "pure"},
    "gru": {"cell": "gru"},
    "rnn": {"cell": "rnn"},
    "CLIP's image": {"fusion_in": 128, "fusion_features": ("kosmos_text", "clip_text", "clip_image")},
    "CLIP's hidden image": {"fusion_in": 128, "fusion_features": ("clip_vision_hidden", "kosmos_text")},
    "all features": {
        "fusion_in": 256,
        "fusion_features": ("clip_vision_hidden", "kosmos_vision", "clip_image", "clip_text", "kosmos_text"),
    },
    "vision only": {"fusion_in": 64, "fusion_features": ("kosmos_vision",)},
    "pooled at the last token": {"kosmos_pooling": "last"},
    "pooled over the image": {"kosmos_pooling": "image"},
    "normalised CLIP text": {"clip_text_feature": "normalized"},
    "blue first": {"channel_order": "bgr", "image_normalization": "imagenet"},
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_the_flat_arithmetic_is_that_of_the_modules(kind: str) -> None:
    model = member(**MEMBERS[kind])
    eager, flat = EagerEngine(model), FlatEngine(model, TorchOperations(torch.float32), CPU)
    for words in (4, 9):  # the second instruction meets the state that the first has left
        prompt = prompt_of(model, words)
        eager.set_instruction(*prompt)
        flat.set_instruction(*prompt)
        for frame in frames_of(model, 3):
            expected = eager.features(frame)
            scale = max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(flat.features(frame), expected, atol=TOLERANCE * scale, rtol=0)
            np.testing.assert_allclose(flat.step(frame), eager.step(frame), atol=TOLERANCE, rtol=0)


def test_what_the_comparison_stands_for_changes_the_features() -> None:
    """Frame, instruction and settings each move the features by far more than the tolerance."""
    model = member()
    flat = FlatEngine(model, TorchOperations(torch.float32), CPU)
    flat.set_instruction(*prompt_of(model, 4))
    first, second = frames_of(model, 2)
    base = flat.features(first)
    changed = [flat.features(second)]
    flat.set_instruction(*prompt_of(model, 5))
    changed.append(flat.features(first))
    reversed_channels = FlatEngine(member(channel_order="bgr"), TorchOperations(torch.float32), CPU)
    reversed_channels.set_instruction(*prompt_of(model, 4))
    changed.append(reversed_channels.features(first))
    for features in changed:
        assert np.abs(features - base).max() > 100 * TOLERANCE


def test_int8_blocks_stay_close_to_the_modules() -> None:
    model = member()
    flat = FlatEngine(model, TorchOperations(torch.float32), CPU, quantized=True)
    eager = EagerEngine(model)
    prompt = prompt_of(model, 4)
    flat.set_instruction(*prompt)
    eager.set_instruction(*prompt)
    for frame in frames_of(model, 3):
        ours, expected = flat.features(frame), eager.features(frame)
        assert ours @ expected / np.linalg.norm(ours) / np.linalg.norm(expected) > 0.999
        assert not np.array_equal(ours, expected)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_reset_starts_the_episode_anew_and_the_state_matters(cell: str) -> None:
    model = member(cell=cell)
    flat = FlatEngine(model, TorchOperations(torch.float32), CPU)
    flat.set_instruction(*prompt_of(model, 4))
    frames = frames_of(model, 3)
    first = [flat.step(frame) for frame in frames]
    kept = flat.step(frames[0])
    flat.reset()
    assert all(np.array_equal(flat.step(frame), expected) for frame, expected in zip(frames, first))
    assert np.abs(kept - first[0]).max() > TOLERANCE


def test_features_leave_the_state_as_it_is() -> None:
    model = member()
    engines = EagerEngine(model), FlatEngine(model, TorchOperations(torch.float32), CPU)
    for engine in engines:
        engine.set_instruction(*prompt_of(model, 4))
        first, second = frames_of(model, 2)
        expected = [engine.step(first), engine.step(second)]
        engine.reset()
        found = [engine.step(first)]
        engine.features(first)
        found.append(engine.step(second))
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("engine", ["eager", "flat"])
def test_an_action_that_is_not_finite_is_refused_and_the_state_reset(engine: str) -> None:
    model = member()
    own = EagerEngine(model) if engine == "eager" else FlatEngine(model, TorchOperations(torch.float32), CPU)
    own.set_instruction(*prompt_of(model, 4))
    frame = frames_of(model, 1)[0]
    expected = own.step(frame)
    state = own._hidden_state if engine == "eager" else own._state
    with torch.inference_mode():
        state[1][0, 0] = float("nan")
    with pytest.raises(PolicyError, match="expected finite numbers"):
        own.step(frame)
    assert np.array_equal(own.step(frame), expected)


def test_the_parts_make_up_a_step() -> None:
    model = member(fusion_in=128, fusion_features=("kosmos_text", "clip_text", "clip_image"))
    flat = FlatEngine(model, TorchOperations(torch.float32), CPU)
    flat.set_instruction(*prompt_of(model, 4))
    frame = frames_of(model, 1)[0]
    with torch.inference_mode():
        results = {name: part() for name, part in flat.parts(frame).items()}
    assert list(results) == ["Kosmos vision", "Kosmos text", "CLIP vision", "cell and head"]
    np.testing.assert_allclose(results["cell and head"], flat.step(frame), atol=TOLERANCE)


def test_an_engine_that_needs_another_device_is_refused(tiny_checkpoint) -> None:
    for engine in ("graph", "compiled"):
        with pytest.raises(DeviceError, match=f"engine is {engine}, expected a CUDA device"):
            VlaPolicy.load(tiny_checkpoint, device="cpu", engine=engine)
    with pytest.raises(DeviceError, match="expected one of auto, graph"):
        VlaPolicy.load(tiny_checkpoint, device="cpu", engine="fast")


@pytest.mark.parametrize(("engine", "dtype"), [("auto", "float32"), ("flat", "float32"), ("eager", "bfloat16")])
def test_the_engine_is_told(tiny_checkpoint, engine: str, dtype: str) -> None:
    facts = VlaPolicy.load(tiny_checkpoint, device="cpu", engine=engine, dtype=dtype).describe()
    assert (facts.engine, facts.engine_fallback) == ("flat" if engine == "auto" else engine, "")


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("kind", MEMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_captured_step_is_the_step(kind: str, dtype: torch.dtype) -> None:
    from mobile_vla_inference.policy.engines.graph import GraphEngine

    gpu = torch.device("cuda")
    model = member(**MEMBERS[kind])
    captured = GraphEngine(model, TorchOperations(dtype), gpu)
    flat = FlatEngine(model, TorchOperations(dtype), gpu)
    for words in (4, 9, 4):  # a length that is known already only has its inputs rewritten
        prompt = prompt_of(model, words)
        for engine in (captured, flat):
            engine.set_instruction(*prompt)
            engine.reset()
        for frame in frames_of(model, 4):
            np.testing.assert_allclose(
                captured.step(frame), flat.step(frame), atol=2e-3 if dtype.itemsize == 2 else 1e-5
            )


@needs_gpu
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", MEMBERS)
def test_the_kernels_do_what_torch_does(kind: str, quantized: bool) -> None:
    """In fp16 both are as close to fp32 as fp16 allows; int8 weights are the same values for both."""
    kernels = pytest.importorskip("mobile_vla_inference.policy.engines.triton_kernels")
    if not kernels.AVAILABLE:
        pytest.skip("there is no Triton here")
    from mobile_vla_inference.policy.engines.graph import GraphEngine

    gpu = torch.device("cuda")
    model = member(**MEMBERS[kind])
    own = GraphEngine(model, kernels.TritonOperations(torch.float16, gpu), gpu, quantized=quantized)
    exact = FlatEngine(model, TorchOperations(torch.float32), gpu, quantized=quantized)
    for words in (4, 9):
        for engine in (own, exact):
            engine.set_instruction(*prompt_of(model, words))
            engine.reset()
        for frame in frames_of(model, 3):
            expected = exact.features(frame)
            np.testing.assert_allclose(own.features(frame), expected, atol=1e-2 * float(np.abs(expected).max()))
            np.testing.assert_allclose(own.step(frame), exact.step(frame), atol=2e-2)


@needs_gpu
def test_a_compiled_step_is_the_step() -> None:
    from mobile_vla_inference.policy.engines.graph import GraphEngine

    gpu = torch.device("cuda")
    model = member()
    compiled = GraphEngine(model, TorchOperations(torch.float32), gpu, compiled=True)
    flat = FlatEngine(model, TorchOperations(torch.float32), gpu)
    for engine in (compiled, flat):
        engine.set_instruction(*prompt_of(model, 4))
    for frame in frames_of(model, 4):
        np.testing.assert_allclose(compiled.step(frame), flat.step(frame), atol=1e-4)


@needs_gpu
def test_auto_captures_on_a_gpu(tiny_checkpoint) -> None:
    policy = VlaPolicy.load(tiny_checkpoint, device="cuda")
    assert policy.describe().engine.startswith("graph")


@needs_gpu
def test_an_engine_that_fails_on_the_gpu_is_passed_over_and_told(tiny_checkpoint, monkeypatch, caplog) -> None:
    from mobile_vla_inference.policy.engines.graph import GraphEngine

    def fail(self: GraphEngine, frame: np.ndarray) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(GraphEngine, "step", fail)
    policy = VlaPolicy.load(tiny_checkpoint, device="cuda")
    assert policy.describe().engine == "flat"
    assert "no such kernel" in policy.describe().engine_fallback and "no such kernel" in caplog.text
