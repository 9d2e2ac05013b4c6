"""LeaveRequest: an event that signal handlers may set.

threading.Event takes a lock, and a handler that interrupts the very thread that holds it waits for ever.
"""

from __future__ import annotations

import contextlib
import os
import select


class LeaveRequest:
    """Whether a process has been asked to leave; `set` takes no lock. Any thread or signal handler may call it."""

    def __init__(self) -> None:
        self._asked = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        """Ask to leave; safe to call more than once."""
        self._asked = True
        with contextlib.suppress(BlockingIOError):  # it is awake already
            os.eventfd_write(self._wake_fd, 1)

    def is_set(self) -> bool:
        """Whether somebody has asked."""
        return self._asked

    def wait(self, timeout_s: float) -> bool:
        """Wait until somebody asks, for so long at most; return whether somebody has."""
        if not self._asked:
            select.select([self._wake_fd], [], [], timeout_s)
        return self._asked
