"""Find the sizes of a policy's architecture by the names and shapes of its tensors.

Each tensor votes for the sizes that its shape shows. So one wrong tensor is reported as that tensor, and not as another
architecture.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.config import (
    CELL_GATES,
    SIZES,
    Cell,
    HeadLayer,
    HybridConfig,
    TextTower,
    VisionTower,
    standard_config,
)
from mobile_vla_inference.policy.storage.layout import (
    CLIP_TEXT,
    CLIP_VISION,
    FUSION,
    HEAD,
    KOSMOS_TEXT,
    KOSMOS_VISION,
    Shape,
    Shapes,
    Structure,
    structure_of,
    tensor_pattern,
    tensor_shapes,
    tensor_sizes,
)
from mobile_vla_inference.policy.storage.misfits import misfit_message

#: Names that training scripts use for the number of recurrent layers.
_LAYERS_ARGUMENT = re.compile(r"(?:num_|n_)?(?:lstm|gru|rnn)_(?:num_|n_)?layers")
_MAX_LAYERS = 1000


def infer_config(shapes: Shapes, source: str = "the checkpoint") -> HybridConfig:
    """Return the architecture of a checkpoint by the shapes of its tensors.

    Args:
        shapes: shape of each tensor, without prefixes and tensors that inference never uses.
        source: name of the file in messages.

    Raises:
        CheckpointError: the tensors fit no architecture variant; the message ends with a table of the tensors that are
            missing, unexpected, or of a wrong shape.
    """
    nearest_name, nearest = _nearest_named_config(shapes)
    structure = _read_structure(shapes, structure_of(nearest))
    pattern = tensor_pattern(structure)
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for name, dimensions in pattern.items():
        found = shapes.get(name, ())
        if len(found) == len(dimensions):
            for dimension, length in zip(dimensions, found):
                if isinstance(dimension, str) and length > 0:
                    votes[dimension][length] += 1
    defaults = tensor_sizes(nearest)
    needed = {dimension for dimensions in pattern.values() for dimension in dimensions if isinstance(dimension, str)}
    sizes = {size: votes[size].most_common(1)[0][0] if size in votes else defaults.get(size, 1) for size in needed}
    config = _config(structure, sizes)
    message = misfit_message(shapes, tensor_shapes(config), source, nearest_name)
    if message:
        raise CheckpointError(message)
    if config.head[-1].kind != "linear":
        raise CheckpointError(
            f"{source} ends its head with a LayerNorm at {HEAD}{config.head[-1].index}, expected a Linear to the "
            f"actions after it; check that the file is whole"
        )
    return config


def check_recurrent_layers(config: HybridConfig, trained: Sequence[Shape], args: object, source: str) -> None:
    """Refuse a checkpoint without its last recurrent layers: its tensors alone fit an architecture with fewer layers.

    Args:
        config: sizes that the tensors show.
        trained: shapes of the parameters that the optimizer has moments of, in order; empty if the file has none.
        args: training arguments as a dict, if the file has them.
        source: name of the file in messages.

    Raises:
        CheckpointError: the optimizer trained more recurrent layers than the file has, or the arguments name more.
    """
    found = config.cell.num_layers
    claims = {"its optimizer trained": _recurrent_layers_in(config.cell, trained)}
    if isinstance(args, Mapping):
        named = {key: value for key, value in args.items() if _LAYERS_ARGUMENT.fullmatch(str(key))}
        claims |= {f"its training argument {key} names": v for key, v in named.items() if type(v) is int}
    source_of_claim, expected = max(claims.items(), key=lambda claim: claim[1])
    if expected > found:
        names = f"rnn.*_l{found}" + (f" to rnn.*_l{expected - 1}" if expected > found + 1 else "")
        raise CheckpointError(
            f"{source} has {found} recurrent layers, expected the {expected} that {source_of_claim}; {names} are "
            f"missing: give the whole file"
        )


def _recurrent_layers_in(cell: Cell, trained: Sequence[Shape]) -> int:
    """Return how many recurrent layers (2 matrices, 2 biases) follow each other in a list of shapes."""
    rows, hidden = cell.gate_rows, cell.hidden_size
    layer = ((rows, hidden), (rows, hidden), (rows,), (rows,))
    first = ((rows, cell.input_size), *layer[1:])
    longest = 0
    for start in range(len(trained)):
        depth, place = 0, start
        while tuple(trained[place : place + 4]) == (layer if depth else first):
            depth, place = depth + 1, place + 4
        longest = max(longest, depth)
    return longest


def _config(structure: Structure, sizes: Mapping[str, int]) -> HybridConfig:
    has_clip = structure.clip_text_layers is not None or structure.clip_vision_layers is not None
    hidden = sizes["cell.hidden"]
    gates = round(sizes["cell.gate_rows"] / hidden)
    kind = next((name for name, count in CELL_GATES.items() if count == gates), "lstm")
    return HybridConfig(
        kosmos_text=_text_tower("kosmos_text", structure.kosmos_text_layers, sizes),
        kosmos_vision=_vision_sizes("kosmos_vision", structure.kosmos_vision_layers, sizes),
        latent_query_num=sizes["latents"],
        cell=Cell(kind, sizes["cell.input"], hidden, structure.cell_layers),
        head=_head_layers(structure, sizes),
        clip_text=_text_tower("clip_text", structure.clip_text_layers, sizes),
        clip_vision=_vision_sizes("clip_vision", structure.clip_vision_layers, sizes),
        clip_projection_dim=sizes["clip.projection"] if has_clip else None,
        clip_logit_scale=structure.logit_scale,
        fusion_in=sizes["fusion.input"] if structure.fusion else None,
        fusion_out=sizes["cell.input"] if structure.fusion else None,
    )


def _text_tower(name: str, layers: int | None, sizes: Mapping[str, int]) -> TextTower | None:
    if layers is None:
        return None
    return TextTower(
        sizes[f"{name}.vocabulary"],
        sizes[f"{name}.width"],
        sizes[f"{name}.ffn"],
        layers,
        sizes.get(f"{name}.positions"),
    )


def _vision_sizes(name: str, layers: int | None, sizes: Mapping[str, int]) -> VisionTower | None:
    if layers is None:
        return None
    patch = sizes[f"{name}.patch"]
    image_size = max(round(math.sqrt(sizes[f"{name}.positions"] - 1)), 1) * patch  # a grid of patches and a class token
    return VisionTower(sizes[f"{name}.width"], sizes[f"{name}.ffn"], layers, image_size, patch)


def _head_layers(structure: Structure, sizes: Mapping[str, int]) -> tuple[HeadLayer, ...]:
    layers, width = [], sizes["cell.hidden"]
    for index, kind in structure.head:
        outputs = sizes[f"head.{index}"] if kind == "linear" else width
        layers.append(HeadLayer(index, kind, width, outputs))
        width = outputs
    return tuple(layers)


def _read_structure(shapes: Shapes, nearest: Structure) -> Structure:
    """Return which tensors the checkpoint should have, by the names in it; `nearest` decides what no name shows."""
    has_text = any(name.startswith((CLIP_TEXT, "clip_model.text_projection.")) for name in shapes)
    has_vision = any(name.startswith((CLIP_VISION, "clip_model.visual_projection.")) for name in shapes)
    has_fusion = any(name.startswith(FUSION) for name in shapes)
    text_depth = _depth(shapes, CLIP_TEXT + "encoder.layers.") or nearest.clip_text_layers or 1
    vision_depth = _depth(shapes, CLIP_VISION + "encoder.layers.") or nearest.clip_vision_layers or 1
    return Structure(
        kosmos_text_layers=_depth(shapes, KOSMOS_TEXT + "model.layers.") or nearest.kosmos_text_layers,
        kosmos_vision_layers=_depth(shapes, KOSMOS_VISION + "model.encoder.layers.") or nearest.kosmos_vision_layers,
        clip_text_layers=text_depth if has_text else None,
        clip_vision_layers=vision_depth if has_vision else None,
        logit_scale="clip_model.logit_scale" in shapes,
        fusion=has_fusion or has_text or has_vision,  # no part reads CLIP's features without a fusion layer
        cell_layers=_depth(shapes, r"rnn.weight_ih_l", r"rnn.weight_hh_l", "rnn.bias_ih_l", "rnn.bias_hh_l")
        or nearest.cell_layers,
        head=_read_head(shapes, nearest) or nearest.head,
    )


def _depth(shapes: Shapes, *before_number: str) -> int:
    """Return one more than the highest number that follows one of the beginnings; 0 if no name has one."""
    pattern = re.compile(f"(?:{'|'.join(map(re.escape, before_number))})(\\d{{1,4}})(?:\\.|$)")
    numbers = (int(match[1]) for match in map(pattern.match, shapes) if match)
    return max((number + 1 for number in numbers if number < _MAX_LAYERS), default=0)


def _read_head(shapes: Shapes, nearest: Structure) -> tuple[tuple[int, str], ...]:
    depth = _depth(shapes, HEAD)
    kinds = dict(nearest.head)
    layers = []
    for index in range(depth):
        weight = shapes.get(f"{HEAD}{index}.weight")
        if weight is not None:
            layers.append((index, "layer_norm" if len(weight) == 1 else "linear"))
        elif f"{HEAD}{index}.bias" in shapes:
            layers.append((index, kinds.get(index, "linear")))
    return tuple(layers)


def _nearest_named_config(shapes: Shapes) -> tuple[str, HybridConfig]:
    """Return the named configuration that has most tensor names and shapes in common with `shapes`, and its name."""
    configs = {
        f"{size} {variant}": standard_config(size, variant)
        for size in reversed(SIZES)
        for variant in ("hybrid", "pure")
    }

    def likeness(name: str) -> float:
        expected = tensor_shapes(configs[name])
        shared = shapes.keys() & expected.keys()
        same = sum(tuple(shapes[tensor]) == expected[tensor] for tensor in shared)
        return (len(shared) + same) / (len(shapes) + len(expected))

    name = max(configs, key=likeness)
    return name, configs[name]
