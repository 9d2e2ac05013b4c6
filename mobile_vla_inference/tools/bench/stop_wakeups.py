"""The stop benchmark's clock: a process that only sleeps, and records how late it woke.

This is the delay that the machine causes in any process. Started as
`python -m mobile_vla_inference.tools.bench.stop_wakeups FILE`; at SIGTERM it writes seconds as 32-bit numbers.
"""

from __future__ import annotations

import array
import gc
import signal
import sys
import time
from pathlib import Path

PERIOD_S = 0.001


def main() -> int:
    """Sleep period by period until SIGINT or SIGTERM."""
    caught: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda each, _: caught.append(each))
    late_s = array.array("f")
    gc.disable()
    due_s = time.monotonic()
    while not caught:
        due_s += PERIOD_S
        time.sleep(max(0.0, due_s - time.monotonic()))
        woken_s = time.monotonic()
        late_s.append(woken_s - due_s)
        due_s = max(due_s, woken_s - PERIOD_S)  # a long sleep is one late wake-up, not many
    Path(sys.argv[1]).write_bytes(late_s.tobytes())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
