"""CpuEngine: the flat step on a CPU, its large matrices packed once in the form that the vector units read.

torch's fp32 product lays a weight out anew in every call. A packed weight is laid out once, and takes half (fp16) or a
quarter (int8) of the memory. fp16 weights are widened in registers: the arithmetic stays fp32, so nothing changes but
the weights' rounding, and not even that where the file holds fp16. With int8 weights the products are int8 too (W8A8):
each row of activations is scaled to [-1, 1] before it is quantised, so that a row of large values costs the others
no precision.

The packing is FBGEMM's (x86 with AVX2). Where torch lacks it, the same step runs on plain fp32 matrices.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.engines.flat import FlatEngine
from mobile_vla_inference.policy.engines.forward import FlatModel, Linear, TorchOperations
from mobile_vla_inference.policy.engines.quantize import dequantize

#: How large matrices are held: `float32` as they are, `float16` and `int8` packed.
PACKINGS = ("float32", "float16", "int8")

#: Below so many weights a call costs more than the product, and packing gains nothing.
_PACKED_FROM = 1 << 18
#: Keeps the scale of a row of zeros above 0.
_SMALLEST_SCALE = 1e-30
#: "quota period" of the process's cgroup, in microseconds; "max" for no quota.
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def can_pack() -> bool:
    """Tell whether this torch has FBGEMM's packed products, which need an x86 CPU with AVX2."""
    has_tensors = hasattr(torch, "_make_per_channel_quantized_tensor")
    return has_tensors and "fbgemm" in torch.backends.quantized.supported_engines


def thread_count() -> int:
    """Return how many threads a step should use: torch's choice (physical cores), at most what the cgroup grants."""
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return threads
    try:
        quota, period = _CPU_QUOTA.read_text().split()
    except (OSError, ValueError):
        return threads
    return threads if quota == "max" else max(1, min(threads, math.ceil(int(quota) / int(period))))


@dataclass
class PackedLinear(Linear):
    """A product with a packed matrix; `weight` is on the meta device, for its shape only.

    Attributes:
        packed: what torch's packed products read.
        is_int8: whether the activations are quantised too.
    """

    packed: Any = None
    is_int8: bool = False


class CpuOperations(TorchOperations):
    """torch's own functions in fp32, and FBGEMM's products with packed matrices."""

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def _product(self, rows: torch.Tensor, linear: Linear) -> torch.Tensor:
        if not isinstance(linear, PackedLinear):
            return super()._product(rows, linear)
        if rows.ndim == 1:
            return self._product(rows.unsqueeze(0), linear)[0]
        if not linear.is_int8:
            return torch.ops.quantized.linear_dynamic_fp16(rows, linear.packed)
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=_SMALLEST_SCALE)
        # 7 bits of activations: without VNNI, AVX2 adds pairs of products in 16 bits, where 8 bits would saturate.
        product = torch.ops.quantized.linear_dynamic(rows / scale, linear.packed, reduce_range=True).mul_(scale)
        return product if linear.bias is None else product.add_(linear.bias)


class CpuFlatModel(FlatModel):
    """The flat model with its large matrices packed."""

    def __init__(self, model: HybridModel, packing: str) -> None:
        """Pack each matrix as it comes; see FlatModel.

        Args:
            model: where they come from.
            packing: one of PACKINGS; `int8` for the matrices of blocks and resampler, and fp16 for the rest. What
                `model` holds as int8 stays so.
        """
        self._packing = packing if can_pack() else "float32"
        super().__init__(model, CpuOperations(), torch.device("cpu"), quantized=packing == "int8")

    def _joined(self, *parts: nn.Module, quantized: bool) -> tuple[Linear, ...]:
        if self._packing == "float32":
            return super()._joined(*parts, quantized=quantized)
        return (self._linear(*parts, quantized=quantized),)

    def _linear(self, *parts: nn.Module, quantized: bool = False) -> Linear:
        linear = super()._linear(*parts, quantized=quantized)
        if self._packing == "float32":
            return linear
        size_before = linear.weight.nbytes
        if linear.weight.numel() < _PACKED_FROM:
            if linear.scale is None:
                return linear
            linear = Linear(dequantize(linear.weight, linear.scale), linear.bias)
            self.weight_bytes += linear.weight.nbytes - size_before
            return linear
        packed = _pack_float16(linear) if linear.scale is None else _pack_int8(linear)
        if isinstance(packed, PackedLinear):
            self.weight_bytes += (1 if packed.is_int8 else 2) * linear.weight.numel() - size_before
        return packed


class CpuEngine(FlatEngine):
    """Run the flat step on the CPU, from packed matrices."""

    def __init__(self, model: HybridModel, packing: str = "float16") -> None:
        """Set torch's threads and pack the weights; see CpuFlatModel."""
        torch.set_num_threads(thread_count())
        self.flat = CpuFlatModel(model, packing)
        self._device = self.flat.device
        self._instruction = None
        self._state = self.flat.initial_state()


def _pack_float16(linear: Linear) -> Linear:
    if not linear.weight.half().isfinite().all():
        return linear  # a value that fp16 can't hold
    bias = None if linear.bias is None else linear.bias.float()
    packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.float(), bias)
    return PackedLinear(linear.weight.to("meta"), linear.bias, packed=packed)


def _pack_int8(linear: Linear) -> PackedLinear:
    zero_points = torch.zeros(len(linear.scale), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to drop these tensors one day: see can_pack
        weight = torch._make_per_channel_quantized_tensor(linear.weight, linear.scale.double(), zero_points, 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return PackedLinear(linear.weight.to("meta"), linear.bias, packed=packed, is_int8=True)
