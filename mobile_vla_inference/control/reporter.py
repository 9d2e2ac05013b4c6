"""Reporter: logs and reports in a separate thread, in order. They can block, and no safety function waits for them."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

#: At most so many reports wait; further ones are dropped and counted.
CAPACITY = 1000


class Reporter:
    """A bounded queue of functions and the thread that calls them. `post` never blocks. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], object]] = deque()
        self._closed = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def post(self, report: Callable[[], object]) -> None:
        """Queue a function; it is called after all that were posted before. Dropped if too many wait."""
        with self._changed:
            if self._closed or len(self._waiting) >= CAPACITY:
                self.dropped += 1
                return
            self._waiting.append(report)
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Process what waits for `timeout_s` at most, then end; safe to call more than once."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(max(0.0, deadline_s - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                report = self._waiting.popleft()
            try:
                report()
            except Exception:  # a report that fails must not end the next ones
                traceback.print_exc()
