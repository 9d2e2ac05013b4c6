"""The benchmark's node: vla_node as it is, with the stand-in for its policy and a record of its commands.

Each command is a JSON line in the file that `RECORD_VARIABLE` names: `published_s` and `linear_x_mps`, and for a
command that a step caused also the times of that step. All times are on the steady clock, which all processes share.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from mobile_vla_inference.action import VelocityCommand
from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.worker import StepResult, WorkerEvent
from mobile_vla_inference.ros import node
from mobile_vla_inference.tools.bench import node_worker

_STEP_TIMES = ("stamp_s", "received_s", "started_s", "loaded_s", "finished_s", "step_s")


class TimedNode(node.VlaNode):
    """The node, with a record of its commands."""

    def __init__(self, worker_module: str) -> None:
        super().__init__(worker_module)
        path = Path(os.environ[node_worker.RECORD_VARIABLE])
        self._record = path.open("w", buffering=1)
        self._step: StepResult | None = None

    def _take_event(self, event: WorkerEvent) -> None:
        super()._take_event(event)
        if isinstance(event, StepResult):
            self._step = event

    def _publish_command(self, command: VelocityCommand) -> None:
        entry = {"published_s": steady_s(), "linear_x_mps": command.linear_x_mps}
        super()._publish_command(command)
        step, self._step = self._step, None
        if step is not None:
            entry |= {name: getattr(step, name) for name in _STEP_TIMES}
        print(json.dumps(entry), file=self._record)


if __name__ == "__main__":
    raise SystemExit(node.main(worker_module=node_worker.__name__, node_type=TimedNode))
