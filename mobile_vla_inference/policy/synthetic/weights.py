"""Random weights for a synthetic checkpoint, scaled so that actions depend on frame, instruction and history.

Each parameter has its own random stream, by seed and name, and is drawn in chunks: the published size needs no more
memory than a tiny one. Parts that all frames have in common (positions, class tokens) are small compared with those
that differ. A wide LSTM has gains at which a rounding error decreases from step to step. In small checkpoints the
common part is larger, so the gains are higher, and the last layer is centred on a few synthetic scenes: small
differences reach the actions.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.preprocess import FrameNormalizer, InstructionEncoder
from mobile_vla_inference.policy.storage.checkpoint_files import processor_folders
from mobile_vla_inference.policy.storage.config import HybridConfig
from mobile_vla_inference.policy.storage.layout import tensor_shapes
from mobile_vla_inference.policy.storage.settings import PolicySettings

_CHUNK_VALUES = 1 << 22

# Gains over 1 / sqrt(inputs) and standard deviations, chosen on real camera frames at all three sizes.
_GAIN_RESIDUAL = 0.7
_GAIN_CLIP_PROJECTION = 0.5
_GAIN_LATENT_QUERY = 2.0
_GAIN_LSTM_INPUT = 6.0
_GAIN_LSTM_RECURRENT = 1.0
_GAIN_WIDE_LSTM_INPUT = 2.0
_GAIN_WIDE_LSTM_RECURRENT = 0.5
_GAIN_RELU = 2.0**0.5
_STD_VISION_POSITION = 0.1
_STD_CLASS_TOKEN = 0.05
_STD_LATENT_QUERY = 0.1
_STD_KOSMOS_TOKEN = 0.01
_LOGIT_SCALE = 4.6052  # ln 100, where CLIP's training ends

#: Hidden units from which an LSTM has the gains of a wide one.
_WIDE_HIDDEN_SIZE = 512

_SCENES = 24
_SCENE_INSTRUCTIONS = ("go to the cup", "박스를 왼쪽으로 돌아서 컵까지 가세요")
_CENTRED_STD = 0.4


def parameter_values(name: str, shape: tuple[int, ...], config: HybridConfig, seed: int) -> Iterator[np.ndarray]:
    """Yield a parameter's values in chunks, fp32."""
    std, constant = _distribution(name, shape, config)
    count = int(np.prod(shape, dtype=np.int64))
    return normal_values(name, count, std, seed) if std else filled_values(count, constant)


def normal_values(name: str, count: int, std: float, seed: int) -> Iterator[np.ndarray]:
    """Yield normal values in chunks, fp32; the name and the seed determine them."""
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    for size in _chunk_sizes(count):
        values = generator.standard_normal(size, dtype=np.float32)
        values *= np.float32(std)
        yield values


def filled_values(count: int, value: float) -> Iterator[np.ndarray]:
    """Yield one value, `count` times, in chunks, fp32."""
    for size in _chunk_sizes(count):
        yield np.full(size, value, dtype=np.float32)


def centred_last_layer(
    config: HybridConfig, settings: PolicySettings, seed: int, processors: Path
) -> dict[str, np.ndarray]:
    """Return parameters of the last layer with which actions over synthetic scenes have mean 0 and an equal spread.

    Runs the whole policy in memory: only for small ones. Corrections are rounded, so that the order of sums on another
    machine doesn't change them.
    """
    model = HybridModel(config, settings)
    tensors = {
        name: torch.from_numpy(np.concatenate(list(parameter_values(name, shape, config, seed)))).view(shape)
        for name, shape in tensor_shapes(config).items()
    }
    model.load_state_dict(tensors)
    last = config.head[-1].index
    values = _last_layer_outputs(
        model, last, InstructionEncoder(processor_folders(processors, config), config, settings)
    )
    scale = (_CENTRED_STD / values.std(dim=1).mean(dim=0)).clamp(0.5, 3.0).numpy().round(2)
    shift = (-values.mean(dim=(0, 1)).numpy() * scale).round(2)
    weight, bias = f"actions.mlp.{last}.weight", f"actions.mlp.{last}.bias"
    return {weight: tensors[weight].numpy() * scale[:, None], bias: shift}


@torch.inference_mode()
def _last_layer_outputs(model: HybridModel, last: int, encoder: InstructionEncoder) -> torch.Tensor:
    """Run the scenes as one episode per instruction; return [instructions, scenes, actions] before any tanh."""
    if encoder.clip_eos_token_id is not None:
        model.set_clip_eos_token_id(encoder.clip_eos_token_id)
    normalize = FrameNormalizer(model.settings, "cpu", torch.float32)
    pixel_values = torch.cat([normalize(scene) for scene in _scenes(model.config.image_size)])
    outputs = []
    for instruction in _SCENE_INSTRUCTIONS:
        text = model.clip_text_feature(encoder.clip_ids(instruction)) if model.reads_clip_text else None
        features = model.fused_features(pixel_values, encoder.prompt(instruction), text)
        cell_outputs, _ = model.rnn(features, model.initial_hidden_state())
        outputs.append(model.actions.mlp[: last + 1](cell_outputs))
    return torch.stack(outputs)


def _scenes(size_px: int) -> Iterator[np.ndarray]:
    """Draw scenes: a floor of one colour with a line on it, coarse clutter above. uint8 RGB [size, size, 3]."""
    generator = np.random.default_rng(0)
    horizon = size_px * 2 // 5
    rows, columns = np.mgrid[0:size_px, 0:size_px]
    depth = (rows - horizon) / (size_px - horizon)  # 0 at the horizon, 1 at the bottom
    for _ in range(_SCENES):
        scene = np.empty((size_px, size_px, 3))
        clutter = generator.integers(0, 256, (3, 10, 3)) * generator.uniform(0.2, 1.0)
        scene[:horizon] = clutter[rows[:horizon] * 3 // horizon, columns[:horizon] * 10 // size_px]
        scene[horizon:] = generator.uniform(60, 150) + generator.normal(0, 15, 3)
        far, near = generator.uniform(0, size_px, 2)
        width = size_px * generator.uniform(0.02, 0.08)
        line = (rows >= horizon) & (np.abs(columns - far - (near - far) * depth) < width * (0.2 + depth))
        scene[line] = (255, 220, 60) if generator.random() < 0.5 else (240, 240, 240)
        yield scene.clip(0, 255).astype(np.uint8)


def _chunk_sizes(count: int) -> Iterator[int]:
    for start in range(0, count, _CHUNK_VALUES):
        yield min(_CHUNK_VALUES, count - start)


def _distribution(name: str, shape: tuple[int, ...], config: HybridConfig) -> tuple[float, float]:
    """Return the standard deviation of a parameter's values, and the value of all of them if that is 0."""
    if name.endswith("logit_scale"):
        return 0.0, _LOGIT_SCALE
    if name.endswith("bias") or ".bias_" in name:
        return 0.0, 0.0
    if name.endswith("class_embedding"):
        return _STD_CLASS_TOKEN, 0.0
    if len(shape) == 1:  # the weight of a LayerNorm
        return 0.0, 1.0
    if name.endswith("embed_tokens.weight"):
        return _STD_KOSMOS_TOKEN, 0.0
    if name.endswith("position_embedding.weight"):
        return (_STD_VISION_POSITION if "vision_model" in name else 1.0), 0.0
    if name.endswith(("token_embedding.weight", "image_to_text_projection.dense.weight")):
        return 1.0, 0.0  # the image features before `dense` have length 1
    if name.endswith("latent_query"):
        return _STD_LATENT_QUERY, 0.0
    return _gain(name, config) / float(np.prod(shape[1:])) ** 0.5, 0.0


def _gain(name: str, config: HybridConfig) -> float:
    if name.startswith("actions.mlp."):
        return _head_gain(name, config)
    if name.startswith("rnn."):
        is_wide = config.cell.hidden_size >= _WIDE_HIDDEN_SIZE
        if ".weight_ih_" in name:
            return _GAIN_WIDE_LSTM_INPUT if is_wide else _GAIN_LSTM_INPUT
        return _GAIN_WIDE_LSTM_RECURRENT if is_wide else _GAIN_LSTM_RECURRENT
    if name.startswith("clip_model.") and name.endswith("_projection.weight"):
        return _GAIN_CLIP_PROJECTION
    if name.endswith("image_to_text_projection.x_attn.q_proj.weight"):
        return _GAIN_LATENT_QUERY / _STD_LATENT_QUERY
    if ".layers." in name and name.endswith(("out_proj.weight", "fc2.weight")):
        return _GAIN_RESIDUAL
    return 1.0


def _head_gain(name: str, config: HybridConfig) -> float:
    """Return a head layer's gain; without LayerNorm it compensates the halving by each ReLU."""
    if any(layer.kind == "layer_norm" for layer in config.head):
        return 1.0
    is_last = name == f"actions.mlp.{config.head[-1].index}.weight"
    return 2.0 if is_last else _GAIN_RELU
