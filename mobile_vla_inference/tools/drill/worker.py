"""The drill's policy worker: the real worker process with the real policy, whose steps fail on demand."""

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
from mobile_vla_inference.tools.drill.panel import INJECTED, PANEL_VARIABLE, STEP_FAULTS, DrillPanel

#: Added to the first action value (normalised), so that the robot drives ahead whatever the policy answers.
FORWARD_ACTION = 2.0


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


#: Name of a fault (one of STEP_FAULTS) -> what it makes of an action.
_FAULTS: dict[str, Callable[[Action], Action]] = {
    "exception": _raise_error,
    "memory_error": _raise_memory_error,
    "gpu_memory_error": _raise_gpu_memory_error,
    "nan": _answer_nan,
    "infinity": _answer_infinity,
}


class FaultyPolicy:
    """A policy that drives ahead, and fails when the panel asks for a fault."""

    def __init__(self, policy: Any, panel: DrillPanel) -> None:
        self._policy = policy
        self._panel = panel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def warm_up(self) -> None:
        """Warm the policy up, and report that it is loaded."""
        self._policy.warm_up()
        self._panel.step_period_s = self._policy.describe().step_period_s
        self._panel.worker_pid, self._panel.loaded_s = os.getpid(), time.monotonic()

    def step(self, frame: np.ndarray) -> Action:
        """Step the policy, take at least the panel's time, and fail if the panel asks for it."""
        panel = self._panel
        panel.started_s = started_s = time.monotonic()
        action = self._policy.step(frame)
        time.sleep(max(0.0, started_s + panel.step_s - time.monotonic()))
        ahead, *others = action.values
        action = Action((ahead + FORWARD_ACTION, *others), time.monotonic() - started_s)
        fault, panel.fault = panel.fault, 0
        if fault:
            panel.fired_s = time.monotonic()
            return _FAULTS[STEP_FAULTS[fault]](action)
        panel.finished_s = time.monotonic()
        return action


def _load(path: Path, **options: Any) -> FaultyPolicy:
    from mobile_vla_inference.policy.vla_policy import VlaPolicy  # torch: seconds

    return FaultyPolicy(VlaPolicy.load(path, **options), DrillPanel.open(os.environ[PANEL_VARIABLE]))


if __name__ == "__main__":
    raise SystemExit(worker_process.main(_load))
