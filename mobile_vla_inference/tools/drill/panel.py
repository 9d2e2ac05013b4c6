"""What the drill, its node and its worker share: a few numbers in a file that each of them maps into memory."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

#: Environment variable that names the file.
PANEL_VARIABLE = "MOBILE_VLA_DRILL_PANEL"

#: Faults of the node's own threads (node.py); the number of a fault is its place here.
NODE_FAULTS = ("none", "pulse", "executor", "executor_deaf", "supervisor", "supervisor_error")
#: Faults of a policy step (worker.py); the number of a fault is its place here.
STEP_FAULTS = ("none", "exception", "memory_error", "gpu_memory_error", "nan", "infinity")

#: The text of every error that the drill injects.
INJECTED = "injected by the drill"


class DrillPanel(ctypes.Structure):
    """Numbers in shared memory; times are on the steady clock, which all processes share.

    Attributes:
        worker_pid: process id of the worker that loaded last.
        loaded_s: when it had loaded.
        step_period_s: how often it steps, by its checkpoint's settings.
        step_s: how long each step takes at least; set by the drill.
        started_s: when the last step started.
        finished_s: when the last good step finished.
        fault: number of the fault of the next step, 0 for none.
        fired_s: when the last such fault happened.
        node_fault: number of the fault of the node itself, 0 for none.
        node_fired_s: when that happened; 0 before.
    """

    _fields_ = (
        ("worker_pid", ctypes.c_int64),
        ("loaded_s", ctypes.c_double),
        ("step_period_s", ctypes.c_double),
        ("step_s", ctypes.c_double),
        ("started_s", ctypes.c_double),
        ("finished_s", ctypes.c_double),
        ("fault", ctypes.c_int64),
        ("fired_s", ctypes.c_double),
        ("node_fault", ctypes.c_int64),
        ("node_fired_s", ctypes.c_double),
    )

    @classmethod
    def open(cls, path: Path | str) -> DrillPanel:
        """Map the file; create it, with zeros, if it is missing."""
        path = Path(path)
        path.touch()
        with path.open("r+b") as file:
            file.truncate(ctypes.sizeof(cls))
            return cls.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(cls)))
