"""Where a tiling is chosen: how Triton's matrix products are cut into blocks, by measurement or by a rule."""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple


class Operands(Enum):
    """The data types that a product reads: its rows and its weights."""

    SIXTEEN_BIT = "16-bit rows and weights"
    INT8_WEIGHTS = "16-bit rows, int8 weights"
    INT8 = "int8 rows and weights"


class Tiling(NamedTuple):
    """How one product is cut.

    Attributes:
        block_columns: columns of the result in a block.
        block_inner: elements of the inner axis that a block reads at a time.
        splits: parts of the inner axis, each summed by blocks of its own.
        warps: warps of a block.
        stages: stages of the software pipeline.
    """

    block_columns: int
    block_inner: int
    splits: int
    warps: int
    stages: int


#: (blocks of rows, columns, inner axis) -> the fastest tiling of the published sizes on an H100 (docs/benchmarks.md).
MEASURED: dict[Operands, dict[tuple[int, int, int], Tiling]] = {
    Operands.SIXTEEN_BIT: {
        (1, 6144, 2048): Tiling(64, 128, 1, 8, 4),
        (1, 2048, 2048): Tiling(64, 64, 4, 8, 5),
        (1, 8192, 2048): Tiling(64, 128, 1, 8, 4),
        (1, 2048, 8192): Tiling(64, 64, 8, 8, 4),
        (3, 3072, 1024): Tiling(128, 64, 1, 8, 4),
        (3, 1024, 1024): Tiling(64, 64, 2, 8, 4),
        (3, 4096, 1024): Tiling(128, 64, 1, 8, 4),
        (3, 1024, 4096): Tiling(128, 64, 4, 8, 4),
    },
    Operands.INT8_WEIGHTS: {
        (1, 6144, 2048): Tiling(64, 128, 1, 4, 3),
        (1, 2048, 2048): Tiling(64, 128, 8, 4, 3),
        (1, 8192, 2048): Tiling(64, 128, 1, 4, 3),
        (1, 2048, 8192): Tiling(64, 128, 8, 4, 3),
        (3, 3072, 1024): Tiling(64, 128, 1, 4, 3),
        (3, 1024, 1024): Tiling(64, 64, 8, 4, 3),
        (3, 4096, 1024): Tiling(128, 64, 1, 8, 3),
        (3, 1024, 4096): Tiling(64, 64, 8, 4, 3),
    },
    Operands.INT8: {
        (1, 6144, 2048): Tiling(64, 256, 1, 8, 4),
        (1, 2048, 2048): Tiling(64, 64, 4, 4, 6),
        (1, 8192, 2048): Tiling(64, 256, 1, 8, 4),
        (1, 2048, 8192): Tiling(64, 128, 4, 8, 6),
        (3, 3072, 1024): Tiling(64, 128, 1, 4, 3),
        (3, 4096, 1024): Tiling(64, 128, 1, 4, 3),
    },
}

#: The rule doubles the splits as long as there are at most so many blocks per multiprocessor.
_BLOCKS_PER_MULTIPROCESSOR = 1.3


def block_rows(rows: int) -> int:
    """Return the rows in a block of a product; a text of up to 128 tokens, image included, is one block."""
    return 128 if rows > 64 else 64


def choose_tiling(
    operands: Operands, rows: int, columns: int, inner: int, *, can_split: bool, multiprocessors: int
) -> Tiling:
    """Return the measured tiling of a product, else one by a rule that gives every multiprocessor work.

    Args:
        operands: data types of the rows and weights.
        rows: rows of the product.
        columns: columns of the result.
        inner: length of the inner axis.
        can_split: whether the rule can split the inner axis; a measured tiling stays as it was measured.
        multiprocessors: of the device.
    """
    row_blocks = math.ceil(rows / block_rows(rows))
    measured = MEASURED[operands].get((row_blocks, columns, inner))
    if measured is not None:
        return measured
    block_inner = 64 if inner % 64 == 0 else 32 if inner % 32 == 0 else 16
    block_columns = 64
    blocks = row_blocks * math.ceil(columns / block_columns)
    splits = 1
    while (
        can_split
        and blocks * splits * 2 <= _BLOCKS_PER_MULTIPROCESSOR * multiprocessors
        and inner % (splits * 2 * block_inner) == 0
    ):
        splits *= 2
    return Tiling(block_columns, block_inner, splits, warps=4, stages=4)
