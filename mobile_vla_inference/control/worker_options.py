"""WorkerOptions: how the policy worker is started and watched, with the defaults that the node's parameters share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mobile_vla_inference.control.gate import GateLimits

#: The entry point that imports torch. A module name, because the node's process must not import it.
WORKER_MODULE = "mobile_vla_inference.policy.worker_process"


@dataclass(frozen=True)
class WorkerOptions:
    """How to start and to watch the worker.

    Attributes:
        policy: keyword arguments of VlaPolicy.load (JSON-ready).
        load_timeout_s: a load that takes longer counts as a hang.
        step_timeout_s: a step that takes longer counts as a hang; the gate stops the robot after the same time.
        state_gap_s: a longer gap between the stamps of two stepped frames resets the hidden state.
        max_restarts: restarts after consecutive faults before the worker is given up.
        healthy_after_s: faults stop being consecutive once a worker was ready for so long.
        module: the module that runs as the worker process.
    """

    policy: dict[str, Any] = field(default_factory=dict)
    load_timeout_s: float = 600.0
    step_timeout_s: float = GateLimits.step_timeout_s
    state_gap_s: float = 2.0
    max_restarts: int = 5
    healthy_after_s: float = 60.0
    module: str = WORKER_MODULE
