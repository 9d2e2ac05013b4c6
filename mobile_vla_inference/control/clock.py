"""The clock of everything that keeps the robot safe: steady, and it goes on while the machine sleeps."""

from __future__ import annotations

import time

#: CLOCK_MONOTONIC stands still during suspend to RAM: an image from before would still be fresh afterwards.
_CLOCK_ID = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def steady_s() -> float:
    """Return seconds on a clock that never jumps, is the same in every process, and counts suspended time, too."""
    return time.clock_gettime(_CLOCK_ID)
