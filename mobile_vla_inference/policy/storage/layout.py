"""Which tensors a policy has, and their shapes, for every architecture variant.

The dimensions of every tensor are written with names of sizes, such as `kosmos_text.width`. With the sizes of a
HybridConfig they are the expected shapes; shape_inference.py compares them with a file's shapes to find the sizes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from mobile_vla_inference.policy.storage.config import HybridConfig, TextTower

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

#: A dimension is a number, or the name of a size such as `kosmos_text.width`.
_Pattern = dict[str, tuple[int | str, ...]]

KOSMOS_TEXT = "kosmos_model.text_model."
KOSMOS_VISION = "kosmos_model.vision_model."
RESAMPLER = "kosmos_model.image_to_text_projection."
CLIP_TEXT = "clip_model.text_model."
CLIP_VISION = "clip_model.vision_model."
FUSION = "feature_fusion."
RNN = "rnn."
HEAD = "actions.mlp."
PARTS = (KOSMOS_TEXT, KOSMOS_VISION, RESAMPLER, CLIP_TEXT, CLIP_VISION, FUSION, RNN, HEAD)

#: The first words of the tensors' names, and those that every architecture variant has.
PART_NAMES = ("kosmos_model", "clip_model", "feature_fusion", "rnn", "actions")
REQUIRED_PARTS = frozenset(("kosmos_model", "rnn", "actions"))

#: Matrices of the transformer blocks and the resampler: the large products of a step.
_BLOCK_MATRIX = re.compile(
    r"(?:kosmos_model|clip_model)\..*\.layers\.\d+\..*\.(?:[kqv]_proj|out_proj|fc[12])\.weight"
    r"|kosmos_model\.image_to_text_projection\.(?:dense|x_attn\.(?:[kqv]_proj|out_proj))\.weight"
)


def tensor_shapes(config: HybridConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of a policy by its published name, in the order of the module."""
    sizes = tensor_sizes(config)
    return {name: _fill(dimensions, sizes) for name, dimensions in tensor_pattern(structure_of(config)).items()}


def is_block_matrix(name: str) -> bool:
    """Return whether a tensor is the matrix of a Linear in a transformer block or the resampler: int8 is for these."""
    return _BLOCK_MATRIX.fullmatch(name) is not None


def is_token_embedding(name: str) -> bool:
    """Return whether a tensor is a tower's token embedding, of which a step reads a few rows."""
    return name.endswith((".embed_tokens.weight", ".token_embedding.weight"))


def parameter_counts(shapes: Shapes) -> dict[str, int]:
    """Return the number of parameters of each part (`kosmos_model.text_model`, ..., `rnn`, `actions`)."""
    counts: Counter[str] = Counter()
    for name, shape in shapes.items():
        parts = name.split(".")
        depth = 2 if parts[0] in ("kosmos_model", "clip_model") else 1
        counts[".".join(parts[:depth])] += math.prod(shape)
    return dict(counts)


@dataclass(frozen=True)
class Structure:
    """Which tensors a policy has, apart from their sizes; None if it lacks a tower."""

    kosmos_text_layers: int
    kosmos_vision_layers: int
    clip_text_layers: int | None
    clip_vision_layers: int | None
    logit_scale: bool
    fusion: bool
    cell_layers: int
    head: tuple[tuple[int, str], ...]  # (index, kind)


def structure_of(config: HybridConfig) -> Structure:
    """Return which tensors an architecture has."""
    return Structure(
        kosmos_text_layers=config.kosmos_text.num_layers,
        kosmos_vision_layers=config.kosmos_vision.num_layers,
        clip_text_layers=config.clip_text.num_layers if config.clip_text else None,
        clip_vision_layers=config.clip_vision.num_layers if config.clip_vision else None,
        logit_scale=config.clip_logit_scale,
        fusion=config.fusion_in is not None,
        cell_layers=config.cell.num_layers,
        head=tuple((layer.index, layer.kind) for layer in config.head),
    )


def tensor_sizes(config: HybridConfig) -> dict[str, int]:
    """Return the sizes that the tensors of an architecture show, by the names in `tensor_pattern`."""
    sizes = {
        "latents": config.latent_query_num,
        "cell.input": config.cell.input_size,
        "cell.hidden": config.cell.hidden_size,
        "cell.gate_rows": config.cell.gate_rows,
        **{f"head.{layer.index}": layer.out_features for layer in config.head if layer.kind == "linear"},
    }
    for name in ("kosmos_text", "kosmos_vision", "clip_text", "clip_vision"):
        tower = getattr(config, name)
        if tower is None:
            continue
        sizes |= {f"{name}.width": tower.hidden_size, f"{name}.ffn": tower.intermediate_size}
        if isinstance(tower, TextTower):
            sizes[f"{name}.vocabulary"] = tower.vocab_size
            if tower.max_positions is not None:
                sizes[f"{name}.positions"] = tower.max_positions
        else:
            sizes[f"{name}.patch"] = tower.patch_size
            sizes[f"{name}.positions"] = (tower.image_size // tower.patch_size) ** 2 + 1
    if config.clip_projection_dim is not None:
        sizes["clip.projection"] = config.clip_projection_dim
    if config.fusion_in is not None:
        sizes["fusion.input"] = config.fusion_in
    return sizes


def tensor_pattern(structure: Structure) -> _Pattern:
    """Return the dimensions of every tensor by its name: numbers, and names of sizes."""
    has_text, has_vision = structure.clip_text_layers is not None, structure.clip_vision_layers is not None
    pattern = _kosmos_text(structure.kosmos_text_layers)
    pattern |= _vision_tower(KOSMOS_VISION + "model.", "kosmos_vision", structure.kosmos_vision_layers)
    pattern |= _resampler()
    if structure.logit_scale:
        pattern["clip_model.logit_scale"] = ()
    if has_text:
        pattern |= _clip_text(structure.clip_text_layers)
    if has_vision:
        pattern |= _vision_tower(CLIP_VISION, "clip_vision", structure.clip_vision_layers)
        pattern["clip_model.visual_projection.weight"] = ("clip.projection", "clip_vision.width")
    if has_text:
        pattern["clip_model.text_projection.weight"] = ("clip.projection", "clip_text.width")
    if structure.fusion:
        pattern |= _linear("feature_fusion", "cell.input", "fusion.input")
    return pattern | _cell(structure.cell_layers) | _head(structure.head)


def _linear(name: str, outputs: int | str, inputs: int | str) -> _Pattern:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int | str) -> _Pattern:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _attention(name: str, width: str) -> _Pattern:
    pattern: _Pattern = {}
    for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
        pattern |= _linear(f"{name}.{projection}", width, width)
    return pattern


def _kosmos_text(layers: int) -> _Pattern:
    width, ffn = "kosmos_text.width", "kosmos_text.ffn"
    root = KOSMOS_TEXT + "model."
    pattern: _Pattern = {root + "embed_tokens.weight": ("kosmos_text.vocabulary", width)}
    for index in range(layers):
        layer = f"{root}layers.{index}."
        pattern |= _attention(layer + "self_attn", width)
        pattern |= _norm(layer + "self_attn.inner_attn_ln", width)
        pattern |= _norm(layer + "self_attn_layer_norm", width)
        pattern |= _linear(layer + "ffn.fc1", ffn, width) | _linear(layer + "ffn.fc2", width, ffn)
        pattern |= _norm(layer + "ffn.ffn_layernorm", ffn)
        pattern |= _norm(layer + "final_layer_norm", width)
    return pattern | _norm(root + "layer_norm", width)


def _encoder(root: str, tower: str, layers: int) -> _Pattern:
    width, ffn = f"{tower}.width", f"{tower}.ffn"
    pattern: _Pattern = {}
    for index in range(layers):
        layer = f"{root}encoder.layers.{index}."
        pattern |= _attention(layer + "self_attn", width)
        pattern |= _norm(layer + "layer_norm1", width)
        pattern |= _linear(layer + "mlp.fc1", ffn, width) | _linear(layer + "mlp.fc2", width, ffn)
        pattern |= _norm(layer + "layer_norm2", width)
    return pattern


def _vision_tower(root: str, tower: str, layers: int) -> _Pattern:
    width, patch = f"{tower}.width", f"{tower}.patch"
    return {
        root + "embeddings.class_embedding": (width,),
        root + "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        root + "embeddings.position_embedding.weight": (f"{tower}.positions", width),
        **_norm(root + "pre_layrnorm", width),  # this spelling is in the published names
        **_encoder(root, tower, layers),
        **_norm(root + "post_layernorm", width),
    }


def _clip_text(layers: int) -> _Pattern:
    width = "clip_text.width"
    return {
        CLIP_TEXT + "embeddings.token_embedding.weight": ("clip_text.vocabulary", width),
        CLIP_TEXT + "embeddings.position_embedding.weight": ("clip_text.positions", width),
        **_encoder(CLIP_TEXT, "clip_text", layers),
        **_norm(CLIP_TEXT + "final_layer_norm", width),
    }


def _resampler() -> _Pattern:
    width = "kosmos_text.width"
    return {
        RESAMPLER + "latent_query": ("latents", width),
        **_linear(RESAMPLER + "dense", width, "kosmos_vision.width"),
        **_attention(RESAMPLER + "x_attn", width),
    }


def _cell(layers: int) -> _Pattern:
    pattern: _Pattern = {}
    for layer in range(layers):
        inputs = "cell.hidden" if layer else "cell.input"
        pattern[f"rnn.weight_ih_l{layer}"] = ("cell.gate_rows", inputs)
        pattern[f"rnn.weight_hh_l{layer}"] = ("cell.gate_rows", "cell.hidden")
        pattern[f"rnn.bias_ih_l{layer}"] = ("cell.gate_rows",)
        pattern[f"rnn.bias_hh_l{layer}"] = ("cell.gate_rows",)
    return pattern


def _head(layers: tuple[tuple[int, str], ...]) -> _Pattern:
    pattern: _Pattern = {}
    width = "cell.hidden"
    for index, kind in layers:
        if kind == "linear":
            outputs = f"head.{index}"
            pattern |= _linear(f"{HEAD}{index}", outputs, width)
            width = outputs
        else:
            pattern |= _norm(f"{HEAD}{index}", width)
    return pattern


def _fill(dimensions: tuple[int | str, ...], sizes: Mapping[str, int]) -> Shape:
    return tuple(sizes[dimension] if isinstance(dimension, str) else dimension for dimension in dimensions)
