"""The drill's faults of the policy worker: its process, its steps, its actions and its checkpoint's settings."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mobile_vla_inference.control.gate import Reason
from mobile_vla_inference.policy.storage.checkpoint_files import settings_path
from mobile_vla_inference.tools.drill.judge import REACTION_LIMIT_S, Onset
from mobile_vla_inference.tools.drill.panel import STEP_FAULTS
from mobile_vla_inference.tools.drill.rig import (
    EVENT_LIMIT_S,
    STEP_TIMEOUT_S,
    DrillError,
    Fault,
    Recovery,
    Rig,
    nothing_to_lift,
)

#: How long after its start an interrupted step goes on: late, but not late enough to count as a hang.
_LATE_STEP_S = 0.85 * STEP_TIMEOUT_S


def _hang_worker(rig: Rig) -> Onset:
    sent_s = rig.signal_worker(signal.SIGSTOP)
    return Onset(rig.panel.finished_s, STEP_TIMEOUT_S, sent_s)


def _fail_step(kind: str, rig: Rig) -> Onset:
    set_s = time.monotonic()
    rig.panel.fault = STEP_FAULTS.index(kind)
    if not rig.graph.wait_until(lambda: rig.panel.fired_s >= set_s, EVENT_LIMIT_S):
        raise DrillError(f"no step failed with {kind} within {EVENT_LIMIT_S:g} s, expected the next step to")
    return Onset(rig.panel.fired_s)


def _worker_fault(name: str, injection: str, inject: Callable[[Rig], Onset], **others: Any) -> Fault:
    reasons = others.pop("reasons", (Reason.WORKER_FAULT, Reason.WORKER_NOT_READY))
    return Fault(name, injection, inject, Rig.await_another_worker, reasons, Recovery.AFTER_ENABLE, **others)


def _step_fault(kind: str, injection: str, **others: Any) -> Fault:
    return _worker_fault(f"step_{kind}", injection, partial(_fail_step, kind), **others)


def _bad_action(kind: str, injection: str) -> Fault:
    return Fault(
        f"action_{kind}",
        injection,
        partial(_fail_step, kind),
        nothing_to_lift,
        (Reason.ACTION_NOT_FINITE,),
        Recovery.AFTER_ENABLE,
    )


def _age_action(rig: Rig) -> Onset:
    """Let one step end late, and no further step: its action is as old as its image."""
    rig.await_step(max(time.monotonic(), rig.panel.finished_s))
    started_s = rig.panel.started_s  # its image arrived earlier
    rig.signal_worker(signal.SIGSTOP)
    time.sleep(max(0.0, started_s + _LATE_STEP_S - time.monotonic()))
    rig.signal_worker(signal.SIGCONT)
    rig.await_step(started_s)  # by then the late action was sent
    stopped_s = rig.signal_worker(signal.SIGSTOP)
    # An earlier zero is caused by the former action, which is older still.
    return Onset(started_s, STEP_TIMEOUT_S, stopped_s + REACTION_LIMIT_S)


def _continue_worker(rig: Rig) -> None:
    rig.signal_worker(signal.SIGCONT)


# ---- its settings ----------------------------------------------------------------------------------------------------


def _change_settings(change: Callable[[Path], None], rig: Rig) -> Onset:
    """Change the settings of the checkpoint, then have the worker started again."""
    change(settings_path(rig.checkpoint))
    return rig.kill_worker()


def _flip_scale(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    scale = content["settings"]["action_scale"]
    scale["value"] = [-number for number in scale["value"]]
    file.write_text(json.dumps(content), encoding="utf-8")


def _settings_fault(kind: str, injection: str, change: Callable[[Path], None], **others: Any) -> Fault:
    return Fault(
        f"settings_{kind}",
        f"{injection}; SIGKILL to the worker, then ~/enable",
        partial(_change_settings, change),
        Rig.await_another_worker,
        (Reason.WORKER_FAULT, Reason.WORKER_NOT_READY),
        Recovery.AFTER_RESTART,
        **others,
    )


FAULTS = (
    _bad_action("nan", "the policy's action is NaN"),
    _bad_action("infinity", "the policy's action is infinite"),
    _worker_fault("worker_killed", "SIGKILL to the worker", Rig.kill_worker),
    _step_fault("exception", "RuntimeError in a policy step"),
    Fault(
        "action_age",
        "SIGSTOP to the worker during a step, so that the action of an old image arrives late; then no further step",
        _age_action,
        _continue_worker,
        (Reason.STEP_STALE,),
        hold_s=0.3,
    ),
)

#: Each needs a fresh node afterwards.
SETTINGS_FAULTS = (
    _settings_fault(
        "changed",
        "the sign of action_scale changed in policy.json",
        _flip_scale,
        last_reasons=(Reason.WORKER_CHANGED,),
        expected_text="action_scale",
    ),
    _settings_fault(
        "removed",
        "policy.json removed",
        Path.unlink,
        last_reasons=(Reason.WORKER_CHANGED, Reason.WORKER_FAULT, Reason.SETTINGS_ASSUMED),
    ),
)

COMPRESSED_FAULTS = (
    _worker_fault(
        "worker_hung",
        "SIGSTOP to the worker",
        _hang_worker,
        reasons=(Reason.STEP_STALE, Reason.WORKER_FAULT),
        transport="compressed",
    ),
    _step_fault("gpu_memory_error", "torch.OutOfMemoryError in a policy step", transport="compressed"),
    _step_fault("memory_error", "MemoryError in a policy step", transport="compressed"),
)
