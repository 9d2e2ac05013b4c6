"""The network that is trained: a policy with weights to start from, run over batches of sequences.

A batch holds instructions of different lengths: prompts are padded, and attention and pooling mask the padding. Each
row of a batch computes what VlaPolicy computes for the same frame and instruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.architecture import HiddenState, HybridModel
from mobile_vla_inference.policy.loading import load_model
from mobile_vla_inference.policy.preprocess import InstructionEncoder, PixelScaling, Prompt
from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
from mobile_vla_inference.policy.storage.config import (
    SIZES,
    Cell,
    HeadLayer,
    HybridConfig,
    TextTower,
    VisionTower,
    standard_config,
)
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.synthetic.checkpoint import synthetic_settings
from mobile_vla_inference.policy.synthetic.weights import parameter_values
from mobile_vla_inference.sim.world import MAX_ANGULAR_RADPS, MAX_LINEAR_MPS

#: Parts that the original training updated; Kosmos-2 and CLIP were frozen.
TRAINED_PARTS = ("feature_fusion.", "rnn.", "actions.")

#: Sizes that training can start from: those of make-checkpoint, and that of the bundled small policy.
START_SIZES = ("world", *SIZES)

_POSITION_GAIN = 10.0

_WORLD_SPEEDS = {"linear.x": MAX_LINEAR_MPS, "linear.y": MAX_LINEAR_MPS, "angular.z": MAX_ANGULAR_RADPS}
_WORLD_HEAD = (
    HeadLayer(0, "linear", 128, 64),
    HeadLayer(1, "layer_norm", 64, 64),
    HeadLayer(4, "linear", 64, 64),
    HeadLayer(5, "layer_norm", 64, 64),
    HeadLayer(8, "linear", 64, 2),
)


def starting_config(size: str, axes: Sequence[str] | None = None) -> tuple[HybridConfig, PolicySettings]:
    """Return the sizes and confirmed settings of a policy to train from scratch.

    Args:
        size: one of START_SIZES.
        axes: that the policy drives, some of AXES; None: linear.x and angular.z.
    """
    if size != "world":
        config = standard_config(size, "hybrid")
    else:
        config = HybridConfig(
            kosmos_text=TextTower(1024, 64, 128, 1),
            kosmos_vision=VisionTower(64, 128, 2, 56, 14),
            latent_query_num=4,
            clip_text=TextTower(1024, 64, 128, 1, 77),
            clip_projection_dim=64,
            cell=Cell("lstm", 128, 128, 1),
            head=_WORLD_HEAD,
            fusion_in=128,
            fusion_out=128,
        )
    settings = synthetic_settings(config)
    if axes is not None:
        last = replace(config.head[-1], out_features=len(axes))
        config = replace(config, head=(*config.head[:-1], last))
        scale = (settings.action_scale[0],) * len(axes)
        settings = replace(settings, action_axes=tuple(axes), action_scale=scale, action_offset=(0.0,) * len(axes))
    if size == "world":
        settings = replace(settings, action_scale=tuple(_WORLD_SPEEDS[axis] for axis in settings.action_axes))
    return config, settings


def starting_model(config: HybridConfig, settings: PolicySettings, seed: int) -> HybridModel:
    """Build a model with random weights: those of make-checkpoint, adapted so that training converges."""
    model = HybridModel(config, settings)
    weights = {}
    for name, parameter in model.named_parameters():
        if name.startswith("rnn."):
            continue
        values = np.concatenate(list(parameter_values(name, tuple(parameter.shape), config, seed)))
        weights[name] = torch.from_numpy(values).view(parameter.shape)
    model.load_state_dict(weights, strict=False)
    generator = torch.Generator().manual_seed(seed)
    hidden = config.cell.hidden_size
    with torch.no_grad():
        for name, parameter in model.rnn.named_parameters():
            bound = 1.0 / math.sqrt(hidden)
            parameter.uniform_(-bound, bound, generator=generator)
            if config.cell.kind == "lstm" and name.startswith("bias_ih"):
                parameter[hidden : 2 * hidden] = 1.0  # the forget gate starts open
        model.actions.mlp[config.head[-1].index].weight.mul_(0.1)
        # Steering first depends on where a patch is in the image.
        embeddings = model.kosmos_model.vision_model.model.embeddings
        embeddings.position_embedding.weight.mul_(_POSITION_GAIN)
    return model


def loaded_model(path: Path | str) -> HybridModel:
    """Load a checkpoint to train it further: all weights as float32 copies.

    Raises:
        CheckpointError: it can't be used, or its weights are int8.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"{path} is {checkpoint.quantization}, expected weights of a floating-point type; train the checkpoint "
            "that it was converted from"
        )
    model = HybridModel(checkpoint.config, checkpoint.settings)
    weights = load_model(checkpoint).state_dict()
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model


@dataclass(frozen=True)
class Texts:
    """Instructions as tokens: a row for each.

    Attributes:
        prompt: for Kosmos-2, padded at the end.
        clip_ids: for CLIP's text tower, padded with its end of text; None where the policy has no such tower.
    """

    prompt: Prompt
    clip_ids: torch.Tensor | None

    def rows(self, index: torch.Tensor) -> Texts:
        """Return the rows of an index [N]."""
        prompt = Prompt(*(part[index] for part in _parts(self.prompt)))
        return Texts(prompt, None if self.clip_ids is None else self.clip_ids[index])


class TextBatches:
    """Tokenise and pad instructions; each text is tokenised once."""

    def __init__(self, encoder: InstructionEncoder, pad_token_id: int, device: torch.device | str) -> None:
        self._encoder = encoder
        self._pad_token_id = pad_token_id
        self._device = device
        self._known: dict[str, tuple[Prompt, torch.Tensor | None]] = {}

    def __call__(self, instructions: Sequence[str]) -> Texts:
        """Return the tokens of some instructions, a row for each."""
        for text in set(instructions) - set(self._known):
            self._known[text] = (self._encoder.prompt(text), self._encoder.clip_ids(text))
        rows = [self._known[text] for text in instructions]
        parts = zip(*(_parts(prompt) for prompt, _ in rows))
        fills = (self._pad_token_id, 0, 0)
        prompt = Prompt(*(_padded(list(part), fill) for part, fill in zip(parts, fills)))
        clip_ids = None
        if rows[0][1] is not None:
            clip_ids = _padded([ids for _, ids in rows], self._encoder.clip_eos_token_id).to(self._device)
        return Texts(prompt.to(self._device), clip_ids)


class SequenceModel:
    """Run a model over batches of sequences, with gradients.

    Attributes:
        model: the policy's network.
    """

    def __init__(self, model: HybridModel, encoder: InstructionEncoder) -> None:
        self.model = model
        pad = model.kosmos_model.text_model.config.pad_token_id
        self.texts = TextBatches(encoder, pad, model.device)
        scaling = PixelScaling.of(model.settings)
        self._factor = torch.tensor(scaling.factor, device=model.device).view(3, 1, 1)
        self._shift = torch.tensor(scaling.shift, device=model.device).view(3, 1, 1)
        self._reverse = scaling.reverse
        if encoder.clip_eos_token_id is not None:
            model.set_clip_eos_token_id(encoder.clip_eos_token_id)

    def features(self, frames: torch.Tensor, texts: Texts, text_rows: torch.Tensor) -> torch.Tensor:
        """Compute the input of the recurrent cell.

        Args:
            frames: uint8 RGB [N, side, side, 3].
            texts: instructions, a row for each sequence.
            text_rows: for each frame, its row in `texts`, [N].

        Returns:
            [N, cell input].
        """
        pixels = frames.flip(-1) if self._reverse else frames
        pixels = pixels.permute(0, 3, 1, 2).to(torch.float32) * self._factor + self._shift
        feature = None
        if self.model.reads_clip_text:
            feature = self.model.clip_text_feature(texts.clip_ids)[text_rows]
        return self.model.fused_features(pixels, texts.rows(text_rows).prompt, feature)

    def act(self, features: torch.Tensor, state: HiddenState | None) -> tuple[torch.Tensor, HiddenState]:
        """Run recurrent cell and head over [sequences, steps, cell input]; None is the hidden state at the start."""
        outputs, state = self.model.rnn(features, state)
        return self.model.actions(outputs), state

    def act_without_memory(self, features: torch.Tensor) -> torch.Tensor:
        """Run recurrent cell and head over [sequences, steps, cell input], with a new hidden state at every step."""
        flat = features.flatten(0, 1).unsqueeze(1)
        return self.act(flat, None)[0].view(*features.shape[:2], -1)


def trained_parameters(model: HybridModel, frozen_towers: bool) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters to train: all, or with frozen towers only those after the towers."""
    for name, parameter in model.named_parameters():
        if not frozen_towers or name.startswith(TRAINED_PARTS):
            yield name, parameter


def _parts(prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return prompt.input_ids, prompt.attention_mask, prompt.image_embeds_position_mask


def _padded(rows: list[torch.Tensor], fill: int) -> torch.Tensor:
    """Stack rows [1, tokens] of different lengths to [rows, most tokens]."""
    padded = torch.full((len(rows), max(row.shape[1] for row in rows)), fill, dtype=rows[0].dtype)
    for index, row in enumerate(rows):
        padded[index, : row.shape[1]] = row[0]
    return padded
