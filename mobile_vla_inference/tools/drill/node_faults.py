"""The drill's faults of the node's own process: its output, its threads and its signals."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import psutil

from mobile_vla_inference.control.gate import Reason
from mobile_vla_inference.tools.drill.judge import Onset
from mobile_vla_inference.tools.drill.panel import INJECTED, NODE_FAULTS
from mobile_vla_inference.tools.drill.rig import (
    EVENT_LIMIT_S,
    FULL_SPEED_MPS,
    IMAGE_TIMEOUT_S,
    RESUME_WITHIN_S,
    DrillError,
    Fault,
    Recovery,
    Rig,
    nothing_to_lift,
)

#: The longest wait for full speed after the output was blocked.
_LEAD_S = 0.3
#: Longer than every timeout of the node.
_STALL_S = RESUME_WITHIN_S + 0.5


# ---- its output ------------------------------------------------------------------------------------------------------


def _drive_unread(rig: Rig) -> None:
    """Block the node's output, and let it write: the robot stands for a moment and moves again."""
    rig.stop_images()
    if not rig.graph.wait_until(lambda: rig.graph.reason == Reason.IMAGE_STALE.value, EVENT_LIMIT_S):
        raise DrillError(f"the robot did not stop without images, expected it to: {rig.graph.reason}")
    rig.node.pipe.block()
    since_s = time.monotonic()
    rig.good_images()
    commands = rig.graph.commands
    if not rig.graph.wait_until(
        lambda: commands[-1].time_s > since_s and not commands[-1].is_zero, IMAGE_TIMEOUT_S + EVENT_LIMIT_S
    ):
        raise DrillError(
            f"the robot did not move again after the node's output was blocked, expected it to: {rig.graph.reason}"
        )
    rig.graph.wait_until(lambda: commands[-1].values[0] >= FULL_SPEED_MPS, _LEAD_S)


def _stop_unread(rig: Rig) -> Onset:
    _drive_unread(rig)
    return Onset(rig.graph.stop(True))


def _read_and_release(rig: Rig) -> None:
    rig.node.pipe.read()
    rig.graph.stop(False)


def _terminate_unread(rig: Rig) -> Onset:
    _drive_unread(rig)
    return _terminate(rig)


# ---- its threads -----------------------------------------------------------------------------------------------------


def _fail_node(kind: str, rig: Rig) -> Onset:
    panel = rig.panel
    panel.node_fired_s = 0.0
    panel.node_fault = NODE_FAULTS.index(kind)
    if not rig.graph.wait_until(lambda: panel.node_fired_s > 0.0, EVENT_LIMIT_S):
        raise DrillError(f"the fault {kind} did not happen within {EVENT_LIMIT_S:g} s, expected it to")
    return Onset(panel.node_fired_s)


def _thread_fault(kind: str, injection: str) -> Fault:
    name = kind if "_" in kind else f"{kind}_dies"
    return Fault(
        name,
        injection,
        partial(_fail_node, kind),
        nothing_to_lift,
        (),
        Recovery.NEVER,
        hold_s=0.0,
        expected_text=INJECTED,
        exits_with_error=True,
    )


# ---- its process -----------------------------------------------------------------------------------------------------


def _terminate(rig: Rig) -> Onset:
    """Ask the node to exit."""
    sent_s = time.monotonic()
    os.kill(rig.node.pid, signal.SIGTERM)
    return Onset(sent_s)


def _stall_node(rig: Rig) -> Onset:
    """Stop the node's process, not its worker, for a while; motion is right after a step on a later image."""
    os.kill(rig.node.pid, signal.SIGSTOP)
    try:
        time.sleep(_STALL_S)
    finally:
        continued_s = time.monotonic()
        os.kill(rig.node.pid, signal.SIGCONT)
    panel = rig.panel
    fresh = rig.graph.wait_until(lambda: panel.finished_s > panel.started_s > continued_s, EVENT_LIMIT_S, poll_s=0.002)
    return Onset(continued_s, at_once=True, until_s=panel.finished_s if fresh else time.monotonic())


def _require_same_worker(rig: Rig) -> None:
    try:
        alive = psutil.Process(rig.worker_pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        alive = False
    if not alive or rig.panel.worker_pid != rig.worker_pid:
        raise DrillError(f"the healthy worker {rig.worker_pid} exited, expected it to keep running")


FAULTS = (
    Fault(
        "node_stalled",
        "SIGSTOP to the node for longer than its timeouts, then SIGCONT",
        _stall_node,
        _require_same_worker,
        (
            Reason.NODE_STALLED,
            Reason.IMAGE_STALE,
            Reason.IMAGE_REFUSED,
            Reason.NO_IMAGE,
            Reason.NO_STEP,
            Reason.STEP_STALE,
        ),
        Recovery.AS_REPORTED,
        hold_s=0.0,
        latched_s=0.1,
        repeats=4,
    ),
    Fault(
        "supervisor_error",
        "an error in the thread that supervises the worker",
        partial(_fail_node, "supervisor_error"),
        Rig.await_another_worker,
        (Reason.WORKER_FAULT, Reason.WORKER_NOT_READY),
        Recovery.AFTER_ENABLE,
    ),
    Fault(
        "log_unread",
        "the node's output is not read and its pipe is full; then true on the stop topic",
        _stop_unread,
        _read_and_release,
        (Reason.STOP_REQUESTED,),
        Recovery.AFTER_ENABLE,
    ),
)

#: Each ends the node.
ENDING_FAULTS = (
    Fault(
        "node_sigterm",
        "SIGTERM to the node",
        _terminate,
        nothing_to_lift,
        (Reason.INACTIVE,),
        Recovery.NEVER,
        hold_s=0.0,
    ),
    Fault(
        "log_unread_sigterm",
        "the node's output is not read and its pipe is full; then SIGTERM to the node",
        _terminate_unread,
        nothing_to_lift,
        (Reason.INACTIVE,),
        Recovery.NEVER,
        hold_s=0.0,
    ),
    _thread_fault("pulse", "RuntimeError, like an error of rclpy, in the thread that repeats the commands"),
    _thread_fault("executor", "ValueError where the executor waits for work"),
    _thread_fault("executor_deaf", "RuntimeError, like an error of rclpy, each time the executor waits for work"),
    _thread_fault(
        "supervisor", "an exception that `except Exception` does not catch, in the thread that supervises the worker"
    ),
)
