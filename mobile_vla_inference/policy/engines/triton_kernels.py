"""Triton kernels for a step at batch 1, where a matrix product reads its weights once for 64 to 257 rows.

Libraries tile such products for throughput: where the result is narrow, too few blocks are at work. These kernels cut
such a product along its inner axis until every multiprocessor has a block. The next kernel (`add_norm_kernel`), which
adds bias and residual and normalises anyway, also adds the partial sums. Attention, the LayerNorms, an LSTM layer and
the patches of a frame are one kernel each. With DEPENDENT, a kernel is launched while the one before it ends
(programmatic dependent launch, Hopper and later); it waits before it reads what that one writes.

Triton is an optional dependency: only triton_operations.py imports this module, and choice.py decides whether to.
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    HAS_DEPENDENT_LAUNCH = True
except ImportError:
    HAS_DEPENDENT_LAUNCH = False

    @triton.jit
    def gdc_wait():
        """Stand-in for a Triton without dependent launch; never called."""

    @triton.jit
    def gdc_launch_dependents():
        """Stand-in for a Triton without dependent launch; never called."""


@triton.jit
def _activated(values, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    elif ACTIVATION == "quick_gelu":
        values = values * tl.sigmoid(1.702 * values)
    return values


@triton.jit
def linear_kernel(
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
def int8_linear_kernel(
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
    """As `linear_kernel`, with int8 weights; adds bias and activation unless PARTIAL.

    The weights are the left operand, because that one can come from registers, where they are widened.
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
def int8_rows_linear_kernel(
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
    """As `int8_linear_kernel`, with int8 rows that have a scale each: the sums are exact integers."""
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
    """Store a row, or (QUANTIZE) its int8 values and their scale."""
    if QUANTIZE:
        step = tl.maximum(tl.max(tl.abs(values), axis=0) / 127.0, 1e-12)
        tl.store(scale_ptr + row, step)
        values = tl.floor(values / step + 0.5)
    tl.store(out_ptr + row * WIDTH + columns, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activate_kernel(values_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Activate values in place."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    values = tl.load(values_ptr + offsets, mask=inside).to(tl.float32)
    tl.store(values_ptr + offsets, _activated(values, ACTIVATION).to(values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_kernel(
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
def norm_kernel(
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
def attention_kernel(
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
def _dot_rows(vector_ptr, weight_ptr, row_offsets, in_rows, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
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
def vector_kernel(
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
def lstm_kernel(
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
    """One step of UNITS units of an LSTM layer; gates in torch's order: input, forget, candidate, output."""
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
def patches_kernel(
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
