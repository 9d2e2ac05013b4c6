"""Any architecture, saved in any way: its sizes are found, and it acts as the module that was saved.

The source is built here from stock parts, as a training script does, and shares no code with HybridModel.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import architectures_with_features, prefixes, save_as, saved, wrappers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Kosmos2Config,
    Kosmos2Model,
)

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.convert import convert
from mobile_vla_inference.policy.loading import load_model
from mobile_vla_inference.policy.preprocess import Prompt
from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
from mobile_vla_inference.policy.storage.config import HybridConfig, TextTower, VisionTower, standard_config
from mobile_vla_inference.policy.storage.layout import tensor_shapes
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.storage.settings_file import save_settings

_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
_HEAD_DIM = 64
_STEPS = 3
_WORDS = 4


class SourcePolicy(nn.Module):
    """The policy as training had it: stock towers, a fusion layer, recurrent layers and a head."""

    def __init__(self, config: HybridConfig, features: tuple[str, ...]) -> None:
        super().__init__()
        self.features = features
        text = config.kosmos_text
        self.kosmos_model = Kosmos2Model(
            Kosmos2Config(
                text_config={
                    "vocab_size": text.vocab_size,
                    "embed_dim": text.hidden_size,
                    "ffn_dim": text.intermediate_size,
                    "layers": text.num_layers,
                    "attention_heads": text.hidden_size // _HEAD_DIM,
                },
                vision_config=_vision(config.kosmos_vision),
                latent_query_num=config.latent_query_num,
            )
        )
        self.kosmos_model.image_to_text_projection.x_attn.is_causal = False  # as in training, whatever the release
        clip = _clip(config)
        if clip is not None:
            self.clip_model = clip
        if config.fusion_in is not None:
            self.feature_fusion = nn.Linear(config.fusion_in, config.fusion_out)
        cell = config.cell
        self.rnn = _CELLS[cell.kind](cell.input_size, cell.hidden_size, cell.num_layers, batch_first=True)
        self.actions = nn.Module()
        self.actions.mlp = _head(config)

    def forward(
        self, pixel_values: torch.Tensor, prompt: Prompt, clip_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map frames [steps, 3, size, size] to the input of the recurrent layers, and to actions [steps, actions]."""
        steps = len(pixel_values)
        outputs = self.kosmos_model(
            pixel_values=pixel_values,
            input_ids=prompt.input_ids.expand(steps, -1),
            attention_mask=prompt.attention_mask.expand(steps, -1),
            image_embeds_position_mask=prompt.image_embeds_position_mask.expand(steps, -1),
        )
        found = {"kosmos_text": outputs.last_hidden_state.mean(dim=1)}
        vision = self.kosmos_model.vision_model.model.post_layernorm(outputs.vision_model_output.last_hidden_state)
        found["kosmos_vision"] = vision.mean(dim=1)
        if "clip_text" in self.features:
            text = self.clip_model.text_model(input_ids=clip_ids).pooler_output
            found["clip_text"] = self.clip_model.text_projection(text).expand(steps, -1)
        if {"clip_image", "clip_vision_hidden"} & set(self.features):
            found["clip_vision_hidden"] = self.clip_model.vision_model(pixel_values=pixel_values).pooler_output
            found["clip_image"] = self.clip_model.visual_projection(found["clip_vision_hidden"])
        fused = torch.cat([found[name] for name in self.features], dim=-1)
        if hasattr(self, "feature_fusion"):
            fused = self.feature_fusion(fused)
        return fused, self.actions.mlp(self.rnn(fused[None])[0][0])


def _vision(tower: VisionTower) -> dict[str, int]:
    return {
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.hidden_size // _HEAD_DIM,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
    }


def _text(tower: TextTower) -> dict[str, int]:
    return {
        "vocab_size": tower.vocab_size,
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.hidden_size // _HEAD_DIM,
        "max_position_embeddings": tower.max_positions,
        "bos_token_id": 0,
        "eos_token_id": tower.vocab_size - 1,
    }


def _clip(config: HybridConfig) -> nn.Module | None:
    width = {"projection_dim": config.clip_projection_dim}
    text = None if config.clip_text is None else {**_text(config.clip_text), **width}
    vision = None if config.clip_vision is None else {**_vision(config.clip_vision), **width}
    if text and vision:
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, **width))
    if text:
        return CLIPTextModelWithProjection(CLIPTextConfig(**text))
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)) if vision else None


def _head(config: HybridConfig) -> nn.Sequential:
    """Build the head: a ReLU after each pair of parameters, dropout in the gaps, tanh at the end without LayerNorm."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    by_index = {layer.index: layer for layer in config.head}
    for index in range(max(by_index) + 1):
        layer = by_index.get(index)
        if layer is None:
            layers[str(index)] = nn.ReLU() if index - 1 in by_index else nn.Dropout(0.5)
        elif layer.kind == "linear":
            layers[str(index)] = nn.Linear(layer.in_features, layer.out_features)
        else:
            layers[str(index)] = nn.LayerNorm(layer.out_features)
    if all(layer.kind == "linear" for layer in config.head):
        layers["tanh"] = nn.Tanh()
    return nn.Sequential(layers)


def _source(config: HybridConfig, features: tuple[str, ...], seed: int, dtype: torch.dtype) -> SourcePolicy:
    """Build a source with random values in every tensor, those of norms and biases too, as `dtype` can hold them.

    Signals keep their size from layer to layer, so that the result depends on every one of them.
    """
    source = SourcePolicy(config, features).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                values /= parameter[0].numel() ** 0.5
            else:
                values = values * 0.2 + (0.0 if "bias" in name else 1.0)
            parameter.copy_(values.to(dtype))
    return source


def _inputs(config: HybridConfig, seed: int) -> tuple[torch.Tensor, Prompt, torch.Tensor | None]:
    """Return frames, Kosmos-2's tokens with the image's positions marked, and CLIP's tokens with the end of text."""
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.randn(_STEPS, 3, config.image_size, config.image_size, generator=generator)
    latents = config.latent_query_num
    ids = torch.randint(4, config.kosmos_text.vocab_size, (1, latents + _WORDS), generator=generator)
    is_image = torch.zeros_like(ids)
    is_image[:, 1 : 1 + latents] = 1
    prompt = Prompt(ids, torch.ones_like(ids), is_image)
    if config.clip_text is None:
        return pixel_values, prompt, None
    end = config.clip_text.vocab_size - 1
    clip_ids = torch.randint(3, end, (1, min(config.clip_text.max_positions, 6)), generator=generator)
    clip_ids[0, -2] = end
    return pixel_values, prompt, clip_ids


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    architecture=architectures_with_features(),
    layout=st.sampled_from(("pth", "safetensors", "sharded safetensors")),
    prefix=prefixes,
    wrapper=wrappers,
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 99),
)
def test_any_architecture_is_recovered_and_acts_as_its_source(
    tmp_path: Path,
    architecture: tuple[HybridConfig, tuple[str, ...]],
    layout: str,
    prefix: str,
    wrapper: str | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    config, features = architecture
    source = _source(config, features, seed, dtype)
    state = {name: tensor.to(dtype) for name, tensor in source.state_dict().items()}
    if not config.clip_logit_scale:
        state.pop("clip_model.logit_scale", None)
    path = save_as(tmp_path / "policy", state, layout, prefix, wrapper)
    save_settings(path, PolicySettings(fusion_features=features))

    checkpoint = open_checkpoint(path)
    assert checkpoint.config == config
    assert checkpoint.index.prefix == prefix
    loaded = load_model(checkpoint, dtype=torch.float32)

    pixel_values, prompt, clip_ids = _inputs(config, seed)
    with torch.inference_mode():
        expected_fused, expected = source(pixel_values, prompt, clip_ids)
        text = loaded.clip_text_feature(clip_ids) if loaded.reads_clip_text else None
        fused = loaded.fused_features(pixel_values, prompt, text)
        found, _ = loaded.act(fused, loaded.initial_hidden_state())
    torch.testing.assert_close(fused, expected_fused, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- recurrent layers are missing ---


def _trained(config: HybridConfig, lost_layers: int, args: argparse.Namespace | None = None) -> dict[str, object]:
    """Return what training saves, with Adam's state; the last recurrent layers of the model are lost."""
    shapes = tensor_shapes(config)
    trained = [shape for name, shape in shapes.items() if name.startswith(("feature_fusion.", "rnn.", "actions."))]
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(s)} for i, s in enumerate(trained)}
    kept = config.cell.num_layers - lost_layers
    model = {
        name: torch.zeros(shape)
        for name, shape in shapes.items()
        if not (name.startswith("rnn.") and int(name.rpartition("_l")[2]) >= kept)
    }
    state = {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}
    return {"model_state_dict": model, "optimizer_state_dict": state, "args": args or argparse.Namespace(lr=1e-4)}


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("variant", ["hybrid", "pure"])
@pytest.mark.parametrize("lost", [1, 2])
def test_the_optimizer_shows_a_lost_last_layer(tmp_path: Path, kind: str, variant: str, lost: int) -> None:
    config = standard_config("tiny", variant)
    config = replace(config, cell=replace(config.cell, kind=kind, num_layers=4))
    path = tmp_path / "a.pth"
    path.write_bytes(saved(_trained(config, 0)))
    assert open_checkpoint(path).config == config
    path.write_bytes(saved(_trained(config, lost)))
    with pytest.raises(CheckpointError, match=rf"has {4 - lost} recurrent layers, expected the 4 .*optimizer"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match=rf"rnn\.\*_l{4 - lost}\b.* missing"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lstm_layers", "num_lstm_layers", "rnn_num_layers", "lstm_num_layers"])
def test_the_arguments_show_a_lost_last_layer(tmp_path: Path, name: str) -> None:
    config = standard_config("tiny", "hybrid")  # two layers
    path = tmp_path / "a.pth"
    content = {"model": {name: torch.zeros(shape) for name, shape in tensor_shapes(config).items()}}
    for layers in (1, 2, True, "4"):  # fewer or nonsense: the tensors know better
        path.write_bytes(saved({**content, "args": argparse.Namespace(**{name: layers})}))
        assert open_checkpoint(path).config == config
    path.write_bytes(saved({**content, "args": argparse.Namespace(**{name: 4})}))
    with pytest.raises(
        CheckpointError, match=rf"expected the 4 that its training argument {name} names; rnn\.\*_l2 to"
    ):
        open_checkpoint(path)


def test_the_names_show_a_layer_that_is_lost_in_the_middle(tmp_path: Path) -> None:
    config = standard_config("tiny", "pure")
    config = replace(config, cell=replace(config.cell, num_layers=3))
    state = {name: torch.zeros(shape) for name, shape in tensor_shapes(config).items() if not name.endswith("_l1")}
    (tmp_path / "a.pth").write_bytes(saved(state))
    with pytest.raises(CheckpointError, match=r"(?s)4 missing.*rnn\.weight_ih_l1"):
        open_checkpoint(tmp_path / "a.pth")


def test_an_optimizer_of_more_than_the_policy_is_harmless(tmp_path: Path) -> None:
    """A training script can train more than the policy, such as weights of its losses."""
    config = standard_config("tiny", "pure")
    content = _trained(config, 0)
    content["optimizer_state_dict"]["state"][99] = {"exp_avg": torch.zeros(3)}
    (tmp_path / "a.pth").write_bytes(saved(content))
    assert open_checkpoint(tmp_path / "a.pth").config == config
