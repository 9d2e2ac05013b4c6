"""The operations that a step is made of, and how torch carries them out on any device.

Other ways to carry them out are subclasses of TorchOperations: packed products on the CPU (cpu.py) and Triton kernels
on a GPU (triton_operations.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from mobile_vla_inference.policy.engines.quantize import dequantize
from mobile_vla_inference.policy.preprocess import PixelScaling


@dataclass
class Linear:
    """A product with a matrix.

    Attributes:
        weight: [out, in], floating or int8.
        bias: floating [out]; None for none.
        scale: fp32 [out], the scale of each int8 row; None for a floating weight.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrix alone."""
        return self.weight.nbytes


@dataclass
class Norm:
    """A LayerNorm over the last axis; weight and bias fp32 [width]."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass
class QuantizedRows:
    """Rows of activations as int8 [rows, width], and the scale of each row, fp32 [rows]."""

    values: torch.Tensor
    scale: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)


#: What a product reads: [rows, in] in the type of the operations, or int8.
Rows = torch.Tensor | QuantizedRows


class TorchOperations:
    """Every operation by torch's own functions, on any device.

    Activations are [rows, width] in `dtype`; the residual stream is fp32.

    Attributes:
        dtype: type of the activations.
        copies_matrices: whether `prepare` makes a copy of a matrix in a form of its own.
    """

    copies_matrices = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def prepare(self, linear: Linear) -> Linear:
        """Return a product of a block, the resampler, the fusion or the head in the form that `linear` reads best."""
        return linear

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
        self, rows: Rows, linear: Linear, activation: str | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the product, biased and activated, in `dtype`; in `out` if it is given."""
        result = activate(self._product(rows, linear), activation)
        return result if out is None else out.copy_(result)

    def norm(self, rows: torch.Tensor, norm: Norm, activation: str | None = None, into: Linear | None = None) -> Rows:
        """Return rows (of any floating type), activated and then normalised, in `dtype`.

        If only the product `into` reads them and its weights are int8, they can be int8, too.
        """
        rows = activate(rows.float(), activation)
        return functional.layer_norm(rows, norm.weight.shape, norm.weight, norm.bias, norm.eps).to(self.dtype)

    def unit_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows scaled to length 1, in `dtype`."""
        return functional.normalize(rows.float(), dim=-1).to(self.dtype)

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
            The stream, fp32, and its normalised rows in `dtype`, or in int8 as in `norm`.
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
        """Return softmax(q k^T / sqrt(head width)) v, heads side by side; the inputs can be strided views."""
        by_head = (part.unflatten(1, (heads, -1)).transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        mixed = functional.scaled_dot_product_attention(*by_head, is_causal=causal)
        return mixed.squeeze(0).transpose(0, 1).flatten(1)

    def vector_linear(self, vector: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Return the biased product with an fp32 vector [in], fp32 [out]."""
        return self._product(vector.to(self.dtype), linear).float()

    def lstm(
        self, features: torch.Tensor, recurrent: torch.Tensor, cell: torch.Tensor, from_input: Linear
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next hidden and cell state of one LSTM layer, fp32 [hidden] each.

        Args:
            features: input of the layer, fp32 [in].
            recurrent: what the previous hidden state adds to the gates, fp32 [4 hidden].
            cell: the previous cell state, fp32 [hidden].
            from_input: the gates' weights for the input.
        """
        gates = self.vector_linear(features, from_input) + recurrent
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4)
        cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
        return output_gate.sigmoid() * cell.tanh(), cell

    def _product(self, rows: torch.Tensor, linear: Linear) -> torch.Tensor:
        weight = linear.weight
        if linear.scale is not None:
            weight = dequantize(weight, linear.scale)
        weight = weight.to(self.dtype)
        bias = None if linear.bias is None else linear.bias.to(self.dtype)
        return functional.linear(rows, weight, bias)


def activate(values: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Apply an activation, given by transformers' name; None for none."""
    if activation is None:
        return values
    if activation == "gelu":
        return functional.gelu(values)
    if activation == "quick_gelu":
        return values * torch.sigmoid(1.702 * values)
    raise ValueError(f"activation is {activation!r}, expected gelu or quick_gelu; correct the model's configuration")
