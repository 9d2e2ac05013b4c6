"""Weights of fewer bits than the arithmetic: int8 in a converted folder, and 16 bits under fp32 on the CPU.

int8 is per-channel symmetric and weight-only. Each row w of a matrix [out, in] is stored as int8 q and one fp32
scale s with w = s q, s = max|w| / 127. `is_block_matrix` (policy/storage) selects the matrices: those of the
transformer blocks and the resampler, 88 % of the published parameters and all the large products of a step. Embeddings
(a step reads a few of their rows), LayerNorms and biases stay in 16 bits. So do the fusion layer, the LSTM and the
head: they are small, and the LSTM feeds its rounding errors back into itself from step to step.

On the CPU, 16-bit arithmetic is several times slower than fp32. So if a 16-bit file is loaded as fp32 there, its
matrices and token tables stay 16-bit pages of the file and are widened when they are used. That is exact: the values
are the same as if they were cast while loading.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

INT8_MAX = 127

#: Rows that the CPU widens at a time: they fit in its cache, and no layer needs a large buffer.
_CPU_BLOCK_ROWS = 512


class Int8Linear(nn.Module):
    """A Linear with int8 weights, dequantised in every call: it saves memory, not time.

    Attributes:
        weight: int8 [out, in].
        weight_scale: fp32 [out], independent of the other types.
        bias: [out] in the type of the activations.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        """Make empty buffers on the current default device."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32))
        self.register_buffer("bias", torch.empty(out_features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out], in the type of `features`."""
        rows = _block_rows(self.weight)
        blocks = zip(self.weight.split(rows), self.weight_scale.split(rows), self.bias.split(rows))
        outputs = [functional.linear(features, dequantize(w, s).to(features.dtype), b) for w, s, b in blocks]
        return torch.cat(outputs, dim=-1)


def row_scales(weight: torch.Tensor) -> torch.Tensor:
    """Return the scale of each row of a matrix, fp32 [out]; not finite if the row is not, 1 for a row of zeros."""
    scales = weight.abs().amax(dim=1).float() / INT8_MAX
    return scales.masked_fill(scales == 0, 1.0)


def quantize(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return a matrix [out, in] as int8, rounded to the nearest multiple of each row's scale."""
    return (weight.float() / scales[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


def dequantize(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the fp32 matrix [out, in] of int8 values and their rows' scales."""
    return weight.to(scales.dtype).mul_(scales[:, None])


class WideningLinear(nn.Linear):
    """A Linear whose weight is widened to the type of the activations in every call."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out], in the type of `features`."""
        rows = _block_rows(self.weight)
        blocks = zip(self.weight.split(rows), self.bias.split(rows))
        return torch.cat([functional.linear(features, w.to(features.dtype), b) for w, b in blocks], dim=-1)


class WideningEmbedding(nn.Embedding):
    """A token table whose rows are widened to fp32 as they are read."""

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [...] to fp32 [..., width]."""
        return super().forward(token_ids).float()


def use_int8_linears(model: nn.Module, weight_names: Iterable[str]) -> None:
    """Replace each Linear whose weight is named by an Int8Linear."""
    for name in weight_names:
        linear = model.get_submodule(name.removesuffix(".weight"))
        _replace(model, name, Int8Linear(linear.in_features, linear.out_features))


def use_widening_modules(model: nn.Module, weight_names: Iterable[str]) -> None:
    """Replace each module whose weight is named by a WideningLinear or WideningEmbedding."""
    for name in weight_names:
        module = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(module, nn.Embedding):
            widening = WideningEmbedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
        else:
            widening = WideningLinear(module.in_features, module.out_features)
        _replace(model, name, widening)


def _block_rows(weight: torch.Tensor) -> int:
    return _CPU_BLOCK_ROWS if weight.device.type == "cpu" else weight.shape[0]


def _replace(model: nn.Module, weight_name: str, module: nn.Module) -> None:
    parent, _, child = weight_name.removesuffix(".weight").rpartition(".")
    setattr(model.get_submodule(parent), child, module)
