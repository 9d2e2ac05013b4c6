"""The benchmark's policy worker: the real worker process with a stand-in for the policy, whose step takes a given time.

Its actions drive ahead slowly. Each differs a little from the one before, so that its command can be recognised.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mobile_vla_inference.action import Action
from mobile_vla_inference.policy import worker_process
from mobile_vla_inference.policy_facts import PolicyFacts

#: Environment variables: how long a step takes, and whether it computes (`1`) or waits, as for a GPU.
STEP_VARIABLE = "MOBILE_VLA_BENCH_STEP_S"
BUSY_VARIABLE = "MOBILE_VLA_BENCH_BUSY"
#: The variable that names the file in which the node records its commands (node_process.py).
RECORD_VARIABLE = "MOBILE_VLA_BENCH_RECORD"

_IMAGE_SIZE_PX = 224
_ACTIONS = 0.1 + 0.0001 * np.arange(3000)


class StandIn:
    """A policy whose step takes a given time."""

    config = SimpleNamespace(image_size=_IMAGE_SIZE_PX)

    def __init__(self) -> None:
        self._step_s = float(os.environ[STEP_VARIABLE])
        self._busy = os.environ.get(BUSY_VARIABLE) == "1"
        self._steps = 0

    def warm_up(self) -> None:
        """Do nothing."""

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def set_instruction(self, text: str) -> None:
        """Do nothing: the actions do not depend on it."""

    def describe(self) -> PolicyFacts:
        """Return the facts that the node needs."""
        return PolicyFacts(
            checkpoint="stand-in",
            checkpoint_id="stand-in",
            variant="stand-in",
            parameters=0,
            dtype="none",
            quantization=None,
            device="cpu",
            image_size=_IMAGE_SIZE_PX,
            engine="stand-in",
            engine_fallback="",
            fusion_features=(),
            cell="none",
            image_keep_aspect=False,
            step_period_s=self._step_s,
            action_axes=("linear.x", "angular.z"),
            action_scale=(1.0, 1.0),
            action_offset=(0.0, 0.0),
            assumed_settings=(),
            settings={},
            warnings=(),
        )

    def step(self, frame: np.ndarray) -> Action:
        """Take the time of a step; return an action that drives ahead."""
        started_s = time.monotonic()
        if self._busy:
            while time.monotonic() - started_s < self._step_s:
                frame.sum()
        else:
            time.sleep(self._step_s)
        self._steps += 1
        return Action((float(_ACTIONS[self._steps % len(_ACTIONS)]), 0.0), time.monotonic() - started_s)


def _load(path: Path, **options: Any) -> StandIn:
    return StandIn()


if __name__ == "__main__":
    raise SystemExit(worker_process.main(_load))
