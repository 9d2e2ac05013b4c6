"""One step as flat arithmetic at batch 1: what the action needs and nothing else.

transformers' modules build masks, output objects and caches in every call, and can't be captured in a CUDA graph. Here
a step is a fixed sequence of a few operations on [rows, width] tensors. What depends on the instruction alone (token
embeddings, positions, CLIP's text feature) is computed once per instruction. Queries, keys and values are one product.
The residual stream, the LayerNorms, pooling and the hidden state are fp32, whatever the type of the weights.
operations.py carries out the operations; weights.py takes the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mobile_vla_inference.policy.architecture import HiddenState, HybridModel
from mobile_vla_inference.policy.engines.operations import Linear, Norm, Rows, TorchOperations
from mobile_vla_inference.policy.engines.weights import Block, VisionWeights, WeightReader
from mobile_vla_inference.policy.preprocess import PixelScaling, Prompt


@dataclass
class EncodedInstruction:
    """What a step reads of an instruction, on the device.

    Attributes:
        embedding: the text decoder's input without the image, fp32 [tokens, width]; None if it is not used.
        first_image_row: the row from which the latents are added.
        pooling: weight of each token in the pooled feature, fp32 [tokens]; None if it is not used.
        clip_text: CLIP's text feature, fp32 [width]; None if it is not used.
    """

    embedding: torch.Tensor | None
    first_image_row: int
    pooling: torch.Tensor | None
    clip_text: torch.Tensor | None


class FlatModel:
    """A checkpoint of any variant, laid out for steps at batch 1.

    Attributes:
        device: where a step runs.
        fusion_features: names of the features that are joined, in order.
        weight_bytes: how many bytes of weights a step reads.
    """

    def __init__(
        self, model: HybridModel, operations: TorchOperations, device: torch.device, *, one_stream: bool = False
    ) -> None:
        """Put the weights that a step reads on `device`; see WeightReader.

        Args:
            model: holds the weights, on any device and in any type. It still encodes instructions.
            operations: how the arithmetic is done.
            device: where a step runs.
            one_stream: run the towers one after the other on a GPU too, and not at the same time.
        """
        self.fusion_features = model.fusion_features
        self.device = device
        self._one_stream = one_stream
        self._model = model
        self._ops = operations
        reader = WeightReader(operations, device)
        kosmos = model.kosmos_model
        uses_text = "kosmos_text" in self.fusion_features
        self._vision = None
        if uses_text or "kosmos_vision" in self.fusion_features:
            self._vision = reader.vision_tower(kosmos.vision_model.model)
        self._resampler = None
        if uses_text:
            decoder = kosmos.text_model.model
            self._resampler = reader.resampler(kosmos.image_to_text_projection)
            self._embed_scale = decoder.embed_scale
            self._text_blocks = [reader.text_block(layer) for layer in decoder.layers]
            self._text_norm = reader.norm(decoder.layer_norm)
        self._clip_vision = None
        if any(name in self.fusion_features for name in ("clip_image", "clip_vision_hidden")):
            clip = model.clip_model
            # Some versions of transformers put the tower itself here, others a model around it.
            self._clip_vision = reader.vision_tower(getattr(clip.vision_model, "vision_model", clip.vision_model))
            self._visual_projection = reader.linear(clip.visual_projection)
        if model.reads_clip_text and device.type != "cpu":
            # The CPU would take longer than many steps, and an instruction can change while the robot drives.
            _move_clip_text(model.clip_model, device, operations.dtype)
        self._fusion = reader.linear(model.feature_fusion) if hasattr(model, "feature_fusion") else None
        self._cell_kind = model.config.cell.kind
        self._recurrent_layers = [reader.recurrent_layer(model.rnn, layer) for layer in range(model.rnn.num_layers)]
        self._head = [reader.head_layer(layer) for layer in model.actions.mlp]
        self._scaling = PixelScaling.of(model.settings)
        self.weight_bytes = reader.weight_bytes

    def all_finite(self) -> bool:
        """Return whether every weight on the device is finite; one transfer from it."""
        flags = [tensor.isfinite().all() for tensor in _tensors(vars(self)) if tensor.is_floating_point()]
        return bool(torch.stack(flags).all())

    # ---- once per instruction --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def instruction(self, prompt: Prompt, clip_ids: torch.Tensor | None) -> EncodedInstruction:
        """Compute what a step reads of an instruction."""
        model = self._model
        embedding = pooling = None
        first_image_row = 0
        if self._resampler is not None:
            decoder = model.kosmos_model.text_model.model
            tokens = prompt.to(model.device)
            latents = model.config.latent_query_num
            no_image = torch.zeros(1, latents, model.config.kosmos_text.hidden_size, device=model.device)
            embedding = decoder.forward_embedding(
                tokens.input_ids, image_embeds=no_image, img_input_mask=tokens.image_embeds_position_mask
            )[0]
            embedding = embedding.to(device=self.device, dtype=torch.float32)
            first_image_row = int(prompt.image_embeds_position_mask[0].argmax())
            pooling = _pooling_weights(prompt, model.settings.kosmos_pooling).to(self.device)
        clip_text = None
        if model.reads_clip_text:
            feature = model.clip_text_feature(clip_ids.to(model.clip_model.text_projection.weight.device))
            clip_text = feature[0].to(device=self.device, dtype=torch.float32)
        return EncodedInstruction(embedding, first_image_row, pooling, clip_text)

    # ---- once per step ---------------------------------------------------------------------------------------------

    def step(
        self, frame: torch.Tensor, instruction: EncodedInstruction, state: HiddenState
    ) -> tuple[torch.Tensor, HiddenState]:
        """Map a frame, uint8 [side, side, 3] on the device, to actions fp32 [actions] and the next state (fp32)."""
        # What the previous state adds depends on no frame: its weights are read while the towers run.
        side_stream = self._side_stream()
        with side_stream:
            recurrent = self._recurrent_sums(state)
        features = self.fused_features(frame, instruction)
        side_stream.join()
        outputs, state = self._run_rnn(features, recurrent, state)
        return self._run_head(outputs), state

    def fused_features(self, frame: torch.Tensor, instruction: EncodedInstruction) -> torch.Tensor:
        """Compute the input of the LSTM, GRU or RNN, fp32 [cell input]."""
        features: dict[str, torch.Tensor] = {"clip_text": instruction.clip_text}
        side_stream = None
        if self._clip_vision is not None:
            side_stream = self._side_stream()
            with side_stream:
                pooled = self._run_vision(self._clip_vision, frame)[0].float()
                features["clip_vision_hidden"] = pooled
                features["clip_image"] = self._ops.vector_linear(pooled, self._visual_projection)
        if self._vision is not None:
            rows = self._run_vision(self._vision, frame)
            features["kosmos_vision"] = rows.float().mean(dim=0)
            if self._resampler is not None:
                features["kosmos_text"] = self._run_text(rows, instruction)
        if side_stream is not None:
            side_stream.join()
        joined = torch.cat([features[name] for name in self.fusion_features])
        return joined if self._fusion is None else self._ops.vector_linear(joined, self._fusion)

    def parts(
        self, frame: torch.Tensor, instruction: EncodedInstruction, state: HiddenState
    ) -> dict[str, Callable[[], object]]:
        """Return the parts of a step, by name, to be timed one by one; takes the arguments of `step`."""
        parts: dict[str, Callable[[], object]] = {}
        if self._vision is not None:
            parts["Kosmos vision"] = partial(self._run_vision, self._vision, frame)
        if self._resampler is not None:
            with torch.inference_mode():
                rows = self._run_vision(self._vision, frame)
            parts["Kosmos text"] = partial(self._run_text, rows, instruction)
        if self._clip_vision is not None:
            parts["CLIP vision"] = partial(self._run_vision, self._clip_vision, frame)
        with torch.inference_mode():
            features = self.fused_features(frame, instruction)
        parts["cell and head"] = partial(self._act, features, state)
        return parts

    def initial_state(self) -> HiddenState:
        """Return the state at the start of an episode, fp32 [layers, hidden] each."""
        return self._model.initial_hidden_state(self.device, torch.float32)

    def _side_stream(self) -> _SideStream:
        return _SideStream(self.device if self.device.type == "cuda" and not self._one_stream else None)

    def _run_vision(self, vision: VisionWeights, frame: torch.Tensor) -> torch.Tensor:
        """Map a frame to normalised rows [1 + patches, width], the class row first."""
        ops = self._ops
        patches = ops.patches(frame, self._scaling, vision.patch_size, vision.patches.weight.shape[1])
        _, rows = ops.linear_add_norm(patches, vision.patches, vision.embedding, vision.pre_norm, first_row=1)
        first = vision.blocks[0]
        return self._run_blocks(vision.blocks, rows, ops.norm(rows, first.norm1, into=first.qkv[0]), vision.post_norm)

    def _run_blocks(self, blocks: list[Block], stream: torch.Tensor, rows: Rows, last_norm: Norm) -> torch.Tensor:
        """Run blocks over the residual stream [rows, width] and return it normalised by `last_norm`.

        `rows` is the stream after the first block's LayerNorm.
        """
        ops = self._ops
        following = [(block.norm1, block.qkv[0]) for block in blocks[1:]] + [(last_norm, None)]
        for block, (next_norm, next_product) in zip(blocks, following):
            mixed = ops.attention(*self._query_key_value(rows, block.qkv), block.heads, block.causal)
            if block.inner_norm is not None:
                mixed = ops.norm(mixed, block.inner_norm, into=block.out)
            stream, rows = ops.linear_add_norm(mixed, block.out, stream, block.norm2, into=block.fc1)
            if block.ffn_norm is None:
                hidden = ops.linear(rows, block.fc1, block.activation)
            else:
                hidden = ops.norm(ops.linear(rows, block.fc1), block.ffn_norm, block.activation, into=block.fc2)
            stream, rows = ops.linear_add_norm(hidden, block.fc2, stream, next_norm, into=next_product)
        return rows

    def _query_key_value(self, rows: Rows, qkv: tuple[Linear, ...]) -> tuple[torch.Tensor, ...]:
        if len(qkv) == 1:
            return self._ops.linear(rows, qkv[0]).chunk(3, dim=1)
        return tuple(self._ops.linear(rows, linear) for linear in qkv)

    def _run_text(self, vision_rows: torch.Tensor, instruction: EncodedInstruction) -> torch.Tensor:
        """Resample the vision rows to latents, decode them with the instruction, and pool to fp32 [width]."""
        ops, resampler, blocks = self._ops, self._resampler, self._text_blocks
        sources = torch.empty(
            len(vision_rows) + len(resampler.latent_key_value),
            resampler.latent_key_value.shape[1],
            device=vision_rows.device,
            dtype=ops.dtype,
        )
        sources[len(vision_rows) :] = resampler.latent_key_value
        dense = ops.linear(ops.unit_rows(vision_rows), resampler.dense)
        ops.linear(dense, resampler.key_value, out=sources[: len(vision_rows)])
        mixed = ops.attention(resampler.query, *sources.chunk(2, dim=1), resampler.heads, False)
        stream, rows = ops.linear_add_norm(
            mixed,
            resampler.out,
            instruction.embedding,
            blocks[0].norm1,
            first_row=instruction.first_image_row,
            factor=self._embed_scale,
            into=blocks[0].qkv[0],
        )
        return instruction.pooling @ self._run_blocks(blocks, stream, rows, self._text_norm).float()

    def _act(self, features: torch.Tensor, state: HiddenState) -> torch.Tensor:
        outputs, _ = self._run_rnn(features, self._recurrent_sums(state), state)
        return self._run_head(outputs)

    def _recurrent_sums(self, state: HiddenState) -> list[torch.Tensor]:
        """Return what the previous hidden state adds to the gates of each layer."""
        hidden = state[0] if self._cell_kind == "lstm" else state
        return [self._ops.vector_linear(h, layer.from_hidden) for h, layer in zip(hidden, self._recurrent_layers)]

    def _run_rnn(
        self, features: torch.Tensor, recurrent: list[torch.Tensor], state: HiddenState
    ) -> tuple[torch.Tensor, HiddenState]:
        """Advance every layer of the LSTM, GRU or RNN by one step, fp32 throughout; see `_recurrent_sums`."""
        if self._cell_kind == "lstm":
            layers = []
            for layer, added, cell in zip(self._recurrent_layers, recurrent, state[1]):
                features, cell = self._ops.lstm(features, added, cell, layer.from_input)
                layers.append((features, cell))
            return features, tuple(torch.stack(part) for part in zip(*layers))
        layers = []
        for layer, added, hidden in zip(self._recurrent_layers, recurrent, state):
            inputs = self._ops.vector_linear(features, layer.from_input)
            if self._cell_kind == "gru":
                reset, update, candidate = inputs.chunk(3)
                added_reset, added_update, added_candidate = added.chunk(3)
                candidate = (candidate + (reset + added_reset).sigmoid() * added_candidate).tanh()
                features = candidate + (update + added_update).sigmoid() * (hidden - candidate)
            else:
                features = (inputs + added).tanh()
            layers.append(features)
        return features, torch.stack(layers)

    def _run_head(self, outputs: torch.Tensor) -> torch.Tensor:
        for layer in self._head:
            if isinstance(layer, Linear):
                outputs = self._ops.vector_linear(outputs, layer)
            elif isinstance(layer, Norm):
                outputs = functional.layer_norm(outputs, layer.weight.shape, layer.weight, layer.bias, layer.eps)
            else:
                outputs = layer(outputs)
        return outputs


class _HostTable(nn.Module):
    """A token table that stays in host memory, because an instruction reads only a few of its rows."""

    def __init__(self, table: nn.Embedding | _HostTable, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = table.weight.detach()  # not a parameter: the tower is moved without it
        self._place = {"device": device, "dtype": dtype}

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [...] to rows [..., width] on the device."""
        return functional.embedding(token_ids.to(self.weight.device), self.weight).to(**self._place)


def _move_clip_text(clip: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move CLIP's text tower and projection to a device, without the token table."""
    embeddings = getattr(clip.text_model, "text_model", clip.text_model).embeddings
    embeddings.token_embedding = _HostTable(embeddings.token_embedding, device, dtype)
    for part in (clip.text_model, clip.text_projection):
        part.to(device=device, dtype=dtype)


def _pooling_weights(prompt: Prompt, pooling: str) -> torch.Tensor:
    """Return the weight of each token in the pooled feature, fp32 [tokens], with a sum of 1."""
    if pooling == "last":
        weights = torch.zeros(prompt.input_ids.shape[1])
        weights[int(prompt.attention_mask[0].sum()) - 1] = 1.0
        return weights
    mask = prompt.image_embeds_position_mask if pooling == "image" else prompt.attention_mask
    weights = mask[0].float()
    return weights / weights.sum()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in dataclasses, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif is_dataclass(value):
        yield from _tensors(vars(value))


class _SideStream:
    """Run work on a CUDA stream of its own, in parallel with what follows, until `join`; without a device, in turn."""

    def __init__(self, device: torch.device | None) -> None:
        self._stream = None if device is None else torch.cuda.Stream(device)

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._context.__exit__(*error)

    def join(self) -> None:
        """Wait, on the device, until the work is done."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
