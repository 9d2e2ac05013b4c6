"""Let the kernel end this process together with its parent, whatever ends the parent (Linux, prctl(2))."""

from __future__ import annotations

import ctypes
import os
import signal

# Loaded with the module: `kill_on_parent_exit` also runs between fork and exec, where nothing may be imported.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def signal_on_parent_exit(number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it exits."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def kill_on_parent_exit(parent_pid: int) -> bool:
    """Have the kernel kill this process when its parent exits; return False if the parent has exited already."""
    signal_on_parent_exit(signal.SIGKILL)
    return os.getppid() == parent_pid
