"""The benchmark's node: vla_node as it is, with the stand-in for its policy and a record of its commands.

Each command is a JSON line in the file that `RECORD_VARIABLE` names: `published_s` and `linear_x_mps`, and for a
command that a step caused also the times of that step. All times are on the steady clock, which all processes share.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mobile_vla_inference.action import VelocityCommand
from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.worker_events import StepResult
from mobile_vla_inference.ros import node
from mobile_vla_inference.ros.motion import MotionControl
from mobile_vla_inference.tools.bench import node_worker

_STEP_TIMES = ("stamp_s", "received_s", "started_s", "loaded_s", "finished_s", "step_s")


class TimedMotion(MotionControl):
    """The path to the base, with a record of its commands."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        path = Path(os.environ[node_worker.RECORD_VARIABLE])
        self._record = path.open("w", buffering=1)
        self._step: StepResult | None = None

    def take_step(self, step: StepResult) -> bool:
        """Take the action of a step; the next command is the one that it caused."""
        counts = super().take_step(step)
        self._step = step
        return counts

    def send(self, command: VelocityCommand) -> None:
        """Publish one velocity and write down when."""
        entry = {"published_s": steady_s(), "linear_x_mps": command.linear_x_mps}
        super().send(command)
        step, self._step = self._step, None
        if step is not None:
            entry |= {name: getattr(step, name) for name in _STEP_TIMES}
        print(json.dumps(entry), file=self._record)


if __name__ == "__main__":
    raise SystemExit(node.main(worker_module=node_worker.__name__, motion_type=TimedMotion))
