"""The family of checkpoints: which tensors a member has, and which member a set of tensor shapes is. No torch.

One description serves both directions: every tensor's dimensions are written with names of sizes. Filled in from a
HybridConfig they are the expected shapes; matched with a file's shapes, each tensor votes for the sizes that it shows,
so that one wrong tensor is reported as that one, and not as a member of another size.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.config import (
    FUSION_FEATURES,
    SIZES,
    Cell,
    HeadLayer,
    HybridConfig,
    PolicySettings,
    TextTower,
    VisionTower,
    family_member,
)

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

#: A dimension is a number, or the name of a size such as `kosmos_text.width`.
_Pattern = dict[str, tuple[int | str, ...]]

_KOSMOS_TEXT = "kosmos_model.text_model."
_KOSMOS_VISION = "kosmos_model.vision_model."
_RESAMPLER = "kosmos_model.image_to_text_projection."
_CLIP_TEXT = "clip_model.text_model."
_CLIP_VISION = "clip_model.vision_model."
_FUSION = "feature_fusion."
_RNN = "rnn."
_HEAD = "actions.mlp."
_PARTS = (_KOSMOS_TEXT, _KOSMOS_VISION, _RESAMPLER, _CLIP_TEXT, _CLIP_VISION, _FUSION, _RNN, _HEAD)

#: The first words of a member's tensors' names, and those that every member has.
PART_NAMES = ("kosmos_model", "clip_model", "feature_fusion", "rnn", "actions")
REQUIRED_PARTS = frozenset(("kosmos_model", "rnn", "actions"))

_CELL_GATES = {"lstm": 4, "gru": 3, "rnn": 1}

#: The combinations that the published notes describe; they win where another sum of widths would fit too.
_DOCUMENTED_FUSIONS = (("kosmos_text", "clip_text"), ("kosmos_text", "clip_text", "clip_image"))

#: Matrices of the transformer blocks and the resampler: the large products of a step.
_BLOCK_MATRIX = re.compile(
    r"(?:kosmos_model|clip_model)\..*\.layers\.\d+\..*\.(?:[kqv]_proj|out_proj|fc[12])\.weight"
    r"|kosmos_model\.image_to_text_projection\.(?:dense|x_attn\.(?:[kqv]_proj|out_proj))\.weight"
)

#: How a training script can call the number of its cell's layers.
_CELL_DEPTH_ARGUMENT = re.compile(r"(?:num_|n_)?(?:lstm|gru|rnn)_(?:num_|n_)?layers")

_MAX_LAYERS = 1000
_MAX_TABLE_ROWS = 40
_MAX_NAME_SHOWN = 120


def tensor_shapes(config: HybridConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of a member by its published name, in the order of the module."""
    sizes = _sizes(config)
    return {name: _fill(dimensions, sizes) for name, dimensions in _pattern(_structure_of(config)).items()}


def infer_config(shapes: Shapes, source: str = "the checkpoint") -> HybridConfig:
    """Read every size of a member from the shapes of its tensors.

    Args:
        shapes: shape of each tensor, without prefixes and dead weight.
        source: what the message calls the file.

    Raises:
        CheckpointError: the tensors fit no member; the message ends with a table of what is missing, unexpected, or of
            a wrong shape.
    """
    nearest_name, nearest = _nearest_member(shapes)
    structure = _read_structure(shapes, _structure_of(nearest))
    pattern = _pattern(structure)
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for name, dimensions in pattern.items():
        found = shapes.get(name, ())
        if len(found) == len(dimensions):
            for dimension, length in zip(dimensions, found):
                if isinstance(dimension, str) and length > 0:
                    votes[dimension][length] += 1
    defaults = _sizes(nearest)
    needed = {dimension for dimensions in pattern.values() for dimension in dimensions if isinstance(dimension, str)}
    sizes = {size: votes[size].most_common(1)[0][0] if size in votes else defaults.get(size, 1) for size in needed}
    config = _config(structure, sizes)
    rows = _misfits(shapes, tensor_shapes(config))
    if rows:
        raise CheckpointError(_misfit_message(source, rows, nearest_name))
    if config.head[-1].kind != "linear":
        raise CheckpointError(
            f"{source} ends its head with a LayerNorm at {_HEAD}{config.head[-1].index}, expected a Linear to the "
            f"actions after it; check that the file is whole"
        )
    return config


def check_trained_cell_depth(config: HybridConfig, trained: Sequence[Shape], args: object, source: str) -> None:
    """Refuse a member that has lost its cell's last layers: its tensors alone are those of a shallower member.

    Args:
        config: what the tensors say.
        trained: shapes of the parameters that the optimizer has moments of, in order; empty where the file has none.
        args: training arguments as a dict, where the file has them.
        source: what the message calls the file.

    Raises:
        CheckpointError: the optimizer trained more cell layers than there are, or the arguments name more.
    """
    found = config.cell.num_layers
    claims = {"its optimizer trained": _longest_cell(config.cell, trained)}
    if isinstance(args, Mapping):
        named = {key: value for key, value in args.items() if _CELL_DEPTH_ARGUMENT.fullmatch(str(key))}
        claims |= {f"its training argument {key} says": v for key, v in named.items() if type(v) is int}
    said_by, expected = max(claims.items(), key=lambda claim: claim[1])
    if expected > found:
        names = f"rnn.*_l{found}" + (f" to rnn.*_l{expected - 1}" if expected > found + 1 else "")
        raise CheckpointError(
            f"{source} has {found} layers of its cell, expected the {expected} that {said_by}; {names} are missing: "
            f"give the whole file"
        )


def _longest_cell(cell: Cell, trained: Sequence[Shape]) -> int:
    """Return how many layers of the cell follow each other in a list of shapes: 2 matrices and 2 biases for each."""
    rows, hidden = _CELL_GATES[cell.kind] * cell.hidden_size, cell.hidden_size
    layer = ((rows, hidden), (rows, hidden), (rows,), (rows,))
    first = ((rows, cell.input_size), *layer[1:])
    longest = 0
    for start in range(len(trained)):
        depth, place = 0, start
        while tuple(trained[place : place + 4]) == (layer if depth else first):
            depth, place = depth + 1, place + 4
        longest = max(longest, depth)
    return longest


def is_block_matrix(name: str) -> bool:
    """Tell whether a tensor is the matrix of a Linear in a transformer block or the resampler: int8 is for these."""
    return _BLOCK_MATRIX.fullmatch(name) is not None


def is_token_embedding(name: str) -> bool:
    """Tell whether a tensor is a tower's table of tokens, of which a step reads a few rows."""
    return name.endswith((".embed_tokens.weight", ".token_embedding.weight"))


def with_layers(config: HybridConfig, layers: Mapping[str, int]) -> HybridConfig:
    """Return a member whose towers (`kosmos_text`, ...) have the numbers of layers in `layers`."""
    towers = {name: replace(getattr(config, name), num_layers=count) for name, count in layers.items()}
    return replace(config, **towers)


def solve_fusion_features(config: HybridConfig, settings: PolicySettings | None = None) -> tuple[str, ...]:
    """Return the features that the fusion layer (the cell, in the pure variant) reads, in order.

    The setting `fusion_features` decides; without it the documented combinations (Kosmos text and CLIP text, then with
    the CLIP image), and else the one combination of features whose widths add up.

    Raises:
        CheckpointError: the setting doesn't add up, or no or more than one combination does.
    """
    settings = settings or PolicySettings()
    expected = config.cell.input_size if config.fusion_in is None else config.fusion_in
    widths = dict(config.feature_widths)
    if config.clip_text is not None and settings.clip_text_feature == "pooled":
        widths["clip_text"] = config.clip_text.hidden_size

    def fits(names: Iterable[str]) -> bool:
        return all(name in widths for name in names) and sum(widths[name] for name in names) == expected

    reader = "the cell reads" if config.fusion_in is None else "the fusion layer reads"
    known = ", ".join(f"{name} {width}" for name, width in widths.items())
    if settings.fusion_features is not None:
        if not fits(settings.fusion_features):
            raise CheckpointError(
                f"setting fusion_features is {list(settings.fusion_features)}, but {reader} {expected} values, "
                f"expected features of this checkpoint ({known}) that add up to it; correct it in policy.json"
            )
        return settings.fusion_features
    documented = (("kosmos_text",),) if config.fusion_in is None else _DOCUMENTED_FUSIONS
    for names in documented:
        if fits(names):
            return names
    candidates = [
        names
        for count in range(1, len(FUSION_FEATURES) + 1)
        for names in combinations(FUSION_FEATURES, count)
        if fits(names)
    ]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise CheckpointError(
            f"{reader} {expected} values, which no combination of features gives, expected a sum of {known}; "
            f"check that the file is the right one"
        )
    listed = " or ".join(" + ".join(names) for names in candidates)
    raise CheckpointError(
        f"{reader} {expected} values, which {len(candidates)} combinations of features give, expected one: {listed}; "
        f"name the right one in the setting fusion_features in policy.json"
    )


def parameter_counts(shapes: Shapes) -> dict[str, int]:
    """Return the number of parameters of each part (`kosmos_model.text_model`, ..., `rnn`, `actions`)."""
    counts: Counter[str] = Counter()
    for name, shape in shapes.items():
        parts = name.split(".")
        depth = 2 if parts[0] in ("kosmos_model", "clip_model") else 1
        counts[".".join(parts[:depth])] += math.prod(shape)
    return dict(counts)


# --- the description of a member's tensors ---


@dataclass(frozen=True)
class _Structure:
    """Which tensors a member has, apart from their sizes; None where a tower is absent."""

    kosmos_text_layers: int
    kosmos_vision_layers: int
    clip_text_layers: int | None
    clip_vision_layers: int | None
    logit_scale: bool
    fusion: bool
    cell_layers: int
    head: tuple[tuple[int, str], ...]  # (index, kind)


def _pattern(structure: _Structure) -> _Pattern:
    has_text, has_vision = structure.clip_text_layers is not None, structure.clip_vision_layers is not None
    pattern = _kosmos_text(structure.kosmos_text_layers)
    pattern |= _vision_tower(_KOSMOS_VISION + "model.", "kosmos_vision", structure.kosmos_vision_layers)
    pattern |= _resampler()
    if structure.logit_scale:
        pattern["clip_model.logit_scale"] = ()
    if has_text:
        pattern |= _clip_text(structure.clip_text_layers)
    if has_vision:
        pattern |= _vision_tower(_CLIP_VISION, "clip_vision", structure.clip_vision_layers)
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
    root = _KOSMOS_TEXT + "model."
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
        **_norm(root + "pre_layrnorm", width),  # the published names spell it so
        **_encoder(root, tower, layers),
        **_norm(root + "post_layernorm", width),
    }


def _clip_text(layers: int) -> _Pattern:
    width = "clip_text.width"
    return {
        _CLIP_TEXT + "embeddings.token_embedding.weight": ("clip_text.vocabulary", width),
        _CLIP_TEXT + "embeddings.position_embedding.weight": ("clip_text.positions", width),
        **_encoder(_CLIP_TEXT, "clip_text", layers),
        **_norm(_CLIP_TEXT + "final_layer_norm", width),
    }


def _resampler() -> _Pattern:
    width = "kosmos_text.width"
    return {
        _RESAMPLER + "latent_query": ("latents", width),
        **_linear(_RESAMPLER + "dense", width, "kosmos_vision.width"),
        **_attention(_RESAMPLER + "x_attn", width),
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
            pattern |= _linear(f"{_HEAD}{index}", outputs, width)
            width = outputs
        else:
            pattern |= _norm(f"{_HEAD}{index}", width)
    return pattern


# --- between a config and the description ---


def _structure_of(config: HybridConfig) -> _Structure:
    return _Structure(
        kosmos_text_layers=config.kosmos_text.num_layers,
        kosmos_vision_layers=config.kosmos_vision.num_layers,
        clip_text_layers=config.clip_text.num_layers if config.clip_text else None,
        clip_vision_layers=config.clip_vision.num_layers if config.clip_vision else None,
        logit_scale=config.clip_logit_scale,
        fusion=config.fusion_in is not None,
        cell_layers=config.cell.num_layers,
        head=tuple((layer.index, layer.kind) for layer in config.head),
    )


def _sizes(config: HybridConfig) -> dict[str, int]:
    """Return the sizes that a member's tensors show, by the names of the description."""
    sizes = {
        "latents": config.latent_query_num,
        "cell.input": config.cell.input_size,
        "cell.hidden": config.cell.hidden_size,
        "cell.gate_rows": _CELL_GATES[config.cell.kind] * config.cell.hidden_size,
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


def _fill(dimensions: tuple[int | str, ...], sizes: Mapping[str, int]) -> Shape:
    return tuple(sizes[dimension] if isinstance(dimension, str) else dimension for dimension in dimensions)


def _config(structure: _Structure, sizes: Mapping[str, int]) -> HybridConfig:
    has_clip = structure.clip_text_layers is not None or structure.clip_vision_layers is not None
    hidden = sizes["cell.hidden"]
    gates = round(sizes["cell.gate_rows"] / hidden)
    kind = next((name for name, count in _CELL_GATES.items() if count == gates), "lstm")
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


def _head_layers(structure: _Structure, sizes: Mapping[str, int]) -> tuple[HeadLayer, ...]:
    layers, width = [], sizes["cell.hidden"]
    for index, kind in structure.head:
        outputs = sizes[f"head.{index}"] if kind == "linear" else width
        layers.append(HeadLayer(index, kind, width, outputs))
        width = outputs
    return tuple(layers)


# --- from names and shapes to the structure ---


def _read_structure(shapes: Shapes, nearest: _Structure) -> _Structure:
    """Read which tensors a member should have from the names that are there; what is missing as in `nearest`."""
    has_text = any(name.startswith((_CLIP_TEXT, "clip_model.text_projection.")) for name in shapes)
    has_vision = any(name.startswith((_CLIP_VISION, "clip_model.visual_projection.")) for name in shapes)
    has_fusion = any(name.startswith(_FUSION) for name in shapes)
    text_depth = _depth(shapes, _CLIP_TEXT + "encoder.layers.") or nearest.clip_text_layers or 1
    vision_depth = _depth(shapes, _CLIP_VISION + "encoder.layers.") or nearest.clip_vision_layers or 1
    return _Structure(
        kosmos_text_layers=_depth(shapes, _KOSMOS_TEXT + "model.layers.") or nearest.kosmos_text_layers,
        kosmos_vision_layers=_depth(shapes, _KOSMOS_VISION + "model.encoder.layers.") or nearest.kosmos_vision_layers,
        clip_text_layers=text_depth if has_text else None,
        clip_vision_layers=vision_depth if has_vision else None,
        logit_scale="clip_model.logit_scale" in shapes,
        fusion=has_fusion or has_text or has_vision,  # CLIP without a fusion layer would be read by nothing
        cell_layers=_depth(shapes, r"rnn.weight_ih_l", r"rnn.weight_hh_l", "rnn.bias_ih_l", "rnn.bias_hh_l")
        or nearest.cell_layers,
        head=_read_head(shapes, nearest) or nearest.head,
    )


def _depth(shapes: Shapes, *before_number: str) -> int:
    """Return one more than the highest number that follows one of the beginnings; 0 where none does."""
    pattern = re.compile(f"(?:{'|'.join(map(re.escape, before_number))})(\\d{{1,4}})(?:\\.|$)")
    numbers = (int(match[1]) for match in map(pattern.match, shapes) if match)
    return max((number + 1 for number in numbers if number < _MAX_LAYERS), default=0)


def _read_head(shapes: Shapes, nearest: _Structure) -> tuple[tuple[int, str], ...]:
    depth = _depth(shapes, _HEAD)
    kinds = dict(nearest.head)
    layers = []
    for index in range(depth):
        weight = shapes.get(f"{_HEAD}{index}.weight")
        if weight is not None:
            layers.append((index, "layer_norm" if len(weight) == 1 else "linear"))
        elif f"{_HEAD}{index}.bias" in shapes:
            layers.append((index, kinds.get(index, "linear")))
    return tuple(layers)


def _nearest_member(shapes: Shapes) -> tuple[str, HybridConfig]:
    """Return the member, of those with a name, that shares most names and shapes with `shapes`."""
    members = {
        f"{size} {variant}": family_member(size, variant) for size in reversed(SIZES) for variant in ("hybrid", "pure")
    }

    def likeness(name: str) -> float:
        expected = tensor_shapes(members[name])
        shared = shapes.keys() & expected.keys()
        same = sum(tuple(shapes[tensor]) == expected[tensor] for tensor in shared)
        return (len(shared) + same) / (len(shapes) + len(expected))

    name = max(members, key=likeness)
    return name, members[name]


# --- the misfit table ---


@dataclass(frozen=True)
class _Row:
    """One line of the table: `name` has its first number in braces where several layers share the line."""

    problem: str  # "missing", "unexpected" or "wrong shape"
    name: str
    found: Shape | None
    expected: Shape | None
    tensors: int


def _misfits(shapes: Shapes, expected: Shapes) -> list[_Row]:
    """Compare a file's tensors with a member's; one row per kind of tensor, over all layers that share the misfit."""
    wrong = [
        (name, tuple(shapes[name]), shape)
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    missing = [(name, None, shape) for name, shape in expected.items() if name not in shapes]
    unexpected = [(name, tuple(shape), None) for name, shape in shapes.items() if name not in expected]

    def has(names: Shapes, part: str) -> bool:
        return any(name.startswith(part) for name in names)

    lost_parts = [part for part in _PARTS if has(expected, part) and not has(shapes, part)]
    rows = []
    for part in lost_parts:
        count = sum(name.startswith(part) for name, _, _ in missing)
        rows.append(_Row("missing", f"{part}* (all {count} tensors)", None, None, count))
    missing = [entry for entry in missing if not entry[0].startswith(tuple(lost_parts))]
    for problem, entries in (("wrong shape", wrong), ("missing", missing), ("unexpected", unexpected)):
        rows.extend(_grouped(problem, entries))
    return rows


_FIRST_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=_l)\d+$")


def _grouped(problem: str, entries: list[tuple[str, Shape | None, Shape | None]]) -> list[_Row]:
    groups: dict[tuple, list[int | None]] = defaultdict(list)
    for name, found, expected in entries:
        number = _FIRST_NUMBER.search(name)
        in_head = name.startswith(_HEAD)  # its numbers are places, not repetitions
        if number is None or in_head:
            groups[name, "", found, expected].append(None)
        else:
            groups[name[: number.start()], name[number.end() :], found, expected].append(int(number[0]))
    return [
        _Row(problem, before + _ranges(numbers) + after, found, expected, len(numbers))
        for (before, after, found, expected), numbers in groups.items()
    ]


def _ranges(numbers: list[int | None]) -> str:
    """Write layer numbers as `0-3,5`; nothing for a name without one."""
    values = sorted(number for number in numbers if number is not None)
    spans: list[list[int]] = []
    for value in values:
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _misfit_message(source: str, rows: list[_Row], nearest: str) -> str:
    counts = Counter()
    for row in rows:
        counts[row.problem] += row.tensors
    summary = ", ".join(f"{counts[problem]} {problem}" for problem in ("missing", "unexpected", "wrong shape"))
    first = (
        f"{source} fits no member of the family: {summary} tensors (table below), expected one like its nearest, the "
        f"{nearest}; check that the file is the right one and whole"
    )
    lines = [f"  {'problem':<12} {'tensor':<72} {'found':<20} expected"]
    lines += [
        f"  {row.problem:<12} {_printable(row.name):<72} {_shape(row.found):<20} {_shape(row.expected)}".rstrip()
        for row in rows[:_MAX_TABLE_ROWS]
    ]
    if len(rows) > _MAX_TABLE_ROWS:
        lines.append(f"  ... and {len(rows) - _MAX_TABLE_ROWS} more rows")
    return "\n".join([first, *lines])


def _printable(name: str) -> str:
    return name if name.isprintable() and len(name) <= _MAX_NAME_SHOWN else f"{name[:_MAX_NAME_SHOWN]!a}..."


def _shape(shape: Shape | None) -> str:
    return "-" if shape is None else str(list(shape))
