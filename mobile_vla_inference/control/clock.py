"""The clock of all time limits that keep the robot safe: steady, and it also counts the time of a suspend."""

from __future__ import annotations

import time

#: CLOCK_MONOTONIC stops during a suspend to RAM: an image from before would still count as fresh afterwards.
_CLOCK_ID = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def steady_s() -> float:
    """Return seconds on a clock that never jumps, is the same in every process, and includes suspended time."""
    return time.clock_gettime(_CLOCK_ID)
