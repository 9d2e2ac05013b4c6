"""How the worker process ended, as a sentence with what to do."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path


def count_oom_kills() -> int:
    """Return how many processes the kernel has killed since boot for lack of memory; -1 if it does not report that."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return -1


def describe_exit(status: int | None, oom_kills_before: int) -> str:
    """Return one sentence on how a process ended.

    Args:
        status: `Popen.returncode`; None: the process has not ended.
        oom_kills_before: `count_oom_kills` when the process was started.
    """
    if status is None:
        return "worker closed its connection but did not exit; it was killed"
    if status == -signal.SIGKILL:
        if count_oom_kills() > oom_kills_before:
            return (
                "worker was killed by the kernel (SIGKILL) because memory ran out, expected enough for the policy; "
                "`mobile_vla inspect` shows how much it needs"
            )
        return "worker was killed by SIGKILL, not by the kernel's out-of-memory killer; find out who sent it"
    if status == -signal.SIGBUS:
        return (
            "worker was killed by SIGBUS: the checkpoint was truncated or its disk failed while it was mapped, "
            "expected an unchanged file; copy it again"
        )
    if status < 0:
        return f"worker was killed by {signal.Signals(-status).name}; see its output above"
    return f"worker exited with status {status}; see its output above"
