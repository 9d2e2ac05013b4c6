"""The drill's faults of the node itself: its output, its threads, its process, its timing, and who else drives.

`ON_A_RUNNING_NODE` leave the node as it was; each of `THAT_END_IT` needs a fresh one afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from mobile_vla_inference.control.gate import Reason
from mobile_vla_inference.tools.drill.judge import REACTION_LIMIT_S, Onset
from mobile_vla_inference.tools.drill.rig import (
    EVENT_LIMIT_S,
    FULL_SPEED_MPS,
    FULL_TURN_RADPS,
    IMAGE_TIMEOUT_S,
    INSTRUCTION,
    RESUME_WITHIN_S,
    STEP_TIMEOUT_S,
    STOP_HOLD_S,
    DrillError,
    Fault,
    Recovery,
    Rig,
    leave,
)
from mobile_vla_inference.tools.drill.worker import INJECTED, NODE_FAULTS

#: How slowly the robot slows down where a soft stop is not to be over before the fault.
_SOFT_MPS2 = 0.05
_HARD_MPS2 = 1.0
_PUBLISH_RATE_HZ = 20.0
#: How long something goes on before the fault comes into it.
_LEAD_S = 0.3
#: The middleware may take so long to tell the node of another participant: it announces one every 3 s, and some of that
#: is lost. What is judged is that the robot stops then, and keeps still.
_DISCOVERY_S = 12.0
_SLIDER_RATE_HZ = 40.0
#: Longer than every timeout of the node.
_STALL_S = RESUME_WITHIN_S + 0.5
#: How long after its start an interrupted step goes on: late, but not yet so late that it counts as a hang.
_LATE_STEP_S = 0.85 * STEP_TIMEOUT_S
_OTHER_COMMANDER = "joystick"


# ---- its output ------------------------------------------------------------------------------------------------------


def _drive_unread(rig: Rig) -> None:
    """Let nobody read the node's output, and have it say so: it stands for a moment and moves again."""
    rig.stop_images()
    if not rig.graph.wait_for(lambda: rig.graph.reason == Reason.IMAGE_STALE.value, EVENT_LIMIT_S):
        raise DrillError(f"the robot did not stop before its output was blocked: {rig.graph.reason}")
    rig.node.pipe.block()
    since_s = time.monotonic()
    rig.good_images()
    commands = rig.graph.commands
    if not rig.graph.wait_for(
        lambda: commands[-1].time_s > since_s and not commands[-1].is_zero, IMAGE_TIMEOUT_S + EVENT_LIMIT_S
    ):
        raise DrillError(f"the robot did not move again once its output was blocked: {rig.graph.reason}")
    rig.graph.wait_for(lambda: commands[-1].values[0] >= FULL_SPEED_MPS, _LEAD_S)


def _stop_unread(rig: Rig) -> Onset:
    _drive_unread(rig)
    return Onset(rig.graph.stop(True))


def _read_and_release(rig: Rig) -> None:
    rig.node.pipe.read()
    rig.graph.stop(False)


def _terminate_unread(rig: Rig) -> Onset:
    _drive_unread(rig)
    return terminate(rig)


# ---- its threads -----------------------------------------------------------------------------------------------------


def _fail_node(kind: str, rig: Rig) -> Onset:
    panel = rig.panel
    panel.node_fired_s = 0.0
    panel.node_fault = NODE_FAULTS.index(kind)
    if not rig.graph.wait_for(lambda: panel.node_fired_s > 0.0, EVENT_LIMIT_S):
        raise DrillError(f"the fault of the {kind} did not happen within {EVENT_LIMIT_S:g} s")
    return Onset(panel.node_fired_s)


def _thread_fault(kind: str, injection: str) -> Fault:
    name = kind if "_" in kind else f"{kind}_dies"
    return Fault(
        name,
        injection,
        partial(_fail_node, kind),
        leave,
        (),
        Recovery.NEVER,
        hold_s=0.0,
        tells=INJECTED,
        leaves_with_error=True,
    )


# ---- its process -----------------------------------------------------------------------------------------------------


def terminate(rig: Rig) -> Onset:
    """Ask the node to leave."""
    sent_s = time.monotonic()
    os.kill(rig.node.pid, signal.SIGTERM)
    return Onset(sent_s)


def _stall_node(rig: Rig) -> Onset:
    """Stop the node's process for a while, not its worker; return until a step on a later image is done."""
    os.kill(rig.node.pid, signal.SIGSTOP)
    try:
        time.sleep(_STALL_S)
    finally:
        continued_s = time.monotonic()
        os.kill(rig.node.pid, signal.SIGCONT)
    panel = rig.panel
    fresh = rig.graph.wait_for(lambda: panel.finished_s > panel.started_s > continued_s, EVENT_LIMIT_S, poll_s=0.002)
    return Onset(continued_s, at_once=True, until_s=panel.finished_s if fresh else time.monotonic())


def _require_same_worker(rig: Rig) -> None:
    try:
        alive = psutil.Process(rig.worker_pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        alive = False
    if not alive or int(rig.panel.worker_pid) != rig.worker_pid:
        raise DrillError(f"the healthy worker {rig.worker_pid} was ended, expected it to go on")


# ---- what is asked of it twice, or at a rate -------------------------------------------------------------------------


def _pulse_stop(rig: Rig) -> Onset:
    sent_s = rig.graph.stop(True)
    rig.graph.stop(False)
    return Onset(sent_s)


def _pulse_enable(rig: Rig) -> Onset:
    asked_s = rig.graph.enable(False)
    rig.graph.enable(True)
    return Onset(asked_s)


def _pulse_instruction(rig: Rig) -> Onset:
    sent_s = rig.graph.instruct("")
    rig.graph.instruct(INSTRUCTION)
    return Onset(sent_s)


def _silence_in_parameter_flood(rig: Rig) -> Onset:
    turns = (0.8 * FULL_TURN_RADPS, FULL_TURN_RADPS)
    rig.graph.flood(_SLIDER_RATE_HZ, lambda count: rig.graph.ask_parameter("max_angular_z_radps", turns[count % 2]))
    time.sleep(_LEAD_S)
    return rig.stop_images()


def _end_parameter_flood(rig: Rig) -> None:
    rig.graph.end_flood()
    rig.set_parameters(max_angular_z_radps=FULL_TURN_RADPS)
    rig.good_images()


def _silence_at_slow_rate(rig: Rig) -> Onset:
    rig.set_parameters(publish_rate_hz=1.0)
    time.sleep(_LEAD_S)
    return rig.stop_images()


def _end_slow_rate(rig: Rig) -> None:
    rig.set_parameters(publish_rate_hz=_PUBLISH_RATE_HZ)
    rig.good_images()


# ---- a fault within a soft stop --------------------------------------------------------------------------------------


def _in_soft_stop(inject: Callable[[Rig], Onset], rig: Rig) -> Onset:
    """Inject a fault while a person's stop lets the robot slow down."""
    rig.set_parameters(soft_stop=True, max_linear_acceleration_mps2=_SOFT_MPS2)
    since_s = rig.graph.enable(False)
    graph = rig.graph
    if not graph.wait_for(lambda: graph.first_refusal(since_s) == Reason.DISABLED.value, EVENT_LIMIT_S):
        raise DrillError(f"~/enable false did not stop the robot: {graph.reason}")
    time.sleep(_LEAD_S)
    if graph.commands[-1].is_zero:
        raise DrillError("the robot stood at once, expected it to slow down with soft_stop")
    return inject(rig)


def _end_soft_stop(lift: Callable[[Rig], None], rig: Rig) -> None:
    rig.set_parameters(soft_stop=False, max_linear_acceleration_mps2=_HARD_MPS2)
    lift(rig)


def _soft_stop_fault(
    name: str,
    injection: str,
    inject: Callable[[Rig], Onset],
    lift: Callable[[Rig], None],
    reasons: tuple[Reason, ...],
) -> Fault:
    return Fault(
        f"soft_stop_{name}",
        f"soft_stop and ~/enable false; while the robot slows down, {injection}",
        partial(_in_soft_stop, inject),
        partial(_end_soft_stop, lift),
        (Reason.DISABLED, *reasons),
        Recovery.AFTER_ENABLE,
    )


# ---- its worker ------------------------------------------------------------------------------------------------------


def _age_action(rig: Rig) -> Onset:
    """Let a step come back late, then no other: its action is as old as its image."""
    rig.await_step(max(time.monotonic(), rig.panel.finished_s))
    started_s = rig.panel.started_s  # its image was there before
    rig.signal_worker(signal.SIGSTOP)
    time.sleep(max(0.0, started_s + _LATE_STEP_S - time.monotonic()))
    rig.signal_worker(signal.SIGCONT)
    rig.await_step(started_s)  # so the late action is on its way
    stopped_s = rig.signal_worker(signal.SIGSTOP)
    # A zero from before it has arrived is one for the action before, which is older still.
    return Onset(started_s, STEP_TIMEOUT_S, stopped_s + REACTION_LIMIT_S)


def _continue_worker(rig: Rig) -> None:
    rig.signal_worker(signal.SIGCONT)


def _change_settings(change: Callable[[Path], None], rig: Rig) -> Onset:
    """Change the settings beside the checkpoint, then have the worker started again."""
    files = sorted(rig.checkpoint.parent.glob("*policy.json"))
    if not files:
        raise DrillError(f"{rig.checkpoint.parent} holds no policy.json, expected the checkpoint's settings")
    for file in files:
        change(file)
    return rig.kill_worker()


def _flip_scale(file: Path) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    _negate(data, "action_scale")
    file.write_text(json.dumps(data), encoding="utf-8")


def _negate(data: Any, key: str) -> None:
    """Change the sign of the numbers of a setting, wherever it stands in a settings file."""
    for name, value in data.items() if isinstance(data, dict) else ():
        if name != key:
            _negate(value, key)
        elif isinstance(value, dict):
            value["value"] = [-number for number in value["value"]]
        else:
            data[name] = [-number for number in value]


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


# ---- who else drives -------------------------------------------------------------------------------------------------


def _share_cmd_vel(rig: Rig) -> Onset:
    """Let somebody else publish there, which has to be told; then ask the node to be the only one."""
    rig.graph.add_other_node(_OTHER_COMMANDER)
    if not rig.graph.wait_for(lambda: rig.graph.warns_of(_OTHER_COMMANDER), EVENT_LIMIT_S):
        raise DrillError(
            f"{_OTHER_COMMANDER} publishes on the velocity topic, expected a warning in the diagnostics that names it"
        )
    asked_s = time.monotonic()
    rig.set_parameters(exclusive_cmd_vel=True)
    return Onset(asked_s)


def _start_second_node(rig: Rig) -> Onset:
    rig.set_parameters(exclusive_cmd_vel=True)
    began_s = time.monotonic()
    rig.graph.add_other_node("vla_node")
    return Onset(began_s, _DISCOVERY_S)


def _end_sharing(rig: Rig) -> None:
    rig.graph.remove_other_node()
    rig.set_parameters(exclusive_cmd_vel=False)


# ---- who says stop, and how ------------------------------------------------------------------------------------------


def _stop_by_best_effort(rig: Rig) -> Onset:
    return Onset(rig.graph.add_stop_button()(True))


def _release_by_others(rig: Rig) -> None:
    rig.graph.remove_other_node()
    rig.graph.stop(False)


def _stop_unheard(rig: Rig) -> Onset:
    began_s = time.monotonic()
    rig.graph.add_deaf_stop()
    return Onset(began_s, _DISCOVERY_S)


def _sharing_fault(name: str, injection: str, inject: Callable[[Rig], Onset]) -> Fault:
    return Fault(name, injection, inject, _end_sharing, (Reason.CMD_VEL_SHARED,), Recovery.AS_TOLD)


ON_A_RUNNING_NODE = (
    Fault(
        "stop_pulse",
        "true on the stop topic, and false at once",
        _pulse_stop,
        leave,
        (Reason.STOP_REQUESTED,),
        Recovery.AFTER_ENABLE,
        hold_s=0.1,
        latched_s=0.1,
        repeats=20,
    ),
    Fault(
        "enable_pulse",
        "~/enable false, and true at once",
        _pulse_enable,
        leave,
        (Reason.DISABLED, Reason.NO_IMAGE, Reason.NO_STEP),
        momentary=True,
        step_s=0.0,
        repeats=5,
    ),
    Fault(
        "instruction_pulse",
        "an empty instruction, and the one before at once",
        _pulse_instruction,
        leave,
        (Reason.NO_INSTRUCTION, Reason.NO_STEP),
        momentary=True,
        step_s=0.0,
        repeats=5,
    ),
    Fault(
        "parameter_flood",
        "a parameter set 40 times a second, as by a slider; then the camera falls silent",
        _silence_in_parameter_flood,
        _end_parameter_flood,
        (Reason.IMAGE_STALE,),
    ),
    Fault(
        "slow_rate",
        "publish_rate_hz 1; then the camera falls silent",
        _silence_at_slow_rate,
        _end_slow_rate,
        (Reason.IMAGE_STALE,),
        hold_s=STOP_HOLD_S,
    ),
    _soft_stop_fault("images", "the camera falls silent", Rig.stop_images, Rig.good_images, (Reason.IMAGE_STALE,)),
    _soft_stop_fault(
        "worker",
        "SIGKILL to the worker",
        Rig.kill_worker,
        Rig.await_another_worker,
        (Reason.WORKER_FAULT, Reason.WORKER_NOT_READY),
    ),
    Fault(
        "action_age",
        "the worker stopped until its step is nearly late, then again: the action is as old as its image",
        _age_action,
        _continue_worker,
        (Reason.STEP_STALE,),
        hold_s=0.3,
    ),
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
        Recovery.AS_TOLD,
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
    _sharing_fault(
        "second_commander", "another publisher on the velocity topic; then exclusive_cmd_vel", _share_cmd_vel
    ),
    _sharing_fault("second_node", "exclusive_cmd_vel; then a second node of the same name", _start_second_node),
    Fault(
        "stop_best_effort",
        "true from a publisher that offers best effort",
        _stop_by_best_effort,
        _release_by_others,
        (Reason.STOP_REQUESTED,),
        Recovery.AFTER_ENABLE,
    ),
    Fault(
        "stop_unheard",
        "a publisher of texts on the stop topic",
        _stop_unheard,
        lambda rig: rig.graph.remove_other_node(),
        (Reason.STOP_UNHEARD,),
        Recovery.AS_TOLD,
    ),
    Fault(
        "log_unread",
        "nobody reads the node's output and its pipe is full; then true on the stop topic",
        _stop_unread,
        _read_and_release,
        (Reason.STOP_REQUESTED,),
        Recovery.AFTER_ENABLE,
    ),
)

THAT_END_IT = (
    Fault(
        "log_unread_sigterm",
        "nobody reads the node's output and its pipe is full; then SIGTERM to the node",
        _terminate_unread,
        leave,
        (Reason.INACTIVE,),
        Recovery.NEVER,
        hold_s=0.0,
    ),
    _thread_fault("pulse", "RuntimeError, as of rclpy, in the thread that repeats the commands"),
    _thread_fault("executor", "ValueError where the executor waits for work"),
    _thread_fault("executor_deaf", "RuntimeError, as of rclpy, each time the executor waits for work"),
    _thread_fault("supervisor", "what no handler of errors catches, in the thread that supervises the worker"),
    _settings_fault(
        "changed",
        "the sign of action_scale changed in policy.json",
        _flip_scale,
        last_reasons=(Reason.WORKER_CHANGED,),
        tells="action_scale",
    ),
    _settings_fault(
        "removed",
        "policy.json removed",
        Path.unlink,
        last_reasons=(Reason.WORKER_CHANGED, Reason.WORKER_FAULT, Reason.SETTINGS_ASSUMED),
    ),
)
