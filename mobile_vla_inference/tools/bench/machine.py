"""What every report of `mobile_vla bench` needs: the machine, its load, and the memory of a process."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

GIB = 1 << 30


def describe_machine() -> dict[str, Any]:
    """Return cores, memory, architecture, versions and the load average of the last minute (before measuring)."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "load_average": round(os.getloadavg()[0], 2),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """Return the machine as one line of text."""
    return (
        f"{machine['cores']} cores, {machine['memory_gib']:.0f} GiB, {machine['architecture']}, "
        f"load average before: {machine['load_average']:.2f}"
    )


def read_memory_mib(pid: int | str = "self") -> dict[str, float]:
    """Return the resident memory of a process: `anonymous`, `file`, `shared`, and the `peak` of their sum so far.

    Empty if the process has ended. File-backed pages are those that the kernel can reclaim.
    """
    names = {"RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared", "VmHWM": "peak"}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.partition(":") for line in lines)
    return {names[name]: int(value.split()[0]) / 1024 for name, _, value in fields if name in names}
