"""Triton kernels for a step at batch 1, where a matrix product reads its weights once for 64 to 257 rows.

Libraries tile such products for throughput: where the result is narrow, too few blocks are at work. Here those products
are cut along their inner axis until every multiprocessor has a block, and the partial sums are added by the kernel that
follows anyway, with bias, residual and LayerNorm (`_add_norm_kernel`). Wide products are left to cuBLAS, which shares
the rows between neighbouring blocks. Attention, LayerNorms, the cell and the frame's patches are one kernel each. A
kernel is launched while the one before it ends (programmatic dependent launch, Hopper and later). Products of int8
weights whose rows come from a LayerNorm read those as int8, too; for others the weights are widened in registers.
docs/benchmarks.md tells what each of these gained, and what was tried and lost.

Triton is optional: `AVAILABLE` tells.
"""

from __future__ import annotations

import math

import torch

from mobile_vla_inference.policy.engines.forward import Linear, Norm, QuantizedRows, Rows, TorchOperations
from mobile_vla_inference.policy.preprocess import PixelScaling

try:
    import triton
    import triton.language as tl
except ImportError:  # the graph engine then captures torch's own functions
    triton = None

AVAILABLE = triton is not None

if AVAILABLE:
    try:
        from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

        _HAS_DEPENDENT_LAUNCH = True
    except ImportError:
        _HAS_DEPENDENT_LAUNCH = False

        @triton.jit
        def gdc_wait():
            """Stand in where this Triton knows no dependent launch; never called then."""

        @triton.jit
        def gdc_launch_dependents():
            """Stand in where this Triton knows no dependent launch; never called then."""

    @triton.jit
    def _activated(values, ACTIVATION: tl.constexpr):
        if ACTIVATION == "gelu":
            values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
        elif ACTIVATION == "quick_gelu":
            values = values * tl.sigmoid(1.702 * values)
        return values

    @triton.jit
    def _linear_kernel(
        rows_ptr,
        weight_ptr,
        partial_ptr,
        row_count,
        row_stride,
        N: tl.constexpr,
        K: tl.constexpr,
        SPLIT: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        DEPENDENT: tl.constexpr,
    ):
        """Rows [M, K] times weight [N, K] transposed: the fp32 sums of each split of the inner axis, [SPLIT, M, N]."""
        block_m = tl.program_id(0)
        block_n = tl.program_id(1)
        split = tl.program_id(2)
        offsets_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offsets_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        PART: tl.constexpr = K // SPLIT
        first_k = split * PART
        if DEPENDENT:
            gdc_wait()
            gdc_launch_dependents()
        in_rows = offsets_m < row_count
        in_columns = offsets_n < N
        offsets_k = first_k + tl.arange(0, BLOCK_K)
        rows_ptrs = rows_ptr + offsets_m[:, None] * row_stride + offsets_k[None, :]
        weight_ptrs = weight_ptr + offsets_n[None, :].to(tl.int64) * K + offsets_k[:, None]
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for _ in range(0, PART, BLOCK_K):
            rows = tl.load(rows_ptrs, mask=in_rows[:, None], other=0.0)
            weight = tl.load(weight_ptrs, mask=in_columns[None, :], other=0.0)
            sums = tl.dot(rows, weight, sums)
            rows_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K
        mask = in_rows[:, None] & in_columns[None, :]
        out = partial_ptr + split.to(tl.int64) * row_count * N + offsets_m[:, None] * N + offsets_n[None, :]
        tl.store(out, sums, mask=mask)

    @triton.jit
    def _int8_linear_kernel(
        rows_ptr,
        weight_ptr,
        scale_ptr,
        bias_ptr,
        out_ptr,
        row_count,
        row_stride,
        out_stride,
        N: tl.constexpr,
        K: tl.constexpr,
        SPLIT: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        PARTIAL: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        DEPENDENT: tl.constexpr,
    ):
        """As `_linear_kernel`, of int8 weights, with scale, bias and activation unless PARTIAL.

        The weights are the left operand: that one may come from registers, where they are widened.
        """
        block_m = tl.program_id(0)
        block_n = tl.program_id(1)
        split = tl.program_id(2)
        offsets_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offsets_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = offsets_m < row_count
        in_columns = offsets_n < N
        PART: tl.constexpr = K // SPLIT
        offsets_k = split * PART + tl.arange(0, BLOCK_K)
        rows_ptrs = rows_ptr + offsets_m[None, :] * row_stride + offsets_k[:, None]
        weight_ptrs = weight_ptr + offsets_n[:, None].to(tl.int64) * K + offsets_k[None, :]
        scale = tl.load(scale_ptr + offsets_n, mask=in_columns, other=0.0)
        if DEPENDENT:
            gdc_wait()
            gdc_launch_dependents()
        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for _ in range(0, PART, BLOCK_K):
            rows = tl.load(rows_ptrs, mask=in_rows[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=in_columns[:, None], other=0)
            sums = tl.dot(weight.to(rows.dtype), rows, sums)
            rows_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K
        sums *= scale[:, None]
        mask = in_rows[None, :] & in_columns[:, None]
        if PARTIAL:
            out = out_ptr + split.to(tl.int64) * row_count * N + offsets_m[None, :] * N + offsets_n[:, None]
            tl.store(out, sums, mask=mask)
        else:
            if HAS_BIAS:
                sums += tl.load(bias_ptr + offsets_n, mask=in_columns, other=0.0)[:, None]
            sums = _activated(sums, ACTIVATION)
            out = out_ptr + offsets_m[None, :] * out_stride + offsets_n[:, None]
            tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _int8_rows_linear_kernel(
        rows_ptr,
        row_scale_ptr,
        weight_ptr,
        scale_ptr,
        bias_ptr,
        out_ptr,
        row_count,
        row_stride,
        out_stride,
        N: tl.constexpr,
        K: tl.constexpr,
        SPLIT: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        PARTIAL: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        DEPENDENT: tl.constexpr,
    ):
        """As `_int8_linear_kernel`, of int8 rows with a scale each: the sums are exact integers."""
        block_m = tl.program_id(0)
        block_n = tl.program_id(1)
        split = tl.program_id(2)
        offsets_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offsets_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = offsets_m < row_count
        in_columns = offsets_n < N
        PART: tl.constexpr = K // SPLIT
        offsets_k = split * PART + tl.arange(0, BLOCK_K)
        rows_ptrs = rows_ptr + offsets_m[:, None] * row_stride + offsets_k[None, :]
        weight_ptrs = weight_ptr + offsets_n[None, :].to(tl.int64) * K + offsets_k[:, None]
        scale = tl.load(scale_ptr + offsets_n, mask=in_columns, other=0.0)
        if DEPENDENT:
            gdc_wait()
            gdc_launch_dependents()
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for _ in range(0, PART, BLOCK_K):
            rows = tl.load(rows_ptrs, mask=in_rows[:, None], other=0)
            weight = tl.load(weight_ptrs, mask=in_columns[None, :], other=0)
            sums = tl.dot(rows, weight, sums, out_dtype=tl.int32)
            rows_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K
        row_scale = tl.load(row_scale_ptr + offsets_m, mask=in_rows, other=0.0)
        values = sums.to(tl.float32) * row_scale[:, None] * scale[None, :]
        mask = in_rows[:, None] & in_columns[None, :]
        if PARTIAL:
            out = out_ptr + split.to(tl.int64) * row_count * N + offsets_m[:, None] * N + offsets_n[None, :]
            tl.store(out, values, mask=mask)
        else:
            if HAS_BIAS:
                values += tl.load(bias_ptr + offsets_n, mask=in_columns, other=0.0)[None, :]
            values = _activated(values, ACTIVATION)
            out = out_ptr + offsets_m[:, None] * out_stride + offsets_n[None, :]
            tl.store(out, values.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _store_row(out_ptr, scale_ptr, row, columns, values, inside, WIDTH: tl.constexpr, QUANTIZE: tl.constexpr):
        """Store a row, or (QUANTIZE) its int8 values and their step."""
        if QUANTIZE:
            step = tl.maximum(tl.max(tl.abs(values), axis=0) / 127.0, 1e-12)
            tl.store(scale_ptr + row, step)
            values = tl.floor(values / step + 0.5)
        tl.store(out_ptr + row * WIDTH + columns, values.to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _activate_kernel(values_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
        """Activate values in place."""
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < count
        values = tl.load(values_ptr + offsets, mask=inside).to(tl.float32)
        tl.store(values_ptr + offsets, _activated(values, ACTIVATION).to(values_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _add_norm_kernel(
        partial_ptr,
        bias_ptr,
        residual_ptr,
        norm_weight_ptr,
        norm_bias_ptr,
        stream_ptr,
        out_ptr,
        scale_ptr,
        product_rows,
        first_row,
        factor,
        eps,
        WIDTH: tl.constexpr,
        SPLIT: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        QUANTIZE: tl.constexpr,
        BLOCK: tl.constexpr,
        DEPENDENT: tl.constexpr,
    ):
        """Add a product's partial sums and bias to a row of the residual stream, and normalise the row."""
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        weight = tl.load(norm_weight_ptr + columns, mask=inside, other=0.0)
        norm_bias = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0)
        if DEPENDENT:
            gdc_wait()
            gdc_launch_dependents()
        values = tl.load(residual_ptr + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        source = row - first_row
        has_product = (source >= 0) & (source < product_rows)
        added = tl.zeros((BLOCK,), dtype=tl.float32)
        if HAS_BIAS:
            added += tl.load(bias_ptr + columns, mask=inside & has_product, other=0.0)
        for split in tl.static_range(SPLIT):
            offset = (split * product_rows + source) * WIDTH
            added += tl.load(partial_ptr + offset + columns, mask=inside & has_product, other=0.0)
        values += added * factor
        tl.store(stream_ptr + row * WIDTH + columns, values, mask=inside)
        mean = tl.sum(values, axis=0) / WIDTH
        centred = tl.where(inside, values - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / WIDTH
        normalised = centred / tl.sqrt(variance + eps) * weight + norm_bias
        _store_row(out_ptr, scale_ptr, row, columns, normalised, inside, WIDTH, QUANTIZE)

    @triton.jit
    def _norm_kernel(
        rows_ptr,
        weight_ptr,
        bias_ptr,
        out_ptr,
        scale_ptr,
        eps,
        WIDTH: tl.constexpr,
        UNIT: tl.constexpr,
        ACTIVATION: tl.constexpr,
        QUANTIZE: tl.constexpr,
        BLOCK: tl.constexpr,
        DEPENDENT: tl.constexpr,
    ):
        """Activate a row and normalise it to mean 0 and variance 1, or (UNIT) to length 1."""
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        if not UNIT:
            weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
            bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
        if DEPENDENT:
            gdc_wait()
            gdc_launch_dependents()
        values = tl.load(rows_ptr + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        values = _activated(values, ACTIVATION)
        if UNIT:
            length = tl.sqrt(tl.sum(values * values, axis=0))
            normalised = values / tl.maximum(length, eps)
        else:
            mean = tl.sum(values, axis=0) / WIDTH
            centred = tl.where(inside, values - mean, 0.0)
            variance = tl.sum(centred * centred, axis=0) / WIDTH
            normalised = centred / tl.sqrt(variance + eps) * weight + bias
        _store_row(out_ptr, scale_ptr, row, columns, normalised, inside, WIDTH, QUANTIZE)

    @triton.jit
    def _attention_kernel(
        query_ptr,
        key_ptr,
        value_ptr,
        out_ptr,
        query_count,
        key_count,
        query_stride,
        key_stride,
        value_stride,
        out_stride,
        scale,
        CAUSAL: tl.constexpr,
        HEAD: tl.constexpr,
        BLOCK_HEAD: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
        DEPENDENT: tl.constexpr,
    ):
        """One head and one block of queries: softmax over all keys, in one pass."""
        block = tl.program_id(0)
        head = tl.program_id(1)
        queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        within = tl.arange(0, BLOCK_HEAD)
        in_head = within < HEAD
        if DEPENDENT:
            gdc_wait()
            gdc_launch_dependents()
        query = tl.load(
            query_ptr + queries[:, None] * query_stride + head * HEAD + within[None, :],
            mask=(queries < query_count)[:, None] & in_head[None, :],
            other=0.0,
        )
        largest = tl.full((BLOCK_Q,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        mixed = tl.zeros((BLOCK_Q, BLOCK_HEAD), dtype=tl.float32)
        last_key = key_count
        if CAUSAL:
            last_key = tl.minimum(key_count, (block + 1) * BLOCK_Q)
        for first in range(0, last_key, BLOCK_K):
            keys = first + tl.arange(0, BLOCK_K)
            in_keys = (keys < key_count)[:, None] & in_head[None, :]
            offsets = head * HEAD + within[None, :]
            key = tl.load(key_ptr + keys[:, None] * key_stride + offsets, mask=in_keys, other=0.0)
            value = tl.load(value_ptr + keys[:, None] * value_stride + offsets, mask=in_keys, other=0.0)
            scores = tl.dot(query, tl.trans(key)) * scale
            visible = (keys < key_count)[None, :]
            if CAUSAL:
                visible = visible & (keys[None, :] <= queries[:, None])
            scores = tl.where(visible, scores, -float("inf"))
            new_largest = tl.maximum(largest, tl.max(scores, axis=1))
            shrink = tl.exp(largest - new_largest)
            weights = tl.exp(scores - new_largest[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            mixed = tl.dot(weights.to(value.dtype), value, mixed * shrink[:, None])
            largest = new_largest
        mixed /= total[:, None]
        tl.store(
            out_ptr + queries[:, None] * out_stride + head * HEAD + within[None, :],
            mixed.to(out_ptr.dtype.element_ty),
            mask=(queries < query_count)[:, None] & in_head[None, :],
        )

    @triton.jit
    def _dot_rows(
        vector_ptr, weight_ptr, row_offsets, in_rows, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
    ):
        """Return the products of some weight rows with an fp32 vector, fp32 [ROWS]."""
        sums = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            inside = columns < K
            vector = tl.load(vector_ptr + columns, mask=inside, other=0.0)
            weight = tl.load(
                weight_ptr + row_offsets[:, None].to(tl.int64) * K + columns[None, :],
                mask=in_rows[:, None] & inside[None, :],
                other=0.0,
            )
            sums += weight.to(tl.float32) * vector[None, :]
        return tl.sum(sums, axis=1)

    @triton.jit
    def _vector_kernel(
        vector_ptr,
        weight_ptr,
        bias_ptr,
        out_ptr,
        N: tl.constexpr,
        K: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_K: tl.constexpr,
        DEPENDENT: tl.constexpr,
    ):
        """Product of a matrix [N, K] with an fp32 vector [K]."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        in_rows = rows < N
        if DEPENDENT:
            gdc_wait()
            gdc_launch_dependents()
        sums = _dot_rows(vector_ptr, weight_ptr, rows, in_rows, K, ROWS, BLOCK_K)
        if HAS_BIAS:
            sums += tl.load(bias_ptr + rows, mask=in_rows, other=0.0)
        tl.store(out_ptr + rows, sums, mask=in_rows)

    @triton.jit
    def _gate(sums, which, GATE: tl.constexpr):
        """Return one gate's sums of [gates, units]."""
        return tl.sum(tl.where(which == GATE, sums, 0.0), axis=0)

    @triton.jit
    def _lstm_kernel(
        input_ptr,
        recurrent_ptr,
        cell_ptr,
        weight_ptr,
        bias_ptr,
        next_hidden_ptr,
        next_cell_ptr,
        K: tl.constexpr,
        HIDDEN: tl.constexpr,
        UNITS: tl.constexpr,
        BLOCK_K: tl.constexpr,
        DEPENDENT: tl.constexpr,
    ):
        """One step of an LSTM layer, UNITS of its units; gates in torch's order: input, forget, candidate, output."""
        rows_of_block = tl.arange(0, 4 * UNITS)
        block_units = tl.program_id(0) * UNITS
        row_units = block_units + rows_of_block % UNITS
        rows = (rows_of_block // UNITS) * HIDDEN + row_units
        in_rows = row_units < HIDDEN
        units = block_units + tl.arange(0, UNITS)
        in_units = units < HIDDEN
        if DEPENDENT:
            gdc_wait()
            gdc_launch_dependents()
        sums = _dot_rows(input_ptr, weight_ptr, rows, in_rows, K, 4 * UNITS, BLOCK_K)
        sums += tl.load(bias_ptr + rows, mask=in_rows, other=0.0)
        sums += tl.load(recurrent_ptr + rows, mask=in_rows, other=0.0)
        sums = tl.reshape(sums, (4, UNITS))
        which = tl.arange(0, 4)[:, None]
        cell = tl.load(cell_ptr + units, mask=in_units, other=0.0)
        candidate = 2.0 * tl.sigmoid(2.0 * _gate(sums, which, 2)) - 1.0
        cell = tl.sigmoid(_gate(sums, which, 1)) * cell + tl.sigmoid(_gate(sums, which, 0)) * candidate
        hidden = tl.sigmoid(_gate(sums, which, 3)) * (2.0 * tl.sigmoid(2.0 * cell) - 1.0)
        tl.store(next_cell_ptr + units, cell, mask=in_units)
        tl.store(next_hidden_ptr + units, hidden, mask=in_units)

    @triton.jit
    def _patches_kernel(
        frame_ptr,
        out_ptr,
        factor_0,
        factor_1,
        factor_2,
        shift_0,
        shift_1,
        shift_2,
        side,
        PATCH: tl.constexpr,
        PADDED: tl.constexpr,
        REVERSE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Cut a uint8 frame [side, side, 3] into scaled patches [patches, PADDED]; one patch of one frame."""
        patch = tl.program_id(0)
        across = side // PATCH
        offsets = tl.arange(0, BLOCK)
        inside = offsets < 3 * PATCH * PATCH
        channel = offsets // (PATCH * PATCH)
        row = (patch // across) * PATCH + (offsets // PATCH) % PATCH
        column = (patch % across) * PATCH + offsets % PATCH
        source = 2 - channel if REVERSE else channel
        pixels = tl.load(frame_ptr + (row * side + column) * 3 + source, mask=inside, other=0).to(tl.float32)
        factor = tl.where(channel == 0, factor_0, tl.where(channel == 1, factor_1, factor_2))
        shift = tl.where(channel == 0, shift_0, tl.where(channel == 1, shift_1, shift_2))
        values = tl.where(inside, pixels * factor + shift, 0.0)
        tl.store(out_ptr + patch * PADDED + offsets, values.to(out_ptr.dtype.element_ty), mask=offsets < PADDED)


#: Block of columns, block of the inner axis, splits of it, warps, stages.
_Tiling = tuple[int, int, int, int, int]

#: (blocks of rows, out, in) -> the fastest tiling for the published sizes on an H100 (docs/benchmarks.md), of 16-bit
#: weights, of int8 weights, and of int8 weights and rows.
_MEASURED: dict[tuple[int, int, int], _Tiling] = {
    (1, 6144, 2048): (64, 128, 1, 8, 4),
    (1, 2048, 2048): (64, 64, 4, 8, 5),
    (1, 8192, 2048): (64, 128, 1, 8, 4),
    (1, 2048, 8192): (64, 64, 8, 8, 4),
    (3, 3072, 1024): (128, 64, 1, 8, 4),
    (3, 1024, 1024): (64, 64, 2, 8, 4),
    (3, 4096, 1024): (128, 64, 1, 8, 4),
    (3, 1024, 4096): (128, 64, 4, 8, 4),
}
_MEASURED_INT8: dict[tuple[int, int, int], _Tiling] = {
    (1, 6144, 2048): (64, 128, 1, 4, 3),
    (1, 2048, 2048): (64, 128, 8, 4, 3),
    (1, 8192, 2048): (64, 128, 1, 4, 3),
    (1, 2048, 8192): (64, 128, 8, 4, 3),
    (3, 3072, 1024): (64, 128, 1, 4, 3),
    (3, 1024, 1024): (64, 64, 8, 4, 3),
    (3, 4096, 1024): (128, 64, 1, 8, 3),
    (3, 1024, 4096): (64, 64, 8, 4, 3),
}


_MEASURED_INT8_ROWS: dict[tuple[int, int, int], _Tiling] = {
    (1, 6144, 2048): (64, 256, 1, 8, 4),
    (1, 2048, 2048): (64, 64, 4, 4, 6),
    (1, 8192, 2048): (64, 256, 1, 8, 4),
    (1, 2048, 8192): (64, 128, 4, 8, 6),
    (3, 3072, 1024): (64, 128, 1, 4, 3),
    (3, 4096, 1024): (64, 128, 1, 4, 3),
}


#: What the inner axis of a product of int8 rows has to be a multiple of.
_INT8_ALIGNMENT = 32


def _block_rows(rows: int) -> int:
    """Return the rows of one block of a product; a text of up to 128 tokens, image included, is one block."""
    return 128 if rows > 64 else 64


class TritonOperations(TorchOperations):
    """The large operations by the kernels above; 16-bit types on a CUDA device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, int8_rows: bool = True) -> None:
        """Prepare for a device. `int8_rows`: LayerNorms write int8 where a product of int8 weights reads them."""
        super().__init__(dtype)
        self._int8_rows = int8_rows
        properties = torch.cuda.get_device_properties(device)
        self._multiprocessors = properties.multi_processor_count
        #: Whether kernels may start before the one they depend on has ended.
        self._dependent = _HAS_DEPENDENT_LAUNCH and properties.major >= 9
        self._launch = {"launch_pdl": True} if self._dependent else {}

    def tiling(self, rows: Rows, linear: Linear, splits: bool) -> _Tiling:
        """Choose how a product is cut so that every multiprocessor has work."""
        columns, inner = linear.weight.shape
        block_rows = _block_rows(len(rows))
        measured = _MEASURED
        if linear.scale is not None:
            measured = _MEASURED_INT8_ROWS if isinstance(rows, QuantizedRows) else _MEASURED_INT8
        known = measured.get((math.ceil(len(rows) / block_rows), columns, inner))
        if known is not None:
            return known
        block_k = 64 if inner % 64 == 0 else 32 if inner % 32 == 0 else 16
        block_n = 64
        blocks = math.ceil(len(rows) / block_rows) * math.ceil(columns / block_n)
        split = 1
        while splits and blocks * split * 2 <= 1.3 * self._multiprocessors and inner % (split * 2 * block_k) == 0:
            split *= 2
        return block_n, block_k, split, 4, 4

    def linear(
        self, rows: Rows, linear: Linear, activation: str | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the product, biased and activated, in `dtype`."""
        if out is None:
            out = torch.empty(len(rows), len(linear.weight), device=linear.weight.device, dtype=self.dtype)
        if linear.scale is not None:
            self._product(rows, linear, out, activation)
            return out
        torch.addmm(linear.bias, rows, linear.weight.T, out=out)
        if activation is not None:
            _activate_kernel[(triton.cdiv(out.numel(), 2048),)](out, out.numel(), ACTIVATION=activation, BLOCK=2048)
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
        """Return the residual stream with the biased product added, fp32, and its normalised rows; see Operations."""
        width = len(linear.weight)
        split = self.tiling(rows, linear, True)[2]
        partial = torch.empty(split, len(rows), width, device=residual.device, dtype=torch.float32)
        self._product(rows, linear, partial)
        stream = torch.empty_like(residual, dtype=torch.float32)
        out, scale = self._rows_for(into, residual.shape, residual.device)
        _add_norm_kernel[(len(residual),)](
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
            SPLIT=split,
            HAS_BIAS=linear.bias is not None,
            QUANTIZE=scale is not None,
            BLOCK=triton.next_power_of_2(width),
            DEPENDENT=self._dependent,
            num_warps=4 if width <= 1024 else 8,
            **self._launch,
        )
        return stream, out if scale is None else QuantizedRows(out, scale)

    def _rows_for(
        self, into: Linear | None, shape: torch.Size, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Make place for the rows that a product reads, and for their scales where they are int8."""
        if into is None or into.scale is None or not self._int8_rows or shape[1] % _INT8_ALIGNMENT:
            return torch.empty(shape, device=device, dtype=self.dtype), None
        return torch.empty(shape, device=device, dtype=torch.int8), torch.empty(shape[0], device=device)

    def _product(self, rows: Rows, linear: Linear, out: torch.Tensor, activation: str | None = None) -> None:
        """Write a product to `out`: biased and activated to [rows, out] (int8 only), or sums to [splits, rows, out]."""
        columns, inner = linear.weight.shape
        is_partial = out.ndim == 3
        block_n, block_k, _, warps, stages = self.tiling(rows, linear, is_partial)
        block_rows = _block_rows(len(rows))
        split = len(out) if is_partial else 1
        grid = (triton.cdiv(len(rows), block_rows), triton.cdiv(columns, block_n), split)
        cut = {
            "N": columns,
            "K": inner,
            "SPLIT": split,
            "BLOCK_M": block_rows,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "DEPENDENT": self._dependent,
            "num_warps": warps,
            "num_stages": stages,
            **self._launch,
        }
        if linear.scale is None:
            _linear_kernel[grid](rows, linear.weight, out, len(rows), rows.stride(0), **cut)
            return
        epilogue = {"ACTIVATION": activation, "HAS_BIAS": linear.bias is not None, "PARTIAL": is_partial}
        int8 = (linear.weight, linear.scale, linear.bias, out, len(rows))
        if isinstance(rows, QuantizedRows):
            values = rows.values
            _int8_rows_linear_kernel[grid](
                values, rows.scale, *int8, values.stride(0), out.stride(-2), **epilogue, **cut
            )
        else:
            _int8_linear_kernel[grid](rows, *int8, rows.stride(0), out.stride(-2), **epilogue, **cut)

    def norm(self, rows: torch.Tensor, norm: Norm, activation: str | None = None, into: Linear | None = None) -> Rows:
        """Return normalised rows (of any floating type), activated before that; see Operations."""
        out, scale = self._rows_for(into, rows.shape, rows.device)
        self._norm(rows, norm.weight, norm.bias, norm.eps, activation, out, scale)
        return out if scale is None else QuantizedRows(out, scale)

    def unit_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows scaled to length 1, in `dtype`."""
        out = torch.empty(rows.shape, device=rows.device, dtype=self.dtype)
        self._norm(rows, None, None, 1e-12, None, out, None)
        return out

    def _norm(self, rows: torch.Tensor, weight, bias, eps: float, activation: str | None, out, scale) -> None:
        width = rows.shape[1]
        _norm_kernel[(len(rows),)](
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
            DEPENDENT=self._dependent,
            num_warps=4 if width <= 2048 else 8,
            **self._launch,
        )

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, causal: bool
    ) -> torch.Tensor:
        """Return softmax(q k^T / sqrt(head width)) v, heads side by side; the inputs may be strided views."""
        width = query.shape[1]
        head = width // heads
        out = torch.empty(query.shape, device=query.device, dtype=self.dtype)
        block_q = 64 if len(query) > 64 else max(16, triton.next_power_of_2(len(query)))
        _attention_kernel[(triton.cdiv(len(query), block_q), heads)](
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
            DEPENDENT=self._dependent,
            num_warps=4,
            **self._launch,
        )
        return out

    def vector_linear(self, vector: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Return the biased product with an fp32 vector [in], fp32 [out]."""
        columns, inner = linear.weight.shape
        out = torch.empty(columns, device=vector.device, dtype=torch.float32)
        rows = 8 if columns >= 1024 else 1
        _vector_kernel[(triton.cdiv(columns, rows),)](
            vector,
            linear.weight,
            linear.bias,
            out,
            N=columns,
            K=inner,
            HAS_BIAS=linear.bias is not None,
            ROWS=rows,
            BLOCK_K=512,
            DEPENDENT=self._dependent,
            num_warps=4,
            **self._launch,
        )
        return out

    def lstm(
        self, features: torch.Tensor, recurrent: torch.Tensor, cell: torch.Tensor, from_input: Linear
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next hidden and cell state of one LSTM layer; see Operations."""
        width = len(cell)
        next_hidden, next_cell = torch.empty_like(cell), torch.empty_like(cell)
        _lstm_kernel[(triton.cdiv(width, 4),)](
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
            DEPENDENT=self._dependent,
            num_warps=4,
            **self._launch,
        )
        return next_hidden, next_cell

    def patches(self, frame: torch.Tensor, scaling: PixelScaling, side: int, padded: int) -> torch.Tensor:
        """Cut a frame, uint8 [height, width, 3], into scaled patches [patches, padded] in a convolution's order."""
        count = (len(frame) // side) ** 2
        out = torch.empty(count, padded, device=frame.device, dtype=self.dtype)
        _patches_kernel[(count,)](
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
