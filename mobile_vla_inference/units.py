"""Units and figures that many reports share: mebibytes, milliseconds, percentiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Bytes of a mebibyte.
MIB = 1 << 20


def percentiles(values: Sequence[float] | np.ndarray, ranks: Sequence[int] = (50, 95, 99)) -> dict[str, float]:
    """Return `p<rank>` -> percentile, in the unit of `values`, of which there must be at least one."""
    return {f"p{rank}": float(value) for rank, value in zip(ranks, np.percentile(values, ranks))}
