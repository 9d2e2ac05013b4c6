"""Units and figures that many reports share: mebibytes, milliseconds, percentiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Bytes of a mebibyte.
MIB = 1 << 20


def percentiles(values: Sequence[float] | np.ndarray, ranks: Sequence[int] = (50, 95, 99)) -> dict[str, float]:
    """Return `p<rank>` -> percentile, in the unit of `values`, of which there must be at least one."""
    return {f"p{rank}": float(value) for rank, value in zip(ranks, np.percentile(values, ranks))}


def shown(value: float | None, spec: str, unknown: str = "-") -> str:
    """Return a number as text in a format such as `.3f`, or `unknown` for None."""
    return unknown if value is None else format(value, spec)
