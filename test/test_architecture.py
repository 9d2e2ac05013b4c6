"""The module against the published counts and against a plain composition of transformers' and torch's parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, Kosmos2Config
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2Model

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.preprocess import Prompt
from mobile_vla_inference.policy.storage.config import Cell, HybridConfig, standard_config
from mobile_vla_inference.policy.storage.layout import tensor_shapes
from mobile_vla_inference.policy.storage.settings import PolicySettings

TOLERANCE = 1e-5
STEPS = 4
HEADS = {"kosmos_text": 4, "kosmos_vision": 2, "clip_text": 4, "clip_vision": 2}
CLIP_EOS = 1000


def on_meta(config: HybridConfig, settings: PolicySettings | None = None) -> HybridModel:
    with torch.device("meta"):
        return HybridModel(config, settings or PolicySettings())


def random_model(config: HybridConfig, settings: PolicySettings) -> HybridModel:
    """Build a model the way a checkpoint is loaded: meta device, assigned tensors, then the buffers."""
    model = on_meta(config, settings)
    generator = torch.Generator().manual_seed(0)

    def values(name: str, tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() < 2:  # a bias, or the weight of a LayerNorm
            return 0.1 * noise + ("norm" in name and name.endswith("weight"))
        gain = 4 if name.startswith("rnn.") else 1
        return gain * noise / tensor[0].numel() ** 0.5

    model.load_state_dict({name: values(name, tensor) for name, tensor in model.state_dict().items()}, assign=True)
    model.materialize_buffers("cpu")
    return model.requires_grad_(False)


def random_inputs(config: HybridConfig) -> tuple[torch.Tensor, Prompt, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(STEPS, 3, 3, 3, generator=generator)  # coarse: means over fine noise are all the same
    frames = nn.functional.interpolate(patterns, size=(config.image_size, config.image_size))
    latents = config.latent_query_num
    ids = torch.randint(4, 500, (1, latents + 9), generator=generator)
    image_mask = torch.zeros_like(ids)
    image_mask[:, 2 : 2 + latents] = 1
    clip_ids = torch.cat([torch.randint(2, 500, (1, 6), generator=generator), torch.tensor([[CLIP_EOS]])], dim=1)
    return frames, Prompt(ids, torch.ones_like(ids), image_mask), clip_ids


class PlainComposition:
    """The published model, composed directly of transformers' modules, nn.LSTM and a Sequential."""

    def __init__(self, model: HybridModel) -> None:
        config = model.config
        text, vision = config.kosmos_text, config.kosmos_vision
        kosmos_config = Kosmos2Config(
            text_config={
                "vocab_size": text.vocab_size,
                "embed_dim": text.hidden_size,
                "layers": text.num_layers,
                "ffn_dim": text.intermediate_size,
                "attention_heads": HEADS["kosmos_text"],
            },
            vision_config={
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_hidden_layers": vision.num_layers,
                "num_attention_heads": HEADS["kosmos_vision"],
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
            },
            latent_query_num=config.latent_query_num,
        )
        # Eager attention does not apply the causal flag by itself, as other implementations do in some releases.
        kosmos = Kosmos2Model._from_config(kosmos_config, attn_implementation="eager")
        self.kosmos = self._load(kosmos, model, "kosmos_model.")
        self.clip = self._load(self._clip(config), model, "clip_model.") if config.clip_text else None
        cell = config.cell
        self.lstm = self._load(nn.LSTM(cell.input_size, cell.hidden_size, cell.num_layers), model, "rnn.")
        self.fusion = None
        if config.fusion_in is not None:
            self.fusion = self._load(nn.Linear(config.fusion_in, config.fusion_out), model, "feature_fusion.")
            layers = [
                nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Dropout(0.1),
                nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2),
            ]  # fmt: skip
        else:
            layers = [
                nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
                nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2), nn.Tanh(),
            ]  # fmt: skip
        self.head = self._load(nn.Sequential(*layers), model, "actions.mlp.")
        self.state = None

    @staticmethod
    def _clip(config: HybridConfig) -> CLIPModel:
        text, vision = config.clip_text, config.clip_vision
        return CLIPModel(
            CLIPConfig(
                text_config={
                    "vocab_size": text.vocab_size,
                    "hidden_size": text.hidden_size,
                    "intermediate_size": text.intermediate_size,
                    "num_hidden_layers": text.num_layers,
                    "num_attention_heads": HEADS["clip_text"],
                    "eos_token_id": CLIP_EOS,
                },
                vision_config={
                    "hidden_size": vision.hidden_size,
                    "intermediate_size": vision.intermediate_size,
                    "num_hidden_layers": vision.num_layers,
                    "num_attention_heads": HEADS["clip_vision"],
                    "image_size": vision.image_size,
                    "patch_size": vision.patch_size,
                },
                projection_dim=config.clip_projection_dim,
            )
        )

    @staticmethod
    def _load(module: nn.Module, model: HybridModel, prefix: str) -> nn.Module:
        tensors = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
        module.load_state_dict(tensors)
        return module.eval()

    @torch.inference_mode()
    def step(self, frame: torch.Tensor, prompt: Prompt, clip_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.kosmos(
            pixel_values=frame,
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
            image_embeds_position_mask=prompt.image_embeds_position_mask,
        ).last_hidden_state
        features = hidden.mean(dim=1)
        if self.fusion is not None:
            text = self.clip.get_text_features(input_ids=clip_ids)
            text = getattr(text, "pooler_output", text)
            features = self.fusion(torch.cat([features, text], dim=1))
        output, self.state = self.lstm(features.unsqueeze(0), self.state)
        return self.head(output[0])


@pytest.mark.parametrize(("variant", "count"), [("hybrid", 1_859_579_651), ("pure", 1_703_973_122)])
def test_full_size_has_the_published_parameter_count(variant: str, count: int) -> None:
    model = on_meta(standard_config("full", variant))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("size", ["tiny", "small", "full"])
@pytest.mark.parametrize("variant", ["hybrid", "pure"])
def test_state_dict_equals_the_published_keys_and_shapes(size: str, variant: str) -> None:
    config = standard_config(size, variant)
    shapes = {name: tuple(tensor.shape) for name, tensor in on_meta(config).state_dict().items()}
    assert shapes == tensor_shapes(config)


def test_full_hybrid_has_the_published_key_names() -> None:
    names = set(on_meta(standard_config("full", "hybrid")).state_dict())
    assert {
        "kosmos_model.text_model.model.layers.23.self_attn.q_proj.weight",
        "kosmos_model.vision_model.model.encoder.layers.23.mlp.fc1.weight",
        "kosmos_model.image_to_text_projection.latent_query",
        "clip_model.text_model.encoder.layers.11.mlp.fc2.bias",
        "clip_model.vision_model.encoder.layers.11.layer_norm1.weight",
        "clip_model.logit_scale",
        "feature_fusion.weight",
        "rnn.weight_hh_l3",
        "actions.mlp.8.bias",
    } <= names


@pytest.mark.parametrize("variant", ["hybrid", "pure"])
@pytest.mark.parametrize("carried", [True, False], ids=["carried", "reset"])
def test_outputs_equal_a_plain_composition_frame_by_frame(variant: str, carried: bool) -> None:
    config = standard_config("tiny", variant)
    model = random_model(config, PolicySettings(attention_heads=HEADS, clip_eos_token_id=CLIP_EOS))
    plain = PlainComposition(model)
    frames, prompt, clip_ids = random_inputs(config)
    state = model.initial_hidden_state()
    seen = []
    with torch.inference_mode():
        text = model.clip_text_feature(clip_ids) if variant == "hybrid" else None
        for frame in frames.split(1):
            if not carried:
                state, plain.state = model.initial_hidden_state(), None
            actions, state = model.act(model.fused_features(frame, prompt, text), state)
            torch.testing.assert_close(actions, plain.step(frame, prompt, clip_ids), atol=TOLERANCE, rtol=0)
            seen.append(actions)
    assert torch.cat(seen).std(dim=0).min() > 100 * TOLERANCE, (
        "the frames make no difference, so the comparison proves nothing"
    )


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_single_steps_equal_one_call_over_the_sequence(kind: str) -> None:
    config = replace(standard_config("tiny", "hybrid"), cell=Cell(kind, 64, 64, 2))
    model = random_model(config, PolicySettings(attention_heads=HEADS, clip_eos_token_id=CLIP_EOS))
    frames, prompt, clip_ids = random_inputs(config)
    state = model.initial_hidden_state()
    one_by_one = []
    with torch.inference_mode():
        features = model.fused_features(frames, prompt, model.clip_text_feature(clip_ids))
        for step in features.split(1):
            actions, state = model.act(step, state)
            one_by_one.append(actions)
        expected = model.actions(model.rnn(features.unsqueeze(0))[0])[0]
    torch.testing.assert_close(torch.cat(one_by_one), expected, atol=TOLERANCE, rtol=0)


def test_a_batch_of_frames_equals_single_frames() -> None:
    config = standard_config("tiny", "hybrid")
    model = random_model(config, PolicySettings(clip_eos_token_id=CLIP_EOS))
    frames, prompt, clip_ids = random_inputs(config)
    with torch.inference_mode():
        text = model.clip_text_feature(clip_ids)
        singly = torch.cat([model.fused_features(frame, prompt, text) for frame in frames.split(1)])
        torch.testing.assert_close(model.fused_features(frames, prompt, text), singly, atol=TOLERANCE, rtol=0)


def test_materialized_buffers_equal_a_normal_construction() -> None:
    config = standard_config("tiny", "hybrid")
    settings = PolicySettings(attention_heads=HEADS)
    built = dict(HybridModel(config, settings).named_buffers())
    made = dict(random_model(config, settings).named_buffers())
    assert made.keys() == built.keys()
    assert len(made) == 4
    for name, buffer in made.items():
        assert torch.equal(buffer, built[name]), name


def test_buffers_take_the_type_of_the_weights() -> None:
    model = on_meta(standard_config("tiny", "hybrid"))
    tensors = {k: torch.zeros(v.shape, dtype=torch.bfloat16) for k, v in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    model.materialize_buffers("cpu")
    assert model.kosmos_model.text_model.model.embed_positions.weights.dtype == torch.bfloat16
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("pooling", ["mean", "last", "image"])
def test_kosmos_pooling_reads_the_named_positions(pooling: str) -> None:
    config = standard_config("tiny", "pure")
    model = random_model(config, PolicySettings(kosmos_pooling=pooling))
    frames, prompt, _ = random_inputs(config)
    padded = Prompt(
        torch.cat([prompt.input_ids, torch.ones(1, 3, dtype=torch.int64)], dim=1),
        torch.cat([prompt.attention_mask, torch.zeros(1, 3, dtype=torch.int64)], dim=1),
        torch.cat([prompt.image_embeds_position_mask, torch.zeros(1, 3, dtype=torch.int64)], dim=1),
    )
    with torch.inference_mode():
        hidden = model.kosmos_model(
            pixel_values=frames[:1],
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
            image_embeds_position_mask=prompt.image_embeds_position_mask,
        ).last_hidden_state[0]
        image = slice(2, 2 + config.latent_query_num)
        expected = {"mean": hidden.mean(dim=0), "last": hidden[-1], "image": hidden[image].mean(dim=0)}[pooling]
        for given in (prompt, padded):
            found = model.fused_features(frames[:1], given, None)[0]
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_every_latent_sees_every_patch() -> None:
    config = standard_config("tiny", "hybrid")
    resampler = random_model(config, PolicySettings(attention_heads=HEADS)).kosmos_model.image_to_text_projection
    rows = torch.randn(1, 5, config.kosmos_vision.hidden_size)
    changed = rows.clone()
    changed[:, -1] += 1.0
    with torch.inference_mode():
        differences = (resampler(rows)[0] - resampler(changed)[0]).abs().amax(dim=-1)
    assert differences.min() > TOLERANCE


def test_every_feature_equals_the_output_it_is_named_after() -> None:
    names = ("clip_vision_hidden", "kosmos_vision", "clip_image", "clip_text", "kosmos_text")
    config = standard_config("tiny", "hybrid", fusion_in=64 + 64 + 32 + 32 + 64)
    settings = PolicySettings(fusion_features=names, clip_text_feature="normalized", clip_eos_token_id=CLIP_EOS)
    model = random_model(config, settings)
    frames, prompt, clip_ids = random_inputs(config)
    joined = []
    model.feature_fusion.register_forward_pre_hook(lambda module, inputs: joined.append(inputs[0]))
    with torch.inference_mode():
        model.fused_features(frames, prompt, model.clip_text_feature(clip_ids))
        vision = model.kosmos_model.vision_model(frames).last_hidden_state
        vision = model.kosmos_model.vision_model.model.post_layernorm(vision).mean(dim=1)
        clip_hidden = model.clip_model.vision_model(pixel_values=frames).pooler_output
        clip_image = model.clip_model.get_image_features(pixel_values=frames)
        clip_image = getattr(clip_image, "pooler_output", clip_image)
    found_hidden, found_vision, found_image, found_text, _ = joined[0].split([64, 64, 32, 32, 64], dim=1)
    torch.testing.assert_close(found_hidden, clip_hidden, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found_vision, vision, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found_image, clip_image, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found_text.norm(dim=1), torch.ones(STEPS), atol=TOLERANCE, rtol=0)


def test_a_checkpoint_with_only_clip_text_has_no_vision_tower() -> None:
    config = replace(standard_config("tiny", "hybrid"), clip_vision=None, clip_logit_scale=False)
    settings = PolicySettings(fusion_features=("kosmos_text", "clip_text"))
    names = {name.split(".")[1] for name in on_meta(config, settings).state_dict() if name.startswith("clip_model.")}
    assert names == {"text_model", "text_projection"}


def test_two_frame_sizes_are_refused_only_if_both_towers_are_read() -> None:
    config = standard_config("tiny", "hybrid")
    config = replace(config, clip_vision=replace(config.clip_vision, image_size=84))
    on_meta(config)
    with pytest.raises(CheckpointError, match="84 px and Kosmos-2's 56 px"):
        on_meta(replace(config, fusion_in=128))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (PolicySettings(fusion_features=("kosmos_text",)), ("96", "kosmos_text 64", "policy.json")),
        (PolicySettings(attention_heads={"clip_text": 7}), ("7 heads", "64", "policy.json")),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: PolicySettings, words: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as error:
        on_meta(standard_config("tiny", "hybrid"), settings)
    assert all(word in str(error.value) for word in words)


def test_a_feature_that_the_checkpoint_lacks_is_named() -> None:
    with pytest.raises(CheckpointError, match="clip_text"):
        on_meta(standard_config("tiny", "pure"), PolicySettings(fusion_features=("clip_text",)))
