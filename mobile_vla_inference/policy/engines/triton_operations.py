"""TritonOperations: the large operations of a step by Triton kernels, in 16-bit types on a CUDA device.

Wide products of 16-bit weights are left to cuBLAS, which shares the rows between neighbouring blocks. Products of int8
weights read int8 rows if these come from a LayerNorm; otherwise the weights are widened in registers. What each kernel
gained, and what was tried without a gain, is in docs/benchmarks.md. How products are cut is in tilings.py.
"""

from __future__ import annotations

import torch
import triton

from mobile_vla_inference.policy.engines import triton_kernels as kernels
from mobile_vla_inference.policy.engines.operations import Linear, Norm, QuantizedRows, Rows, TorchOperations
from mobile_vla_inference.policy.engines.tilings import Operands, Tiling, block_rows, choose_tiling
from mobile_vla_inference.policy.preprocess import PixelScaling

#: The inner axis of a product of int8 rows must be a multiple of this.
_INT8_ALIGNMENT = 32


class TritonOperations(TorchOperations):
    """See TorchOperations for what each operation computes."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """Prepare for the device that the operations run on."""
        super().__init__(dtype)
        properties = torch.cuda.get_device_properties(device)
        self._multiprocessors = properties.multi_processor_count
        #: Whether a kernel can start before the one that it depends on has ended.
        self._dependent = kernels.HAS_DEPENDENT_LAUNCH and properties.major >= 9

    def patches(self, frame: torch.Tensor, scaling: PixelScaling, side: int, padded: int) -> torch.Tensor:
        """Cut a frame into scaled patches."""
        count = (len(frame) // side) ** 2
        out = torch.empty(count, padded, device=frame.device, dtype=self.dtype)
        kernels.patches_kernel[(count,)](
            frame,
            out,
            *scaling.factor,
            *scaling.shift,
            len(frame),
            PATCH=side,
            PADDED=padded,
            REVERSE=scaling.reverse,
            BLOCK=triton.next_power_of_2(padded),
            num_warps=4,
        )
        return out

    def linear(
        self, rows: Rows, linear: Linear, activation: str | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the product, biased and activated."""
        if out is None:
            out = torch.empty(len(rows), len(linear.weight), device=linear.weight.device, dtype=self.dtype)
        if linear.scale is not None:
            self._write_product(rows, linear, out, activation)
            return out
        torch.addmm(linear.bias, rows, linear.weight.T, out=out)
        if activation is not None:
            kernels.activate_kernel[(triton.cdiv(out.numel(), 2048),)](
                out, out.numel(), ACTIVATION=activation, BLOCK=2048
            )
        return out

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
        """Return the residual stream with the product added, and its normalised rows."""
        width = len(linear.weight)
        splits = self._tiling(rows, linear, can_split=True).splits
        partial = torch.empty(splits, len(rows), width, device=residual.device, dtype=torch.float32)
        self._write_product(rows, linear, partial)
        stream = torch.empty_like(residual, dtype=torch.float32)
        out, scale = self._empty_rows(into, residual.shape, residual.device)
        self._launch(
            kernels.add_norm_kernel,
            (len(residual),),
            partial,
            linear.bias,
            residual,
            norm.weight,
            norm.bias,
            stream,
            out,
            scale,
            len(rows),
            first_row,
            factor,
            norm.eps,
            WIDTH=width,
            SPLIT=splits,
            HAS_BIAS=linear.bias is not None,
            QUANTIZE=scale is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=4 if width <= 1024 else 8,
        )
        return stream, out if scale is None else QuantizedRows(out, scale)

    def norm(self, rows: torch.Tensor, norm: Norm, activation: str | None = None, into: Linear | None = None) -> Rows:
        """Return rows, activated and then normalised."""
        out, scale = self._empty_rows(into, rows.shape, rows.device)
        self._normalize(rows, norm.weight, norm.bias, norm.eps, activation, out, scale)
        return out if scale is None else QuantizedRows(out, scale)

    def unit_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows scaled to length 1."""
        out = torch.empty(rows.shape, device=rows.device, dtype=self.dtype)
        self._normalize(rows, None, None, 1e-12, None, out, None)
        return out

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, causal: bool
    ) -> torch.Tensor:
        """Return the attention's mix of the values, heads side by side."""
        width = query.shape[1]
        head = width // heads
        out = torch.empty(query.shape, device=query.device, dtype=self.dtype)
        block_q = 64 if len(query) > 64 else max(16, triton.next_power_of_2(len(query)))
        self._launch(
            kernels.attention_kernel,
            (triton.cdiv(len(query), block_q), heads),
            query,
            key,
            value,
            out,
            len(query),
            len(key),
            query.stride(0),
            key.stride(0),
            value.stride(0),
            out.stride(0),
            head**-0.5,
            CAUSAL=causal,
            HEAD=head,
            BLOCK_HEAD=max(16, triton.next_power_of_2(head)),
            BLOCK_Q=block_q,
            BLOCK_K=64,
            num_warps=4,
        )
        return out

    def vector_linear(self, vector: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Return the biased product with an fp32 vector."""
        columns, inner = linear.weight.shape
        out = torch.empty(columns, device=vector.device, dtype=torch.float32)
        rows = 8 if columns >= 1024 else 1
        self._launch(
            kernels.vector_kernel,
            (triton.cdiv(columns, rows),),
            vector,
            linear.weight,
            linear.bias,
            out,
            N=columns,
            K=inner,
            HAS_BIAS=linear.bias is not None,
            ROWS=rows,
            BLOCK_K=512,
            num_warps=4,
        )
        return out

    def lstm(
        self, features: torch.Tensor, recurrent: torch.Tensor, cell: torch.Tensor, from_input: Linear
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next hidden and cell state of one LSTM layer."""
        width = len(cell)
        next_hidden, next_cell = torch.empty_like(cell), torch.empty_like(cell)
        self._launch(
            kernels.lstm_kernel,
            (triton.cdiv(width, 4),),
            features,
            recurrent,
            cell,
            from_input.weight,
            from_input.bias,
            next_hidden,
            next_cell,
            K=from_input.weight.shape[1],
            HIDDEN=width,
            UNITS=4,
            BLOCK_K=512,
            num_warps=4,
        )
        return next_hidden, next_cell

    def _launch(
        self, kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: object, **constants: object
    ) -> None:
        """Launch a kernel, before the one ahead of it has ended if the device can do that."""
        if self._dependent:
            constants["launch_pdl"] = True
        kernel[grid](*arguments, DEPENDENT=self._dependent, **constants)

    def _tiling(self, rows: Rows, linear: Linear, *, can_split: bool) -> Tiling:
        columns, inner = linear.weight.shape
        if linear.scale is None:
            operands = Operands.SIXTEEN_BIT
        else:
            operands = Operands.INT8 if isinstance(rows, QuantizedRows) else Operands.INT8_WEIGHTS
        return choose_tiling(
            operands, len(rows), columns, inner, can_split=can_split, multiprocessors=self._multiprocessors
        )

    def _write_product(self, rows: Rows, linear: Linear, out: torch.Tensor, activation: str | None = None) -> None:
        """Write a product to `out`: biased and activated to [rows, out] (int8 only), or sums to [splits, rows, out]."""
        columns, inner = linear.weight.shape
        is_partial = out.ndim == 3
        tiling = self._tiling(rows, linear, can_split=is_partial)
        splits = len(out) if is_partial else 1
        rows_per_block = block_rows(len(rows))
        grid = (triton.cdiv(len(rows), rows_per_block), triton.cdiv(columns, tiling.block_columns), splits)
        cut = {
            "N": columns,
            "K": inner,
            "SPLIT": splits,
            "BLOCK_M": rows_per_block,
            "BLOCK_N": tiling.block_columns,
            "BLOCK_K": tiling.block_inner,
            "num_warps": tiling.warps,
            "num_stages": tiling.stages,
        }
        if linear.scale is None:
            self._launch(kernels.linear_kernel, grid, rows, linear.weight, out, len(rows), rows.stride(0), **cut)
            return
        epilogue = {"ACTIVATION": activation, "HAS_BIAS": linear.bias is not None, "PARTIAL": is_partial}
        if isinstance(rows, QuantizedRows):
            kernel, values, inputs = kernels.int8_rows_linear_kernel, rows.values, (rows.values, rows.scale)
        else:
            kernel, values, inputs = kernels.int8_linear_kernel, rows, (rows,)
        self._launch(
            kernel,
            grid,
            *inputs,
            linear.weight,
            linear.scale,
            linear.bias,
            out,
            len(rows),
            values.stride(0),
            out.stride(-2),
            **epilogue,
            **cut,
        )

    def _empty_rows(
        self, into: Linear | None, shape: torch.Size, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Allocate the rows that the product `into` reads, and their scales if it reads int8."""
        if into is None or into.scale is None or shape[1] % _INT8_ALIGNMENT:
            return torch.empty(shape, device=device, dtype=self.dtype), None
        return torch.empty(shape, device=device, dtype=torch.int8), torch.empty(shape[0], device=device)

    def _normalize(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        activation: str | None,
        out: torch.Tensor,
        scale: torch.Tensor | None,
    ) -> None:
        """Write normalised rows to `out`: as a LayerNorm does, or scaled to length 1 if there is no weight."""
        width = rows.shape[1]
        self._launch(
            kernels.norm_kernel,
            (len(rows),),
            rows,
            weight,
            bias,
            out,
            scale,
            eps,
            WIDTH=width,
            UNIT=weight is None,
            ACTIVATION=activation,
            QUANTIZE=scale is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=4 if width <= 2048 else 8,
        )
