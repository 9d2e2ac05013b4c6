"""Architectures: published names and totals; each is found by its shapes, and each misfit is in the table."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from checkpoint_files import architectures
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPConfig, CLIPModel, Kosmos2Config, Kosmos2Model

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.config import SIZES, HybridConfig, standard_config
from mobile_vla_inference.policy.storage.fusion import solve_fusion_features
from mobile_vla_inference.policy.storage.layout import Shape, parameter_counts, tensor_shapes
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.storage.shape_inference import infer_config

FULL_HYBRID = standard_config("full", "hybrid")
FULL_PURE = standard_config("full", "pure")
NAMED = [(size, variant) for size in SIZES for variant in ("hybrid", "pure")]


def _shapes(module: torch.nn.Module, prefix: str) -> dict[str, Shape]:
    return {f"{prefix}.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def published_towers() -> dict[str, Shape]:
    """Return the names and shapes of transformers' own modules at their default sizes."""
    with torch.device("meta"):
        kosmos, clip = Kosmos2Model(Kosmos2Config()), CLIPModel(CLIPConfig())
    return _shapes(kosmos, "kosmos_model") | _shapes(clip, "clip_model")


@pytest.mark.parametrize(("config", "total"), [(FULL_HYBRID, 1_859_579_651), (FULL_PURE, 1_703_973_122)])
def test_published_names_and_totals(published_towers: dict[str, Shape], config: HybridConfig, total: int) -> None:
    shapes = tensor_shapes(config)
    towers = {name: shape for name, shape in shapes.items() if name.startswith(("kosmos_model.", "clip_model."))}
    in_policy = ("kosmos_model.",) if config.variant == "pure" else ("kosmos_model.", "clip_model.")
    assert towers == {name: shape for name, shape in published_towers.items() if name.startswith(in_policy)}
    assert sum(math.prod(shape) for shape in shapes.values()) == total


def test_published_part_counts() -> None:
    counts = parameter_counts(tensor_shapes(FULL_HYBRID))
    assert counts["kosmos_model.text_model"] == 1_342_289_920
    assert counts["kosmos_model.vision_model"] == 303_179_776
    assert counts["kosmos_model.image_to_text_projection"] == 19_015_680
    assert sum(count for name, count in counts.items() if name.startswith("clip_model.")) == 151_277_313
    assert counts["rnn"] == 37_781_504
    assert sum(counts[name] for name in ("feature_fusion", "rnn", "actions")) == 43_816_962


@pytest.mark.parametrize(("size", "variant"), NAMED)
def test_named_configurations_are_recovered(size: str, variant: str) -> None:
    config = standard_config(size, variant)
    assert infer_config(tensor_shapes(config)) == config


@settings(max_examples=80, deadline=None)
@given(config=architectures(), order=st.randoms(use_true_random=False))
def test_any_architecture_is_recovered(config: HybridConfig, order) -> None:
    shapes = list(tensor_shapes(config).items())
    order.shuffle(shapes)
    assert infer_config(dict(shapes)) == config


#: Tensors whose first dimension only one other tensor has, too: which of the two is wrong can't be known.
SAME_SIZE = {
    "actions.mlp.8.weight": "actions.mlp.8.bias",
    "actions.mlp.6.weight": "actions.mlp.6.bias",
    "clip_model.visual_projection.weight": "clip_model.text_projection.weight",
}


@settings(max_examples=80, deadline=None)
@given(data=st.data(), size=st.sampled_from(NAMED), step=st.sampled_from((-1, 1)))
def test_a_shape_off_by_one_is_found(data: st.DataObject, size: tuple[str, str], step: int) -> None:
    """One wrong dimension is a misfit of that tensor alone, unless no other tensor shows that size.

    Where only two tensors show a size, the other one is named: see SAME_SIZE.
    """
    config = standard_config(*size)
    shapes = tensor_shapes(config)
    name = data.draw(st.sampled_from([name for name, shape in shapes.items() if shape]))
    place = data.draw(st.integers(0, len(shapes[name]) - 1))
    wrong = tuple(length + step * (i == place) for i, length in enumerate(shapes[name]))
    shapes[name] = wrong
    try:
        inferred = infer_config(shapes, "x.pth")
    except CheckpointError as error:
        named = SAME_SIZE.get(name, name) if place == 0 else name
        assert f"{named} " in str(error)
        assert str(list(shapes[named])) in str(error)
        assert "1 wrong shape" in str(error)
        return
    assert tensor_shapes(inferred) == shapes  # a vocabulary, a latent more or less: another architecture
    assert inferred != config


@settings(max_examples=60, deadline=None)
@given(data=st.data(), config=architectures())
def test_a_missing_tensor_is_found(data: st.DataObject, config: HybridConfig) -> None:
    shapes = tensor_shapes(config)
    optional = "clip_model.logit_scale"
    name = data.draw(st.sampled_from([name for name in shapes if name != optional]))
    del shapes[name]
    with pytest.raises(CheckpointError) as caught:
        infer_config(shapes)
    assert name in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(max_size=8) | st.sampled_from(sorted(tensor_shapes(standard_config("tiny", "hybrid")))),
        st.lists(st.integers(0, 1 << 40), max_size=5).map(tuple),
        max_size=12,
    )
)
def test_foreign_shapes_are_refused(shapes: dict[str, Shape]) -> None:
    with pytest.raises(CheckpointError, match="fits no architecture variant"):
        infer_config(shapes)


def _refusal(shapes: dict[str, Shape]) -> str:
    with pytest.raises(CheckpointError) as caught:
        infer_config(shapes, "x.pth")
    return str(caught.value)


def test_the_table_groups_layers_and_names_the_nearest_configuration() -> None:
    shapes = tensor_shapes(FULL_HYBRID)
    layer = "kosmos_model.text_model.model.layers.{}.ffn.fc1.bias"
    for index in (*range(3, 9), 11):
        del shapes[layer.format(index)]
    for index in range(24):
        shapes[f"kosmos_model.vision_model.model.encoder.layers.{index}.mlp.gate"] = (7,)
    shapes["rnn.weight_ih_l0"] = (4097, 2048)
    message = _refusal(shapes)
    first, _, table = message.partition("\n")
    assert first.startswith("x.pth fits no architecture variant: 7 missing, 24 unexpected, 1 wrong shape")
    assert "the full hybrid" in first
    assert re.search(r"missing +kosmos_model\.text_model\.model\.layers\.3-8,11\.ffn\.fc1\.bias +- +\[8192\]", table)
    assert re.search(
        r"unexpected +kosmos_model\.vision_model\.model\.encoder\.layers\.0-23\.mlp\.gate +\[7\] +-", table
    )
    assert re.search(r"wrong shape +rnn\.weight_ih_l0 +\[4097, 2048\] +\[4096, 2048\]", table)
    assert len(table.splitlines()) == 4


def test_a_missing_recurrent_layer_is_named() -> None:
    shapes = tensor_shapes(FULL_HYBRID)
    for name in [name for name in shapes if name.endswith("_l2")]:
        del shapes[name]
    assert "rnn.weight_ih_l2" in _refusal(shapes)


def test_lost_parts_take_one_row_each() -> None:
    for part in ("feature_fusion.", "rnn.", "kosmos_model.image_to_text_projection."):
        shapes = {name: shape for name, shape in tensor_shapes(FULL_HYBRID).items() if not name.startswith(part)}
        table = _refusal(shapes).splitlines()[2:]
        assert len(table) == 1 and f"{part}* (all " in table[0]


def test_a_head_without_its_last_layer_is_refused() -> None:
    shapes = tensor_shapes(FULL_HYBRID)
    del shapes["actions.mlp.8.weight"], shapes["actions.mlp.8.bias"]
    assert "ends its head with a LayerNorm at actions.mlp.5" in _refusal(shapes)


def test_a_plain_clip_is_refused(published_towers: dict[str, Shape]) -> None:
    clip = {n.removeprefix("clip_model."): s for n, s in published_towers.items() if n.startswith("clip_model.")}
    message = _refusal(clip)
    assert "kosmos_model.text_model.* (all " in message
    assert "text_model.encoder.layers.0-11.mlp.fc1.weight" in message


def test_a_hostile_name_can_not_garble_the_table() -> None:
    shapes = tensor_shapes(standard_config("tiny", "pure")) | {"a\nb\x1b[2J" + "c" * 5000: (1,)}
    message = _refusal(shapes)
    assert len(message.splitlines()) == 3 and "\x1b" not in message and len(message) < 1500


@pytest.mark.parametrize(
    ("fusion_in", "features"),
    [
        (2560, ("kosmos_text", "clip_text")),
        (3072, ("kosmos_text", "clip_text", "clip_image")),
        (4864, ("kosmos_text", "kosmos_vision", "clip_text", "clip_image", "clip_vision_hidden")),
        (768, ("clip_vision_hidden",)),
    ],
)
def test_fusion_features_are_solved(fusion_in: int, features: tuple[str, ...]) -> None:
    assert solve_fusion_features(replace(FULL_HYBRID, fusion_in=fusion_in)) == features


def test_the_pure_variant_reads_kosmos_text() -> None:
    assert solve_fusion_features(FULL_PURE) == ("kosmos_text",)


@pytest.mark.parametrize(("size", "variant"), NAMED)
def test_documented_features_win_in_small_configurations(size: str, variant: str) -> None:
    """Their widths coincide, so that other sums fit too."""
    expected = ("kosmos_text", "clip_text") if variant == "hybrid" else ("kosmos_text",)
    assert solve_fusion_features(standard_config(size, variant)) == expected


def test_ambiguous_fusion_lists_the_candidates_and_the_setting() -> None:
    config = replace(FULL_HYBRID, fusion_in=3584)
    with pytest.raises(CheckpointError) as caught:
        solve_fusion_features(config)
    message = str(caught.value)
    assert "kosmos_text + kosmos_vision + clip_text or kosmos_text + kosmos_vision + clip_image" in message
    assert "setting fusion_features" in message
    chosen = ("clip_image", "kosmos_vision", "kosmos_text")
    assert solve_fusion_features(config, PolicySettings(fusion_features=chosen)) == chosen


def test_impossible_fusion_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no combination of features gives"):
        solve_fusion_features(replace(FULL_HYBRID, fusion_in=2559))
    with pytest.raises(CheckpointError, match="add up"):
        solve_fusion_features(FULL_HYBRID, PolicySettings(fusion_features=("kosmos_text",)))
    without_vision = replace(FULL_HYBRID, clip_vision=None, fusion_in=3072)
    with pytest.raises(CheckpointError, match="add up"):
        features = ("kosmos_text", "clip_text", "clip_image")
        solve_fusion_features(without_vision, PolicySettings(fusion_features=features))


def test_pooled_clip_text_has_its_own_width() -> None:
    config = replace(standard_config("small", "hybrid"), clip_projection_dim=32, fusion_in=256 + 128)
    assert solve_fusion_features(config, PolicySettings(clip_text_feature="pooled")) == ("kosmos_text", "clip_text")
