"""The weights of a step, taken from a HybridModel: each once, on the device and in its final form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mobile_vla_inference.policy.engines.operations import Linear, Norm, TorchOperations
from mobile_vla_inference.policy.engines.quantize import Int8Linear

#: Patches are padded to a multiple of this width, which suits every matrix unit.
_PATCH_ALIGNMENT = 64


@dataclass
class Block:
    """A transformer block of a vision tower or of the text decoder, which has two LayerNorms more.

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
        embedding: added to the class row and the patches, fp32 [1 + patches, width].
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
    """The resampler, from vision rows to latents in the text decoder's width.

    The latents' queries, keys and values depend on no frame, so they are computed once.

    Attributes:
        dense: vision width to text width.
        key_value: keys and values of the vision rows.
        query: the latents' queries [latents, width].
        latent_key_value: the latents' keys and values [latents, 2 width].
        out: projection of the attention's result.
        heads: attention heads.
    """

    dense: Linear
    key_value: Linear
    query: torch.Tensor
    latent_key_value: torch.Tensor
    out: Linear
    heads: int


@dataclass
class RecurrentLayer:
    """A layer of the LSTM, GRU or RNN: the gates' weights for its input and for its previous hidden state."""

    from_input: Linear
    from_hidden: Linear


class WeightReader:
    """Take weights from modules that can stay on the CPU as pages of their file.

    On a GPU each weight is copied, in the type of the operations. On the CPU the pages themselves are used, unless the
    operations make a copy in a form of their own.

    Attributes:
        weight_bytes: size of what was taken.
    """

    def __init__(self, operations: TorchOperations, device: torch.device) -> None:
        self.weight_bytes = 0
        self._ops = operations
        self._device = device
        self._joins = device.type != "cpu" or operations.copies_matrices

    def norm(self, norm: nn.LayerNorm) -> Norm:
        """Take a LayerNorm."""
        return Norm(self._take(norm.weight, torch.float32), self._take(norm.bias, torch.float32), norm.eps)

    def linear(self, *parts: nn.Module) -> Linear:
        """Take Linears (or Int8Linears) that read the same input as one product."""
        bias = scale = None
        if parts[0].bias is not None:
            bias = _join([self._take(part.bias) for part in parts])
        weight = _join([part.weight.detach().to(self._device) for part in parts])
        if isinstance(parts[0], Int8Linear):
            scale = _join([self._take(part.weight_scale, torch.float32) for part in parts])
        elif self._device.type != "cpu":  # there, a narrower type is widened when it is used
            weight = weight.to(self._ops.dtype)
        linear = self._ops.prepare(Linear(weight, bias, scale))
        self.weight_bytes += linear.weight_bytes
        return linear

    def vision_tower(self, tower: nn.Module) -> VisionWeights:
        """Take a vision tower of Kosmos-2 or CLIP."""
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
            pre_norm=self.norm(tower.pre_layrnorm),
            blocks=[self._vision_block(layer) for layer in tower.encoder.layers],
            post_norm=self.norm(tower.post_layernorm),
            patch_size=side,
        )

    def text_block(self, layer: Any) -> Block:
        """Take a layer of Kosmos-2's text decoder."""
        attention, ffn = layer.self_attn, layer.ffn
        return Block(
            norm1=self.norm(layer.self_attn_layer_norm),
            qkv=self._qkv(attention),
            inner_norm=self.norm(attention.inner_attn_ln),
            out=self.linear(attention.out_proj),
            norm2=self.norm(layer.final_layer_norm),
            fc1=self.linear(ffn.fc1),
            activation=attention.config.activation_function,
            ffn_norm=self.norm(ffn.ffn_layernorm),
            fc2=self.linear(ffn.fc2),
            heads=attention.num_heads,
            causal=True,
        )

    def resampler(self, resampler: Any) -> ResamplerWeights:
        """Take the resampler, and compute the latents' queries, keys and values."""
        attention = resampler.x_attn
        latent_query = resampler.latent_query.detach().to(device=self._device, dtype=self._ops.dtype)
        key_value = self.linear(attention.k_proj, attention.v_proj)
        return ResamplerWeights(
            dense=self.linear(resampler.dense),
            key_value=key_value,
            query=self._ops.linear(latent_query, self.linear(attention.q_proj)),
            latent_key_value=self._ops.linear(latent_query, key_value),
            out=self.linear(attention.out_proj),
            heads=attention.num_heads,
        )

    def recurrent_layer(self, rnn: nn.RNNBase, layer: int) -> RecurrentLayer:
        """Take a layer of the LSTM, GRU or RNN."""
        return RecurrentLayer(
            *(
                Linear(
                    self._take(getattr(rnn, f"weight_{source}_l{layer}")),
                    self._take(getattr(rnn, f"bias_{source}_l{layer}"), torch.float32),
                )
                for source in ("ih", "hh")
            )
        )

    def head_layer(self, layer: nn.Module) -> Linear | Norm | nn.Module:
        """Take a layer of the action head; a layer without weights is returned as it is."""
        if isinstance(layer, nn.Linear):
            return self.linear(layer)
        return self.norm(layer) if isinstance(layer, nn.LayerNorm) else layer

    def _vision_block(self, layer: Any) -> Block:
        attention, mlp = layer.self_attn, layer.mlp
        return Block(
            norm1=self.norm(layer.layer_norm1),
            qkv=self._qkv(attention),
            inner_norm=None,
            out=self.linear(attention.out_proj),
            norm2=self.norm(layer.layer_norm2),
            fc1=self.linear(mlp.fc1),
            activation=mlp.config.hidden_act,
            ffn_norm=None,
            fc2=self.linear(mlp.fc2),
            heads=attention.num_heads,
            causal=False,
        )

    def _qkv(self, attention: Any) -> tuple[Linear, ...]:
        """Take queries, keys and values as one product, or as three if joining them would copy pages of a file."""
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        return (self.linear(*parts),) if self._joins else tuple(self.linear(part) for part in parts)

    def _take(self, values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return values on the device, in the type of the operations or another."""
        taken = values.detach().to(device=self._device, dtype=dtype or self._ops.dtype).contiguous()
        self.weight_bytes += taken.nbytes
        return taken


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
