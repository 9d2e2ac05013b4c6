"""Engines: flat arithmetic equals the modules for every variant, and a captured step equals the flat one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mobile_vla_inference.errors import DeviceError, PolicyError
from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.engines.eager import EagerEngine
from mobile_vla_inference.policy.engines.flat import FlatEngine
from mobile_vla_inference.policy.engines.operations import Linear, Norm, TorchOperations
from mobile_vla_inference.policy.engines.quantize import quantize, row_scales, use_int8_linears
from mobile_vla_inference.policy.engines.tilings import MEASURED, Operands, Tiling, block_rows, choose_tiling
from mobile_vla_inference.policy.preprocess import Prompt
from mobile_vla_inference.policy.storage.config import standard_config
from mobile_vla_inference.policy.storage.layout import is_block_matrix, tensor_shapes
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.synthetic.checkpoint import synthetic_settings
from mobile_vla_inference.policy.synthetic.weights import parameter_values
from mobile_vla_inference.policy.vla_policy import VlaPolicy

CPU = torch.device("cpu")
INSTRUCTION = "go around the box on the left to the cup"
TOLERANCE = 1e-5

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def tiny_model(
    variant: str = "hybrid", fusion_in: int | None = None, cell: str = "lstm", **changes: object
) -> HybridModel:
    """Return a tiny model with synthetic weights on the CPU; `changes` are settings."""
    config = standard_config("tiny", variant, fusion_in)
    config = replace(config, cell=replace(config.cell, kind=cell))
    heads = synthetic_settings(standard_config("tiny", variant)).attention_heads
    model = HybridModel(config, PolicySettings(attention_heads=heads, **changes))
    weights = {
        name: torch.from_numpy(np.concatenate(list(parameter_values(name, shape, config, 0)))).view(shape)
        for name, shape in tensor_shapes(config).items()
    }
    model.load_state_dict(weights)
    model.materialize_buffers(CPU)
    return model.requires_grad_(False)


def with_int8_blocks(model: HybridModel) -> HybridModel:
    """Make the matrices of the blocks and the resampler int8, as in a converted folder; return the same model."""
    linears = {
        name: model.get_submodule(name.removesuffix(".weight"))
        for name, _ in model.named_parameters()
        if is_block_matrix(name)
    }
    use_int8_linears(model, linears)
    for name, linear in linears.items():
        scale = row_scales(linear.weight)
        values = {"weight": quantize(linear.weight, scale), "weight_scale": scale, "bias": linear.bias}
        model.get_submodule(name.removesuffix(".weight")).load_state_dict(values)
    return model


def prompt_of(model: HybridModel, words: int) -> tuple[Prompt, torch.Tensor | None]:
    """Return a prompt of so many words after the image, and CLIP's token ids."""
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


VARIANTS = {
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


@pytest.mark.parametrize("kind", VARIANTS)
def test_flat_arithmetic_equals_the_modules(kind: str) -> None:
    model = tiny_model(**VARIANTS[kind])
    eager, flat = EagerEngine(model), FlatEngine(model, TorchOperations(torch.float32), CPU)
    for words in (4, 9):  # the second instruction starts with the state that the first one left
        prompt = prompt_of(model, words)
        eager.set_instruction(*prompt)
        flat.set_instruction(*prompt)
        for frame in frames_of(model, 3):
            expected = eager.features(frame)
            scale = max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(flat.features(frame), expected, atol=TOLERANCE * scale, rtol=0)
            np.testing.assert_allclose(flat.step(frame), eager.step(frame), atol=TOLERANCE, rtol=0)


def test_frame_instruction_and_settings_change_the_features() -> None:
    """Each changes the features by far more than the tolerance of the comparison above."""
    model = tiny_model()
    flat = FlatEngine(model, TorchOperations(torch.float32), CPU)
    flat.set_instruction(*prompt_of(model, 4))
    first, second = frames_of(model, 2)
    base = flat.features(first)
    changed = [flat.features(second)]
    flat.set_instruction(*prompt_of(model, 5))
    changed.append(flat.features(first))
    reversed_channels = FlatEngine(tiny_model(channel_order="bgr"), TorchOperations(torch.float32), CPU)
    reversed_channels.set_instruction(*prompt_of(model, 4))
    changed.append(reversed_channels.features(first))
    for features in changed:
        assert np.abs(features - base).max() > 100 * TOLERANCE


def test_int8_blocks_stay_close_to_the_modules() -> None:
    model = tiny_model()
    flat = FlatEngine(with_int8_blocks(tiny_model()), TorchOperations(torch.float32), CPU)
    eager = EagerEngine(model)
    prompt = prompt_of(model, 4)
    flat.set_instruction(*prompt)
    eager.set_instruction(*prompt)
    for frame in frames_of(model, 3):
        ours, expected = flat.features(frame), eager.features(frame)
        assert ours @ expected / np.linalg.norm(ours) / np.linalg.norm(expected) > 0.999
        assert not np.array_equal(ours, expected)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_reset_starts_a_new_episode_and_the_state_matters(cell: str) -> None:
    model = tiny_model(cell=cell)
    flat = FlatEngine(model, TorchOperations(torch.float32), CPU)
    flat.set_instruction(*prompt_of(model, 4))
    frames = frames_of(model, 3)
    first = [flat.step(frame) for frame in frames]
    kept = flat.step(frames[0])
    flat.reset()
    assert all(np.array_equal(flat.step(frame), expected) for frame, expected in zip(frames, first))
    assert np.abs(kept - first[0]).max() > TOLERANCE


def test_features_leave_the_state_as_it_is() -> None:
    model = tiny_model()
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
    model = tiny_model()
    own = EagerEngine(model) if engine == "eager" else FlatEngine(model, TorchOperations(torch.float32), CPU)
    own.set_instruction(*prompt_of(model, 4))
    frame = frames_of(model, 1)[0]
    expected = own.step(frame)
    bias = model.rnn.bias_ih_l0  # on the CPU, both engines read the model's own fp32 weights
    before = bias[0].item()
    bias[0] = float("nan")
    with pytest.raises(PolicyError, match="expected finite numbers"):
        own.step(frame)
    bias[0] = before
    assert np.array_equal(own.step(frame), expected)


def test_the_parts_make_up_a_step() -> None:
    model = tiny_model(fusion_in=128, fusion_features=("kosmos_text", "clip_text", "clip_image"))
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
def test_the_loaded_engine_is_reported(tiny_checkpoint, engine: str, dtype: str) -> None:
    facts = VlaPolicy.load(tiny_checkpoint, device="cpu", engine=engine, dtype=dtype).describe()
    assert (facts.engine, facts.engine_fallback) == ("flat" if engine == "auto" else engine, "")


def test_a_second_engine_is_made_from_the_model_of_the_first() -> None:
    """`auto` does that if the first engine fails. The meta device stands in for a GPU, to which weights are copied."""
    model = tiny_model()
    for _ in range(2):
        FlatEngine(model, TorchOperations(torch.float16), torch.device("meta"))


@pytest.mark.parametrize("operands", Operands)
def test_a_measured_tiling_divides_the_inner_axis(operands: Operands) -> None:
    """The kernels read whole blocks of the inner axis, without a mask."""
    for (_, columns, inner), tiling in MEASURED[operands].items():
        assert inner % (tiling.splits * tiling.block_inner) == 0, (columns, inner)


@pytest.mark.parametrize("rows", [16, 64, 78, 257])
@pytest.mark.parametrize(("columns", "inner"), [(96, 64), (2048, 1024), (1000, 48), (768, 3072)])
def test_a_tiling_by_the_rule_divides_the_inner_axis_and_does_not_crowd_the_device(rows, columns, inner) -> None:
    whole, split = (
        choose_tiling(Operands.SIXTEEN_BIT, rows, columns, inner, can_split=can_split, multiprocessors=132)
        for can_split in (False, True)
    )
    assert whole.splits == 1
    assert inner % (split.splits * split.block_inner) == 0
    blocks = -(-rows // block_rows(rows)) * -(-columns // split.block_columns)
    assert split.splits == 1 or blocks * split.splits <= 1.3 * 132


def test_a_published_size_takes_its_measured_tiling() -> None:
    tiling = choose_tiling(Operands.INT8, 78, 2048, 8192, can_split=True, multiprocessors=132)
    assert tiling == Tiling(block_columns=64, block_inner=128, splits=4, warps=8, stages=6)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_captured_step_equals_the_flat_step(kind: str, dtype: torch.dtype) -> None:
    from mobile_vla_inference.policy.engines.graph import GraphEngine

    gpu = torch.device("cuda")
    model = tiny_model(**VARIANTS[kind])
    captured = GraphEngine(model, TorchOperations(dtype), gpu)
    flat = FlatEngine(model, TorchOperations(dtype), gpu)
    for words in (4, 9, 4):  # the third instruction reuses the graph of the first one's length
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
@pytest.mark.parametrize("kind", VARIANTS)
def test_the_kernels_compute_what_torch_computes(kind: str, quantized: bool) -> None:
    """The fp16 kernels are as close to fp32 as fp16 allows; int8 rows of 64 numbers are rounded more."""
    pytest.importorskip("triton")
    from mobile_vla_inference.policy.engines.graph import GraphEngine
    from mobile_vla_inference.policy.engines.triton_operations import TritonOperations

    gpu = torch.device("cuda")
    model = tiny_model(**VARIANTS[kind])
    if quantized:
        model = with_int8_blocks(model)
    own = GraphEngine(model, TritonOperations(torch.float16, gpu), gpu)
    exact = FlatEngine(model, TorchOperations(torch.float32), gpu)
    for words in (4, 9):
        for engine in (own, exact):
            engine.set_instruction(*prompt_of(model, words))
            engine.reset()
        for frame in frames_of(model, 3):
            expected = exact.features(frame)
            limit = (3e-2 if quantized else 1e-2) * float(np.abs(expected).max())
            np.testing.assert_allclose(own.features(frame), expected, atol=limit)
            if not quantized:  # the recurrent cell magnifies the rounding of int8 from step to step
                np.testing.assert_allclose(own.step(frame), exact.step(frame), atol=2e-2)


@needs_gpu
@pytest.mark.parametrize(("rows", "columns", "inner"), [(78, 2048, 2048), (257, 1024, 4096), (16, 96, 64), (5, 64, 32)])
def test_a_product_of_int8_rows_is_the_product_of_its_integers(rows: int, columns: int, inner: int) -> None:
    """A LayerNorm rounds its rows to the nearest of 255 steps; the sums of the int8 product are exact."""
    pytest.importorskip("triton")
    from mobile_vla_inference.policy.engines.triton_operations import TritonOperations

    gpu = torch.device("cuda")
    generator = torch.Generator(gpu).manual_seed(rows)
    values, weight = (torch.randn(size, inner, device=gpu, generator=generator) for size in (rows, columns))
    scale = row_scales(weight)
    linear = Linear(quantize(weight, scale), torch.randn(columns, device=gpu, generator=generator), scale)
    norm = Norm(torch.rand(inner, device=gpu, generator=generator) + 0.5, torch.zeros(inner, device=gpu), 1e-5)
    operations = TritonOperations(torch.float16, gpu)
    rounded = operations.norm(values, norm, into=linear)
    exact = TorchOperations(torch.float32).norm(values, norm)
    found = rounded.values.float() * rounded.scale[:, None]
    assert ((found - exact).abs() <= (0.5 + 1e-3) * rounded.scale[:, None]).all()
    sums = rounded.values.double() @ linear.weight.double().T
    expected = sums * rounded.scale[:, None].double() * scale.double() + linear.bias.double()
    product = operations.linear(rounded, linear).double()
    torch.testing.assert_close(product, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


@needs_gpu
def test_a_compiled_step_equals_the_flat_step() -> None:
    from mobile_vla_inference.policy.engines.graph import GraphEngine

    gpu = torch.device("cuda")
    model = tiny_model()
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
def test_an_engine_that_fails_on_the_gpu_is_skipped_and_reported(tiny_checkpoint, monkeypatch, caplog) -> None:
    from mobile_vla_inference.policy.engines.graph import GraphEngine

    def fail(self: GraphEngine, frame: np.ndarray) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(GraphEngine, "step", fail)
    policy = VlaPolicy.load(tiny_checkpoint, device="cuda")
    assert policy.describe().engine == "flat"
    assert "no such kernel" in policy.describe().engine_fallback and "no such kernel" in caplog.text
