"""CpuEngine: the flat step on a CPU, with its large matrices packed once in the form that the vector units read.

torch's fp32 product rearranges a weight in every call. A packed weight is rearranged once, and takes half (fp16) or a
quarter (int8) of the memory. fp16 weights are widened in registers, so the arithmetic stays fp32: only the rounding of
the weights differs, and not even that if the file holds fp16. With int8 weights the products are int8 too (W8A8). Each
row of activations is scaled to [-1, 1] before it is quantised, so that a row of large values does not reduce the
precision of the others.

The packing is FBGEMM's (x86 with AVX2). If torch lacks it, choice.py takes FlatEngine.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.engines.flat import FlatEngine
from mobile_vla_inference.policy.engines.operations import Linear, TorchOperations
from mobile_vla_inference.policy.engines.quantize import dequantize

#: Smaller matrices are not packed: the overhead of a call costs more than the product.
SMALLEST_PACKED = 1 << 18
#: "quota period" of the process's cgroup, in microseconds; "max" for no quota.
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

#: Keeps the scale of a row of zeros above 0.
_SMALLEST_SCALE = 1e-30


def can_pack() -> bool:
    """Return whether this torch has FBGEMM's packed products, which need an x86 CPU with AVX2."""
    has_tensors = hasattr(torch, "_make_per_channel_quantized_tensor")
    return has_tensors and "fbgemm" in torch.backends.quantized.supported_engines


def thread_count() -> int:
    """Return how many threads a step should use: torch's choice (physical cores), at most the cgroup's quota."""
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return threads
    try:
        quota, period = CPU_QUOTA.read_text().split()
    except (OSError, ValueError):
        return threads
    return threads if quota == "max" else max(1, min(threads, math.ceil(int(quota) / int(period))))


@dataclass
class PackedLinear(Linear):
    """A product with a packed matrix; `weight` is on the meta device and gives only its shape.

    Attributes:
        packed: what torch's packed products read.
        is_int8: whether the activations are quantised too.
    """

    packed: Any = None
    is_int8: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed matrix alone."""
        return (1 if self.is_int8 else 2) * self.weight.numel()


class CpuOperations(TorchOperations):
    """torch's own functions in fp32, and FBGEMM's products with packed matrices."""

    copies_matrices = True

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def prepare(self, linear: Linear) -> Linear:
        """Pack a large matrix: int8 if it is int8, else fp16. A small one is widened to floating point if needed."""
        if linear.weight.numel() >= SMALLEST_PACKED:
            return pack_float16(linear) if linear.scale is None else pack_int8(linear)
        if linear.scale is None:
            return linear
        return Linear(dequantize(linear.weight, linear.scale), linear.bias)

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


class CpuEngine(FlatEngine):
    """Run the flat step on the CPU, from packed matrices."""

    def __init__(self, model: HybridModel) -> None:
        """Set torch's threads and pack the weights."""
        torch.set_num_threads(thread_count())
        super().__init__(model, CpuOperations(), torch.device("cpu"))


def pack_float16(linear: Linear) -> Linear:
    """Pack a floating matrix as fp16; return it as it is if fp16 can't hold a value."""
    if not linear.weight.half().isfinite().all():
        return linear
    bias = None if linear.bias is None else linear.bias.float()
    packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.float(), bias)
    return PackedLinear(linear.weight.to("meta"), linear.bias, packed=packed)


def pack_int8(linear: Linear) -> PackedLinear:
    """Pack an int8 matrix."""
    zero_points = torch.zeros(len(linear.scale), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch plans to remove these tensors: see can_pack
        weight = torch._make_per_channel_quantized_tensor(linear.weight, linear.scale.double(), zero_points, 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return PackedLinear(linear.weight.to("meta"), linear.bias, packed=packed, is_int8=True)
