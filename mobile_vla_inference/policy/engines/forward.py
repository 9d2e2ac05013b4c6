"""One step as flat arithmetic: what the action needs and nothing else, at batch 1.

transformers' modules build masks, output objects and caches in every call, and can't be captured in a CUDA graph. Here
a step is a fixed sequence of a few operations on [rows, width] tensors. Whatever depends on the instruction alone
(token embeddings, positions, CLIP's text feature) is computed once per instruction; queries, keys and values are one
product; the residual stream, LayerNorms, pooling and the cell's state are fp32 whatever the weights' type. How an
operation is carried out is up to `Operations`: torch's own functions here, Triton kernels in kernels.py.

The weights come from a HybridModel that can stay on the CPU as pages of its file. On a GPU each is copied once, in its
final form, and the token table stays behind; on the CPU the pages themselves are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from mobile_vla_inference.policy.architecture import HiddenState, HybridModel
from mobile_vla_inference.policy.engines.quantize import Int8Linear, dequantize, quantize, row_scales
from mobile_vla_inference.policy.preprocess import PixelScaling, Prompt

#: Rows of a stack of patches are padded to a multiple of this: what every matrix unit likes.
_PATCH_ALIGNMENT = 64


@dataclass
class Linear:
    """A product with a matrix.

    Attributes:
        weight: [out, in], floating or int8.
        bias: floating [out]; None for none.
        scale: fp32 [out], the step of each int8 row; None for a floating weight.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None = None


@dataclass
class Norm:
    """A LayerNorm over the last axis; weight and bias fp32 [width]."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass
class Block:
    """A transformer block of either tower; the text decoder's has two LayerNorms more.

    `qkv` is one product for queries, keys and values, or three.
    """

    norm1: Norm
    qkv: tuple[Linear, ...]
    inner_norm: Norm | None
    out: Linear
    norm2: Norm
    fc1: Linear
    activation: str
    ffn_norm: Norm | None
    fc2: Linear
    heads: int
    causal: bool


@dataclass
class VisionWeights:
    """A vision transformer: patches to normalised rows.

    Attributes:
        patches: [width, 3 patch patch, padded] without a bias.
        embedding: what is added to the class row and the patches, fp32 [1 + patches, width].
        pre_norm: LayerNorm before the blocks.
        blocks: the blocks.
        post_norm: LayerNorm after them.
        patch_size: side of a patch, pixels.
    """

    patches: Linear
    embedding: torch.Tensor
    pre_norm: Norm
    blocks: list[Block]
    post_norm: Norm
    patch_size: int


@dataclass
class ResamplerWeights:
    """From vision rows to latents in the text decoder's width. What the latents themselves give depends on no frame.

    Attributes:
        dense: vision width to text width.
        key_value: keys and values of the vision rows.
        query: the latents' queries [latents, width].
        latent_key_value: their keys and values [latents, 2 width].
        out: projection of what was attended to.
        heads: attention heads.
    """

    dense: Linear
    key_value: Linear
    query: torch.Tensor
    latent_key_value: torch.Tensor
    out: Linear
    heads: int


@dataclass
class CellLayer:
    """A layer of the cell: the gates' weights for its input and for its former hidden state."""

    from_input: Linear
    from_hidden: Linear


@dataclass
class QuantizedRows:
    """Rows of activations as int8 [rows, width], and the step of each row, fp32 [rows]."""

    values: torch.Tensor
    scale: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)


#: What a product reads: [rows, in] in the type of the operations, or int8.
Rows = torch.Tensor | QuantizedRows


class Operations(Protocol):
    """How the arithmetic is done. Activations are [rows, width] in `dtype`; the residual stream is fp32."""

    dtype: torch.dtype

    def patches(self, frame: torch.Tensor, scaling: PixelScaling, side: int, padded: int) -> torch.Tensor:
        """Cut a frame, uint8 [height, width, 3], into scaled patches [patches, padded] in a convolution's order."""

    def linear(
        self, rows: Rows, linear: Linear, activation: str | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the product, biased and activated, in `dtype`; in `out` where it is given."""

    def norm(self, rows: torch.Tensor, norm: Norm, activation: str | None = None, into: Linear | None = None) -> Rows:
        """Return normalised rows (of any floating type), activated before that, in `dtype`.

        Where only the product `into` reads them and its weights are int8, they may be int8, too.
        """

    def unit_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows scaled to length 1, in `dtype`."""

    def linear_add_norm(
        self,
        rows: Rows,
        linear: Linear,
        residual: torch.Tensor,
        norm: Norm,
        first_row: int = 0,
        factor: float = 1.0,
        into: Linear | None = None,
    ) -> tuple[torch.Tensor, Rows]:
        """Add `factor` times the biased product to the residual stream, from `first_row` on.

        Returns:
            The stream, fp32, and its normalised rows in `dtype`, or in int8 as for `norm`.
        """

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, causal: bool
    ) -> torch.Tensor:
        """Return softmax(q k^T / sqrt(head width)) v, heads side by side; the inputs may be strided views."""

    def vector_linear(self, vector: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Return the biased product with an fp32 vector [in], fp32 [out]."""

    def lstm(
        self,
        features: torch.Tensor,
        recurrent: torch.Tensor,
        cell: torch.Tensor,
        from_input: Linear,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next hidden and cell state of one LSTM layer, fp32 [hidden] each.

        Args:
            features: what the layer reads, fp32 [in].
            recurrent: what the former hidden state adds to the gates, fp32 [4 hidden].
            cell: the former cell state.
            from_input: weights of the gates' inputs.
        """


class TorchOperations:
    """Every operation by torch's own functions, on any device."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def patches(self, frame: torch.Tensor, scaling: PixelScaling, side: int, padded: int) -> torch.Tensor:
        """Cut a frame, uint8 [height, width, 3], into scaled patches [patches, padded] in a convolution's order."""
        channels = (2, 1, 0) if scaling.reverse else (0, 1, 2)
        pixels = torch.stack(
            [
                frame[..., channel].float() * factor + shift
                for channel, factor, shift in zip(channels, scaling.factor, scaling.shift)
            ]
        ).unsqueeze(0)
        patches = functional.unfold(pixels, side, stride=side)[0].T
        return functional.pad(patches, (0, padded - patches.shape[1])).to(self.dtype)

    def linear(
        self, rows: torch.Tensor, linear: Linear, activation: str | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the product, biased and activated, in `dtype`; in `out` where it is given."""
        result = activate(self._product(rows, linear), activation)
        return result if out is None else out.copy_(result)

    def norm(
        self, rows: torch.Tensor, norm: Norm, activation: str | None = None, into: Linear | None = None
    ) -> torch.Tensor:
        """Return normalised rows (of any floating type), activated before that, in `dtype`."""
        rows = activate(rows.float(), activation)
        return functional.layer_norm(rows, norm.weight.shape, norm.weight, norm.bias, norm.eps).to(self.dtype)

    def unit_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows scaled to length 1, in `dtype`."""
        return functional.normalize(rows.float(), dim=-1).to(self.dtype)

    def linear_add_norm(
        self,
        rows: torch.Tensor,
        linear: Linear,
        residual: torch.Tensor,
        norm: Norm,
        first_row: int = 0,
        factor: float = 1.0,
        into: Linear | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add `factor` times the biased product to the residual stream, from `first_row` on.

        Returns:
            The stream, fp32, and its normalised rows in `dtype`.
        """
        product = self._product(rows, linear).float() * factor
        stream = residual.float()
        if len(product) == len(stream):
            stream = stream + product
        else:
            stream = stream.clone()
            stream[first_row : first_row + len(product)] += product
        return stream, self.norm(stream, norm)

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, causal: bool
    ) -> torch.Tensor:
        """Return softmax(q k^T / sqrt(head width)) v, heads side by side; the inputs may be strided views."""
        by_head = (part.unflatten(1, (heads, -1)).transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        mixed = functional.scaled_dot_product_attention(*by_head, is_causal=causal)
        return mixed.squeeze(0).transpose(0, 1).flatten(1)

    def vector_linear(self, vector: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Return the biased product with an fp32 vector [in], fp32 [out]."""
        return self._product(vector.to(self.dtype), linear).float()

    def lstm(
        self,
        features: torch.Tensor,
        recurrent: torch.Tensor,
        cell: torch.Tensor,
        from_input: Linear,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next hidden and cell state of one LSTM layer, fp32 [hidden] each.

        Args:
            features: what the layer reads, fp32 [in].
            recurrent: what the former hidden state adds to the gates, fp32 [4 hidden].
            cell: the former cell state.
            from_input: weights of the gates' inputs.
        """
        gates = self.vector_linear(features, from_input) + recurrent
        let_in, keep, candidate, let_out = gates.chunk(4)
        cell = keep.sigmoid() * cell + let_in.sigmoid() * candidate.tanh()
        return let_out.sigmoid() * cell.tanh(), cell

    def _product(self, rows: torch.Tensor, linear: Linear) -> torch.Tensor:
        weight = linear.weight
        if linear.scale is not None:
            weight = dequantize(weight, linear.scale)
        weight = weight.to(self.dtype)
        bias = None if linear.bias is None else linear.bias.to(self.dtype)
        return functional.linear(rows, weight, bias)


def activate(values: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Apply an activation by transformers' name (None: none)."""
    if activation is None:
        return values
    if activation == "gelu":
        return functional.gelu(values)
    if activation == "quick_gelu":
        return values * torch.sigmoid(1.702 * values)
    raise ValueError(f"activation {activation!r} is unknown, expected gelu or quick_gelu")


class FlatModel:
    """A member of the family, laid out for steps at batch 1.

    Attributes:
        fusion_features: names of the features that are joined, in order.
        weight_bytes: what a step reads of the weights.
    """

    def __init__(
        self,
        model: HybridModel,
        operations: Operations,
        device: torch.device,
        *,
        quantized: bool = False,
        one_stream: bool = False,
    ) -> None:
        """Put the weights that a step reads on `device`, on a GPU in the type of `operations`.

        Args:
            model: where they come from; on any device, in any type. It still computes what an instruction decides.
            operations: how the arithmetic is done.
            device: where.
            quantized: make the blocks' matrices int8 where they are not yet.
            one_stream: run the towers in turn on a GPU, too, not beside each other.
        """
        self.fusion_features = model.fusion_features
        self.device = device
        self._one_stream = one_stream
        self._model = model
        self._ops = operations
        self._quantized = quantized
        self._joins = device.type != "cpu"
        self.weight_bytes = 0
        kosmos = model.kosmos_model
        uses_text = "kosmos_text" in self.fusion_features
        if uses_text or "kosmos_vision" in self.fusion_features:
            self._vision = self._vision_weights(kosmos.vision_model.model)
        if uses_text:
            decoder = kosmos.text_model.model
            self._resampler = self._resampler_weights(kosmos.image_to_text_projection)
            self._embed_scale = decoder.embed_scale
            self._text_blocks = [self._text_block(layer) for layer in decoder.layers]
            self._text_norm = self._norm(decoder.layer_norm)
        self._clip_vision = None
        if any(name in self.fusion_features for name in ("clip_image", "clip_vision_hidden")):
            clip = model.clip_model
            # Newer transformers put the tower itself where others have a model around it.
            self._clip_vision = self._vision_weights(getattr(clip.vision_model, "vision_model", clip.vision_model))
            self._visual_projection = self._linear(clip.visual_projection)
        if model.reads_clip_text and self._joins:
            # On the CPU it would take longer than many steps, and an instruction may change while the robot drives.
            clip = model.clip_model
            embeddings = getattr(clip.text_model, "text_model", clip.text_model).embeddings
            embeddings.token_embedding = _HostTable(embeddings.token_embedding, device, operations.dtype)
            for part in (clip.text_model, clip.text_projection):
                part.to(device=device, dtype=operations.dtype)
        self._fusion = self._linear(model.feature_fusion) if hasattr(model, "feature_fusion") else None
        self._cell_kind = model.config.cell.kind
        self._cell = [self._cell_layer(model.rnn, layer) for layer in range(model.rnn.num_layers)]
        self._head = [self._head_layer(layer) for layer in model.actions.mlp]
        self._scaling = PixelScaling.of(model.settings)

    def all_finite(self) -> bool:
        """Tell whether every weight on the device is finite; one transfer from it."""
        flags = [tensor.isfinite().all() for tensor in _tensors(vars(self)) if tensor.is_floating_point()]
        return bool(torch.stack(flags).all())

    # ---- once per instruction --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def instruction(self, prompt: Prompt, clip_ids: torch.Tensor | None) -> Instruction:
        """Compute what an instruction decides."""
        model = self._model
        embedding = pooling = None
        first_image_row = 0
        if "kosmos_text" in self.fusion_features:
            decoder = model.kosmos_model.text_model.model
            at_home = prompt.to(model.device)
            latents = model.config.latent_query_num
            no_image = torch.zeros(1, latents, model.config.kosmos_text.hidden_size, device=model.device)
            embedding = decoder.forward_embedding(
                at_home.input_ids, image_embeds=no_image, img_input_mask=at_home.image_embeds_position_mask
            )[0]
            embedding = embedding.to(device=self.device, dtype=torch.float32)
            first_image_row = int(prompt.image_embeds_position_mask[0].argmax())
            pooling = _pooling_weights(prompt, model.settings.kosmos_pooling).to(self.device)
        clip_text = None
        if model.reads_clip_text:
            feature = model.clip_text_feature(clip_ids.to(model.clip_model.text_projection.weight.device))
            clip_text = feature[0].to(device=self.device, dtype=torch.float32)
        return Instruction(embedding, first_image_row, pooling, clip_text)

    # ---- once per step ---------------------------------------------------------------------------------------------

    def step(
        self, frame: torch.Tensor, instruction: Instruction, state: HiddenState
    ) -> tuple[torch.Tensor, HiddenState]:
        """Map a frame, uint8 [side, side, 3] on the device, to actions fp32 [actions] and the next state (fp32)."""
        hidden = state[0] if self._cell_kind == "lstm" else state
        # What the former state adds depends on no frame: its weights are read while the towers run.
        beside = self._beside()
        with beside:
            recurrent = [self._ops.vector_linear(h, layer.from_hidden) for h, layer in zip(hidden, self._cell)]
        features = self.fused_features(frame, instruction)
        beside.join()
        outputs, state = self._run_cell(features, recurrent, state)
        return self._run_head(outputs), state

    def fused_features(self, frame: torch.Tensor, instruction: Instruction) -> torch.Tensor:
        """Compute what the cell reads, fp32 [cell input]."""
        features: dict[str, torch.Tensor] = {"clip_text": instruction.clip_text}
        on_the_side = None
        if self._clip_vision is not None:
            on_the_side = self._beside()
            with on_the_side:
                pooled = self._run_vision(self._clip_vision, frame)[0].float()
                features["clip_vision_hidden"] = pooled
                features["clip_image"] = self._ops.vector_linear(pooled, self._visual_projection)
        if "kosmos_text" in self.fusion_features or "kosmos_vision" in self.fusion_features:
            rows = self._run_vision(self._vision, frame)
            features["kosmos_vision"] = rows.float().mean(dim=0)
            if "kosmos_text" in self.fusion_features:
                features["kosmos_text"] = self._run_text(rows, instruction)
        if on_the_side is not None:
            on_the_side.join()
        joined = torch.cat([features[name] for name in self.fusion_features])
        return joined if self._fusion is None else self._ops.vector_linear(joined, self._fusion)

    def parts(
        self, frame: torch.Tensor, instruction: Instruction, state: HiddenState
    ) -> dict[str, Callable[[], object]]:
        """Return what a step is made of, by name, to be timed one by one; takes the arguments of `step`."""
        parts: dict[str, Callable[[], object]] = {}
        if "kosmos_text" in self.fusion_features or "kosmos_vision" in self.fusion_features:
            parts["Kosmos vision"] = partial(self._run_vision, self._vision, frame)
        if "kosmos_text" in self.fusion_features:
            with torch.inference_mode():
                rows = self._run_vision(self._vision, frame)
            parts["Kosmos text"] = partial(self._run_text, rows, instruction)
        if self._clip_vision is not None:
            parts["CLIP vision"] = partial(self._run_vision, self._clip_vision, frame)
        with torch.inference_mode():
            features = self.fused_features(frame, instruction)
        parts["cell and head"] = partial(self._act, features, state)
        return parts

    def _act(self, features: torch.Tensor, state: HiddenState) -> torch.Tensor:
        hidden = state[0] if self._cell_kind == "lstm" else state
        recurrent = [self._ops.vector_linear(h, layer.from_hidden) for h, layer in zip(hidden, self._cell)]
        outputs, _ = self._run_cell(features, recurrent, state)
        return self._run_head(outputs)

    def initial_state(self) -> HiddenState:
        """Return the state of an episode's start, fp32 [layers, hidden] each."""
        return self._model.initial_hidden_state(self.device, torch.float32)

    def _beside(self) -> _Beside:
        return _Beside(self.device if self.device.type == "cuda" and not self._one_stream else None)

    def _run_vision(self, vision: VisionWeights, frame: torch.Tensor) -> torch.Tensor:
        """Map a frame to normalised rows [1 + patches, width], the class row first."""
        ops = self._ops
        patches = ops.patches(frame, self._scaling, vision.patch_size, vision.patches.weight.shape[1])
        _, rows = ops.linear_add_norm(patches, vision.patches, vision.embedding, vision.pre_norm, first_row=1)
        first = vision.blocks[0]
        return self._run_blocks(vision.blocks, rows, ops.norm(rows, first.norm1, into=first.qkv[0]), vision.post_norm)

    def _run_blocks(self, blocks: list[Block], stream: torch.Tensor, rows: Rows, last_norm: Norm) -> torch.Tensor:
        """Run blocks over the residual stream [rows, width], whose first LayerNorm gave `rows`; end in `last_norm`."""
        ops = self._ops
        following = [(block.norm1, block.qkv[0]) for block in blocks[1:]] + [(last_norm, None)]
        for block, (next_norm, next_product) in zip(blocks, following):
            mixed = ops.attention(*self._split(rows, block.qkv, 3), block.heads, block.causal)
            if block.inner_norm is not None:
                mixed = ops.norm(mixed, block.inner_norm, into=block.out)
            stream, rows = ops.linear_add_norm(mixed, block.out, stream, block.norm2, into=block.fc1)
            if block.ffn_norm is None:
                hidden = ops.linear(rows, block.fc1, block.activation)
            else:
                hidden = ops.norm(ops.linear(rows, block.fc1), block.ffn_norm, block.activation, into=block.fc2)
            stream, rows = ops.linear_add_norm(hidden, block.fc2, stream, next_norm, into=next_product)
        return rows

    def _run_text(self, vision_rows: torch.Tensor, instruction: Instruction) -> torch.Tensor:
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

    def _run_cell(
        self, features: torch.Tensor, recurrent: list[torch.Tensor], state: HiddenState
    ) -> tuple[torch.Tensor, HiddenState]:
        """Advance every layer of the cell by one step, fp32 throughout; `recurrent` is what the former state adds."""
        if self._cell_kind == "lstm":
            layers = []
            for layer, added, cell in zip(self._cell, recurrent, state[1]):
                features, cell = self._ops.lstm(features, added, cell, layer.from_input)
                layers.append((features, cell))
            return features, tuple(torch.stack(part) for part in zip(*layers))
        layers = []
        for layer, added, hidden in zip(self._cell, recurrent, state):
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

    # ---- weights ---------------------------------------------------------------------------------------------------

    def _take(self, values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return values on the device, in the type of the operations or another."""
        taken = values.detach().to(device=self.device, dtype=dtype or self._ops.dtype).contiguous()
        self.weight_bytes += taken.nbytes
        return taken

    def _norm(self, norm: nn.LayerNorm) -> Norm:
        return Norm(self._take(norm.weight, torch.float32), self._take(norm.bias, torch.float32), norm.eps)

    def _joined(self, *parts: nn.Module, quantized: bool) -> tuple[Linear, ...]:
        """Return Linears that read the same input as one, or as they are where joining would copy pages of a file."""
        if self._joins:
            return (self._linear(*parts, quantized=quantized),)
        return tuple(self._linear(part, quantized=quantized) for part in parts)

    def _linear(self, *parts: nn.Module, quantized: bool = False) -> Linear:
        """Return Linears (or Int8Linears) that read the same input as one."""
        bias = None
        if parts[0].bias is not None:
            bias = _one([self._take(part.bias) for part in parts])
        if isinstance(parts[0], Int8Linear):
            weight = _one([self._take(part.weight, torch.int8) for part in parts])
            return Linear(weight, bias, _one([self._take(part.weight_scale, torch.float32) for part in parts]))
        weight = _one([part.weight.detach().to(self.device) for part in parts])
        scale = None
        if quantized:
            scale = row_scales(weight)
            weight = quantize(weight, scale)
        elif self.device.type != "cpu":  # there, a narrower type is widened when it is used
            weight = weight.to(self._ops.dtype)
        self.weight_bytes += weight.nbytes
        return Linear(weight, bias, scale)

    def _split(self, rows: Rows, linears: tuple[Linear, ...], count: int) -> tuple[torch.Tensor, ...]:
        """Return `count` products with the same rows, of one joined Linear or of as many."""
        if len(linears) == 1:
            return self._ops.linear(rows, linears[0]).chunk(count, dim=1)
        return tuple(self._ops.linear(rows, linear) for linear in linears)

    def _vision_weights(self, tower: nn.Module) -> VisionWeights:
        embeddings = tower.embeddings
        convolution = embeddings.patch_embedding.weight.detach()
        side = convolution.shape[-1]
        flat = convolution.flatten(1)
        flat = functional.pad(flat, (0, -flat.shape[1] % _PATCH_ALIGNMENT))
        added = embeddings.position_embedding.weight.detach().float().clone()
        added[0] += embeddings.class_embedding.detach().float()
        return VisionWeights(
            patches=Linear(self._take(flat), None),
            embedding=self._take(added, torch.float32),
            pre_norm=self._norm(tower.pre_layrnorm),
            blocks=[self._vision_block(layer) for layer in tower.encoder.layers],
            post_norm=self._norm(tower.post_layernorm),
            patch_size=side,
        )

    def _vision_block(self, layer: Any) -> Block:
        attention, mlp, quantized = layer.self_attn, layer.mlp, self._quantized
        return Block(
            norm1=self._norm(layer.layer_norm1),
            qkv=self._joined(attention.q_proj, attention.k_proj, attention.v_proj, quantized=quantized),
            inner_norm=None,
            out=self._linear(attention.out_proj, quantized=quantized),
            norm2=self._norm(layer.layer_norm2),
            fc1=self._linear(mlp.fc1, quantized=quantized),
            activation=mlp.config.hidden_act,
            ffn_norm=None,
            fc2=self._linear(mlp.fc2, quantized=quantized),
            heads=attention.num_heads,
            causal=False,
        )

    def _text_block(self, layer: Any) -> Block:
        attention, ffn, quantized = layer.self_attn, layer.ffn, self._quantized
        return Block(
            norm1=self._norm(layer.self_attn_layer_norm),
            qkv=self._joined(attention.q_proj, attention.k_proj, attention.v_proj, quantized=quantized),
            inner_norm=self._norm(attention.inner_attn_ln),
            out=self._linear(attention.out_proj, quantized=quantized),
            norm2=self._norm(layer.final_layer_norm),
            fc1=self._linear(ffn.fc1, quantized=quantized),
            activation=attention.config.activation_function,
            ffn_norm=self._norm(ffn.ffn_layernorm),
            fc2=self._linear(ffn.fc2, quantized=quantized),
            heads=attention.num_heads,
            causal=True,
        )

    def _resampler_weights(self, resampler: Any) -> ResamplerWeights:
        attention, quantized = resampler.x_attn, self._quantized
        latent_query = resampler.latent_query.detach().to(device=self.device, dtype=self._ops.dtype)
        key_value = self._linear(attention.k_proj, attention.v_proj, quantized=quantized)
        return ResamplerWeights(
            dense=self._linear(resampler.dense, quantized=quantized),
            key_value=key_value,
            query=self._ops.linear(latent_query, self._linear(attention.q_proj, quantized=quantized)),
            latent_key_value=self._ops.linear(latent_query, key_value),
            out=self._linear(attention.out_proj, quantized=quantized),
            heads=attention.num_heads,
        )

    def _cell_layer(self, rnn: nn.RNNBase, layer: int) -> CellLayer:
        return CellLayer(
            *(
                Linear(
                    self._take(getattr(rnn, f"weight_{source}_l{layer}")),
                    self._take(getattr(rnn, f"bias_{source}_l{layer}"), torch.float32),
                )
                for source in ("ih", "hh")
            )
        )

    def _head_layer(self, layer: nn.Module) -> Linear | Norm | nn.Module:
        if isinstance(layer, nn.Linear):
            return self._linear(layer)
        return self._norm(layer) if isinstance(layer, nn.LayerNorm) else layer


class _HostTable(nn.Module):
    """A table of tokens that stays in host memory: an instruction reads a few of its rows."""

    def __init__(self, embedding: nn.Embedding, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._table = embedding.weight.detach()  # no parameter: the tower moves without it
        self._place = {"device": device, "dtype": dtype}

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [...] to rows [..., width] on the device."""
        return functional.embedding(token_ids.to(self._table.device), self._table).to(**self._place)


@dataclass
class Instruction:
    """What an instruction decides, on the device.

    Attributes:
        embedding: the text decoder's input without the image, fp32 [tokens, width]; None where it is not used.
        first_image_row: where the latents are added.
        pooling: weight of each token in the pooled feature, fp32 [tokens]; None where it is not used.
        clip_text: CLIP's text feature, fp32 [width]; None where it is not used.
    """

    embedding: torch.Tensor | None
    first_image_row: int
    pooling: torch.Tensor | None
    clip_text: torch.Tensor | None


def _one(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pooling_weights(prompt: Prompt, pooling: str) -> torch.Tensor:
    """Return the weight of each token in the pooled feature, fp32 [tokens], which sum to 1."""
    if pooling == "last":
        weights = torch.zeros(prompt.input_ids.shape[1])
        weights[int(prompt.attention_mask[0].sum()) - 1] = 1.0
        return weights
    mask = prompt.image_embeds_position_mask if pooling == "image" else prompt.attention_mask
    weights = mask[0].float()
    return weights / weights.sum()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in the dataclasses, lists and dicts of this module."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif is_dataclass(value):
        yield from _tensors(vars(value))


class _Beside:
    """Work on a stream of its own, beside what follows, until `join`; without a CUDA device simply in turn."""

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
        """Wait, on the device, until the work beside is done."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
