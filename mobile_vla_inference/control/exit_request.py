"""ExitRequest: an event that a signal handler can set.

threading.Event takes a lock: a signal handler that interrupts the thread that holds it would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import weakref


class ExitRequest:
    """Whether this process was asked to exit. `set` takes no lock: any thread and any signal handler may call it."""

    def __init__(self) -> None:
        self._asked = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Not at the end of the process: its threads and signal handlers still run then.
        weakref.finalize(self, os.close, self._wake_fd).atexit = False

    def set(self) -> None:
        """Ask the process to exit; safe to call more than once."""
        self._asked = True
        with contextlib.suppress(BlockingIOError):  # it is awake already
            os.eventfd_write(self._wake_fd, 1)

    def is_set(self) -> bool:
        """Whether the process was asked to exit."""
        return self._asked

    def wait(self, timeout_s: float) -> bool:
        """Wait for a request, for `timeout_s` at most; return whether there was one."""
        if not self._asked:
            select.select([self._wake_fd], [], [], timeout_s)
        return self._asked
