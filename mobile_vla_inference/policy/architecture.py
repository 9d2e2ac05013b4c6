"""The policy as one nn.Module, in any variant and size; its state-dict keys equal the published ones.

    frame --> Kosmos-2 vision --> 64 latents --+
                                               v
    instruction --------------------> Kosmos-2 text --> pooled --+
    instruction --> CLIP text (once per instruction) ------------+--> feature_fusion --> rnn --> actions
                                                                                        ^  |
                                                                           hidden state +--+

The towers are transformers' own modules. Build the model on the meta device, assign the tensors of a file, then call
`materialize_buffers`: this way nothing is initialised or copied.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
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
from mobile_vla_inference.policy.preprocess import Prompt
from mobile_vla_inference.policy.storage.config import STOCK_HEAD_DIM, HeadLayer, HybridConfig, VisionTower
from mobile_vla_inference.policy.storage.fusion import solve_fusion_features
from mobile_vla_inference.policy.storage.settings import PolicySettings

#: The state that is kept from step to step: (h, c) of an LSTM, h of a GRU or RNN; each [layers, hidden].
HiddenState = tuple[torch.Tensor, torch.Tensor] | torch.Tensor

_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
_CLIP_IMAGE_FEATURES = ("clip_image", "clip_vision_hidden")


class ActionHead(nn.Module):
    """The layers from the LSTM's output to the actions, `actions.mlp.*`."""

    def __init__(self, layers: tuple[HeadLayer, ...], activation: str, tanh: bool | None) -> None:
        super().__init__()
        by_index = {layer.index: layer for layer in layers}
        modules: list[nn.Module] = []
        for index in range(max(by_index) + 1):
            if index in by_index:
                modules.append(_head_layer(by_index[index]))
            elif index - 1 in by_index:
                modules.append(_ACTIVATIONS[activation]())
            else:
                modules.append(nn.Identity())  # a dropout in training
        if tanh is None:
            tanh = all(layer.kind == "linear" for layer in layers)
        if tanh:
            modules.append(nn.Tanh())
        self.mlp = nn.Sequential(*modules)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map the LSTM's outputs [..., hidden] to actions [..., actions]."""
        return self.mlp(features)


class HybridModel(nn.Module):
    """The policy, of the hybrid or the pure variant.

    Attributes:
        kosmos_model: transformers' Kosmos2Model.
        clip_model: transformers' CLIPModel (or only the tower that the checkpoint has); absent in the pure variant.
        feature_fusion: Linear over the joined features; absent in the pure variant.
        rnn: the LSTM, GRU or RNN.
        actions: the action head.
        fusion_features: names of the features that are joined, in order.
    """

    def __init__(self, config: HybridConfig, settings: PolicySettings) -> None:
        """Build the modules on the current default device.

        Raises:
            CheckpointError: the settings do not fit the sizes (attention heads, fused features, image sizes).
        """
        super().__init__()
        self.config = config
        self.settings = settings
        self.fusion_features = solve_fusion_features(config, settings)
        _check_shared_frame(config, self.fusion_features)
        heads = attention_heads(config, settings)
        self.kosmos_model = Kosmos2Model(_kosmos_config(config, heads))
        # Every latent sees every patch, as in training. Some releases of transformers (5.17 to 5.20 at least) mark this
        # attention as causal, so that the first latent would see only one patch.
        self.kosmos_model.image_to_text_projection.x_attn.is_causal = False
        clip_model = _build_clip(config, settings, heads)
        if clip_model is not None:
            self.clip_model = clip_model
        if config.fusion_in is not None:
            self.feature_fusion = nn.Linear(config.fusion_in, config.fusion_out)
        cell = config.cell
        self.rnn = _CELLS[cell.kind](cell.input_size, cell.hidden_size, cell.num_layers, batch_first=True)
        self.actions = ActionHead(config.head, settings.head_activation, settings.head_tanh)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.actions.mlp[self.config.head[-1].index].weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.actions.mlp[self.config.head[-1].index].weight.device

    @property
    def reads_clip_text(self) -> bool:
        """Whether the fusion uses CLIP's text feature."""
        return "clip_text" in self.fusion_features

    def set_clip_eos_token_id(self, token_id: int) -> None:
        """Set the tokenizer's end-of-text id, at which CLIP's text tower pools."""
        self.clip_model.text_model.eos_token_id = token_id

    @torch.no_grad()
    def materialize_buffers(self, device: torch.device | str) -> None:
        """Make the buffers that a checkpoint file does not hold: position ids and Kosmos-2's sinusoids."""
        positions = self.kosmos_model.text_model.model.embed_positions
        sinusoids = positions.get_embedding(
            positions.num_positions + positions.offset, positions.embedding_dim, positions.padding_idx
        )
        positions.weights = sinusoids.to(device=device, dtype=self.dtype)
        for module in self.modules():
            if "position_ids" in module._buffers:
                count = module.position_embedding.num_embeddings
                module.position_ids = torch.arange(count, device=device).expand((1, -1))
        self.rnn.flatten_parameters()

    def clip_text_feature(self, clip_ids: torch.Tensor) -> torch.Tensor:
        """Compute CLIP's text feature: token ids [B, tokens] (with end of text) to [B, width]. No frame is read."""
        pooled = self.clip_model.text_model(input_ids=clip_ids).pooler_output
        if self.settings.clip_text_feature == "pooled":
            return pooled
        projected = self.clip_model.text_projection(pooled)
        return functional.normalize(projected, dim=-1) if self.settings.clip_text_feature == "normalized" else projected

    def fused_features(
        self, pixel_values: torch.Tensor, prompt: Prompt, clip_text_feature: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the LSTM's input, [B, cell input].

        Args:
            pixel_values: normalised frames [B, 3, image_size, image_size].
            prompt: Kosmos-2's tokens, [1, tokens] (the same for every frame) or [B, tokens].
            clip_text_feature: [1 or B, width] from `clip_text_feature`; None if the fusion does not use it.
        """
        pixel_values = pixel_values.to(self.dtype)
        batch = pixel_values.shape[0]
        features: dict[str, torch.Tensor] = {}
        if "kosmos_text" in self.fusion_features:
            features.update(self._kosmos_features(pixel_values, prompt.expand(batch)))
        elif "kosmos_vision" in self.fusion_features:
            features["kosmos_vision"] = self._pooled_vision(self.kosmos_model.vision_model(pixel_values)[0])
        if self.reads_clip_text:
            features["clip_text"] = clip_text_feature.to(self.dtype).expand(batch, -1)
        if any(name in self.fusion_features for name in _CLIP_IMAGE_FEATURES):
            pooled = self.clip_model.vision_model(pixel_values=pixel_values).pooler_output
            features["clip_vision_hidden"] = pooled
            features["clip_image"] = self.clip_model.visual_projection(pooled)
        joined = torch.cat([features[name] for name in self.fusion_features], dim=-1)
        return joined if self.config.fusion_in is None else self.feature_fusion(joined)

    def initial_hidden_state(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HiddenState:
        """Return the state at the start of an episode: zeros, by default on the model's device and in its type."""
        cell = self.config.cell
        shape = (cell.num_layers, cell.hidden_size)
        zeros = torch.zeros(shape, device=device or self.device, dtype=dtype or self.dtype)
        return (zeros, torch.zeros_like(zeros)) if cell.kind == "lstm" else zeros

    def act(self, features: torch.Tensor, hidden_state: HiddenState) -> tuple[torch.Tensor, HiddenState]:
        """Run the LSTM and the head over the steps of one sequence.

        Args:
            features: fused features of successive frames [steps, cell input].
            hidden_state: the state after the previous step, or `initial_hidden_state()`.

        Returns:
            Actions [steps, actions] and the hidden state after the last step.
        """
        outputs, hidden_state = self.rnn(features, hidden_state)
        return self.actions(outputs), hidden_state

    def _kosmos_features(self, pixel_values: torch.Tensor, prompt: Prompt) -> dict[str, torch.Tensor]:
        outputs = self.kosmos_model(
            pixel_values=pixel_values,
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
            image_embeds_position_mask=prompt.image_embeds_position_mask,
            use_cache=False,
        )
        features = {"kosmos_text": self._pooled_text(outputs.last_hidden_state, prompt)}
        if "kosmos_vision" in self.fusion_features:
            features["kosmos_vision"] = self._pooled_vision(outputs.vision_model_output.last_hidden_state)
        return features

    def _pooled_text(self, last_hidden_state: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """Pool [B, tokens, width] to [B, width] by the settings; the sums are fp32."""
        if self.settings.kosmos_pooling == "last":
            last = prompt.attention_mask.sum(dim=-1) - 1
            return last_hidden_state[torch.arange(len(last), device=last.device), last]
        pool_image = self.settings.kosmos_pooling == "image"
        mask = prompt.image_embeds_position_mask if pool_image else prompt.attention_mask
        weights = mask.to(torch.float32).unsqueeze(-1)
        pooled = (last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1)
        return pooled.to(last_hidden_state.dtype)

    def _pooled_vision(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        normalized = self.kosmos_model.vision_model.model.post_layernorm(last_hidden_state)
        return normalized.mean(dim=1, dtype=torch.float32).to(normalized.dtype)


def state_parts(state: HiddenState) -> tuple[torch.Tensor, ...]:
    """Return the tensors of a state: h and c of an LSTM, h of a GRU or RNN."""
    return state if isinstance(state, tuple) else (state,)


def attention_heads(config: HybridConfig, settings: PolicySettings) -> dict[str, int]:
    """Return the attention heads of each tower that the checkpoint has: from the settings, else width / 64.

    Raises:
        CheckpointError: a width is not divisible by its heads.
    """
    heads = {}
    for name in ("kosmos_text", "kosmos_vision", "clip_text", "clip_vision"):
        tower = getattr(config, name)
        if tower is None:
            continue
        width = tower.hidden_size
        heads[name] = settings.attention_heads.get(name, max(width // STOCK_HEAD_DIM, 1))
        if name not in settings.attention_heads and width % STOCK_HEAD_DIM:
            raise CheckpointError(
                f"{name} is {width} wide, expected a multiple of {STOCK_HEAD_DIM}; "
                f"set its attention_heads in policy.json"
            )
        if heads[name] < 1 or width % heads[name]:
            raise CheckpointError(
                f"setting attention_heads gives {name} {heads[name]} heads, expected a divisor of its width {width}; "
                f"edit policy.json"
            )
    return heads


def _check_shared_frame(config: HybridConfig, fusion_features: tuple[str, ...]) -> None:
    """Raise CheckpointError if CLIP's vision tower is read, but takes frames of another size than Kosmos-2's."""
    if (
        any(name in _CLIP_IMAGE_FEATURES for name in fusion_features)
        and config.clip_vision.image_size != config.image_size
    ):
        raise CheckpointError(
            f"CLIP's vision tower reads {config.clip_vision.image_size} px and Kosmos-2's {config.image_size} px, "
            f"expected one size, because both read the same frame; remove CLIP's image from fusion_features"
        )


def _head_layer(layer: HeadLayer) -> nn.Module:
    return (
        nn.LayerNorm(layer.out_features)
        if layer.kind == "layer_norm"
        else nn.Linear(layer.in_features, layer.out_features)
    )


def _kosmos_config(config: HybridConfig, heads: dict[str, int]) -> Kosmos2Config:
    text, vision = config.kosmos_text, config.kosmos_vision
    return Kosmos2Config(
        text_config={
            "vocab_size": text.vocab_size,
            "embed_dim": text.hidden_size,
            "ffn_dim": text.intermediate_size,
            "layers": text.num_layers,
            "attention_heads": heads["kosmos_text"],
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        vision_config=_vision_sizes(vision, heads["kosmos_vision"]),
        latent_query_num=config.latent_query_num,
    )


def _vision_sizes(vision: VisionTower, heads: int) -> dict[str, int]:
    return {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }


def _clip_text_sizes(config: HybridConfig, settings: PolicySettings, heads: int) -> dict[str, int]:
    text = config.clip_text
    end_of_text = text.vocab_size - 1  # its id in the stock vocabulary; see set_clip_eos_token_id
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": heads,
        "max_position_embeddings": text.max_positions,
        "projection_dim": config.clip_projection_dim,
        "bos_token_id": text.vocab_size - 2,
        "eos_token_id": end_of_text if settings.clip_eos_token_id is None else settings.clip_eos_token_id,
    }


def _build_clip(config: HybridConfig, settings: PolicySettings, heads: dict[str, int]) -> nn.Module | None:
    """Build CLIPModel, or one tower with its projection if the file has only that; None without CLIP."""
    text = vision = None
    if config.clip_text is not None:
        text = _clip_text_sizes(config, settings, heads["clip_text"])
    if config.clip_vision is not None:
        vision = _vision_sizes(config.clip_vision, heads["clip_vision"])
        vision["projection_dim"] = config.clip_projection_dim
    if text and vision:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.clip_projection_dim))
    elif text:
        model = CLIPTextModelWithProjection(CLIPTextConfig(**text))
    elif vision:
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision))
    else:
        return None
    if not config.clip_logit_scale and hasattr(model, "logit_scale"):
        del model.logit_scale
    return model
