"""The drill's policy worker: the real worker process round the real policy, which fails on demand.

`DrillPanel` is how `mobile_vla drill`, its node and its worker talk: a few numbers in a file that all map into memory.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mobile_vla_inference.action import Action
from mobile_vla_inference.policy import worker_process

#: Environment variable that names the panel's file.
PANEL_VARIABLE = "MOBILE_VLA_DRILL_PANEL"

#: Added to the first action value (normalised), so that a policy with random weights surely drives.
FORWARD_ACTION = 2.0

#: What the node can be told to do (drill_node.py); the number of a fault is its place here.
NODE_FAULTS = ("none", "pulse", "executor", "executor_deaf", "supervisor", "supervisor_error")

#: What an error that the drill brings about says of itself.
INJECTED = "injected by the drill"

_FIELDS = (
    "worker_pid",
    "loaded_s",
    "step_period_s",
    "step_s",
    "started_s",
    "finished_s",
    "fault",
    "fired_s",
    "node_fault",
    "node_fired_s",
)


class DrillPanel:
    """Numbers that the drill, its node and its worker share; times are on the steady clock, which all processes share.

    Attributes:
        worker_pid: process id of the worker that loaded last.
        loaded_s: when it had loaded.
        step_period_s: how often it steps, by its checkpoint's settings.
        step_s: how long each step takes at least; set by the drill.
        started_s: when the last step started.
        finished_s: when the last good step finished.
        fault: number of the fault that the next step shall have (an index into STEP_FAULTS), 0 for none.
        fired_s: when the last such fault happened.
        node_fault: number of the fault that the node itself shall have (an index into NODE_FAULTS), 0 for none.
        node_fired_s: when that happened.
    """

    worker_pid: float
    loaded_s: float
    step_period_s: float
    step_s: float
    started_s: float
    finished_s: float
    fault: float
    fired_s: float
    node_fault: float
    node_fired_s: float

    def __init__(self, path: Path | str) -> None:
        """Map the file; make it where it is missing."""
        mode = "r+" if Path(path).exists() else "w+"
        object.__setattr__(self, "_values", np.memmap(path, dtype=np.float64, mode=mode, shape=(len(_FIELDS),)))

    def __getattr__(self, name: str) -> float:
        if name not in _FIELDS:
            raise AttributeError(name)
        return float(self._values[_FIELDS.index(name)])

    def __setattr__(self, name: str, value: float) -> None:
        self._values[_FIELDS.index(name)] = value


def _raise_error(action: Action) -> Action:
    raise RuntimeError(INJECTED)


def _raise_memory_error(action: Action) -> Action:
    raise MemoryError(INJECTED)


def _raise_gpu_memory_error(action: Action) -> Action:
    import torch

    raise torch.OutOfMemoryError(INJECTED)


def _answer_nan(action: Action) -> Action:
    return Action((math.nan, *action.values[1:]), action.step_s)


def _answer_infinity(action: Action) -> Action:
    return Action((math.inf, *action.values[1:]), action.step_s)


#: What a step can be told to do, by name; the number of a fault is its place here.
STEP_FAULTS: dict[str, Callable[[Action], Action]] = {
    "none": lambda action: action,
    "exception": _raise_error,
    "memory_error": _raise_memory_error,
    "gpu_memory_error": _raise_gpu_memory_error,
    "nan": _answer_nan,
    "infinity": _answer_infinity,
}


class FaultyPolicy:
    """The policy that it wraps, driving ahead, until the panel asks for a fault."""

    def __init__(self, policy: Any, panel: DrillPanel) -> None:
        self._policy = policy
        self._panel = panel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def warm_up(self) -> None:
        """Warm the policy up, and tell that it is loaded."""
        self._policy.warm_up()
        self._panel.step_period_s = self._policy.describe().step_period_s
        self._panel.worker_pid, self._panel.loaded_s = os.getpid(), time.monotonic()

    def step(self, frame: np.ndarray) -> Action:
        """Step the policy, take as long as the panel says, and fail if it says so."""
        panel = self._panel
        panel.started_s = started_s = time.monotonic()
        action = self._policy.step(frame)
        time.sleep(max(0.0, started_s + panel.step_s - time.monotonic()))
        ahead, *others = action.values
        action = Action((ahead + FORWARD_ACTION, *others), time.monotonic() - started_s)
        fault, panel.fault = int(panel.fault), 0
        if fault:
            panel.fired_s = time.monotonic()
            return list(STEP_FAULTS.values())[fault](action)
        panel.finished_s = time.monotonic()
        return action


def _load(path: Path, **options: Any) -> FaultyPolicy:
    from mobile_vla_inference.policy.vla_policy import VlaPolicy  # torch: seconds

    return FaultyPolicy(VlaPolicy.load(path, **options), DrillPanel(os.environ[PANEL_VARIABLE]))


if __name__ == "__main__":
    raise SystemExit(worker_process.main(_load))
