"""The drill's faults of the operator: stops, services, lifecycle and parameters, once and in quick succession."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

from mobile_vla_inference.control.gate import Reason
from mobile_vla_inference.tools.drill.judge import Onset
from mobile_vla_inference.tools.drill.rig import (
    EVENT_LIMIT_S,
    FULL_TURN_RADPS,
    INSTRUCTION,
    STOP_HOLD_S,
    DrillError,
    Fault,
    Recovery,
    Rig,
    nothing_to_lift,
)

_DEACTIVATE = 4  # lifecycle_msgs/msg/Transition
#: The deceleration of a soft stop that must still last when the fault is injected.
_SOFT_MPS2 = 0.05
_HARD_MPS2 = 1.0
_PUBLISH_RATE_HZ = 20.0
#: How long a condition lasts before the fault is injected.
_LEAD_S = 0.3
_SLIDER_RATE_HZ = 40.0


def _release_stop(rig: Rig) -> None:
    rig.graph.stop(False)


def _deactivate_in_step(rig: Rig) -> Onset:
    rig.await_step(max(time.monotonic(), rig.panel.finished_s))
    return Onset(rig.graph.change_state(_DEACTIVATE))


def _refuse_nan(rig: Rig) -> Onset:
    """Set parameters to NaN, which has to be refused; then stop the camera: the image timeout is still in force."""
    for name in ("image_timeout_s", "step_timeout_s", "max_linear_x_mps", "max_angular_z_radps", "publish_rate_hz"):
        answer = rig.graph.set_parameter(name, math.nan)
        if answer.successful or name not in answer.reason:
            raise DrillError(f"parameter {name} was set to NaN: {answer.reason or 'accepted'}, expected a refusal")
    return rig.stop_images()


# ---- in quick succession, or at a rate -------------------------------------------------------------------------------


def _pulse_stop(rig: Rig) -> Onset:
    sent_s = rig.graph.stop(True)
    rig.graph.stop(False)
    return Onset(sent_s)


def _pulse_enable(rig: Rig) -> Onset:
    called_s = rig.graph.enable(False)
    rig.graph.enable(True)
    return Onset(called_s)


def _pulse_instruction(rig: Rig) -> Onset:
    sent_s = rig.graph.instruct("")
    rig.graph.instruct(INSTRUCTION)
    return Onset(sent_s)


def _stop_camera_in_parameter_flood(rig: Rig) -> Onset:
    turns = (0.8 * FULL_TURN_RADPS, FULL_TURN_RADPS)
    rig.graph.flood(_SLIDER_RATE_HZ, lambda count: rig.graph.request_parameter("max_angular_z_radps", turns[count % 2]))
    time.sleep(_LEAD_S)
    return rig.stop_images()


def _end_parameter_flood(rig: Rig) -> None:
    rig.graph.end_flood()
    rig.set_parameters(max_angular_z_radps=FULL_TURN_RADPS)
    rig.good_images()


def _stop_camera_at_slow_rate(rig: Rig) -> Onset:
    rig.set_parameters(publish_rate_hz=1.0)
    time.sleep(_LEAD_S)
    return rig.stop_images()


def _end_slow_rate(rig: Rig) -> None:
    rig.set_parameters(publish_rate_hz=_PUBLISH_RATE_HZ)
    rig.good_images()


# ---- a fault within a soft stop --------------------------------------------------------------------------------------


def _in_soft_stop(inject: Callable[[Rig], Onset], rig: Rig) -> Onset:
    """Inject a fault while the robot slows down after an operator's stop."""
    rig.set_parameters(soft_stop=True, max_linear_acceleration_mps2=_SOFT_MPS2)
    since_s = rig.graph.enable(False)
    graph = rig.graph
    if not graph.wait_until(lambda: graph.first_refusal(since_s) == Reason.DISABLED.value, EVENT_LIMIT_S):
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
        f"soft_stop set, then ~/enable false; while the robot slows down, {injection}",
        partial(_in_soft_stop, inject),
        partial(_end_soft_stop, lift),
        (Reason.DISABLED, *reasons),
        Recovery.AFTER_ENABLE,
    )


FAULTS = (
    Fault(
        "disable",
        "~/enable false",
        lambda rig: Onset(rig.graph.enable(False)),
        nothing_to_lift,
        (Reason.DISABLED,),
        Recovery.AFTER_ENABLE,
    ),
    Fault(
        "stop_topic",
        "true on the stop topic",
        lambda rig: Onset(rig.graph.stop(True)),
        _release_stop,
        (Reason.STOP_REQUESTED,),
        Recovery.AFTER_ENABLE,
    ),
    Fault(
        "reset",
        "~/reset at full speed",
        lambda rig: Onset(rig.graph.reset()),
        nothing_to_lift,
        (Reason.NO_STEP,),
        momentary=True,
        step_s=0.0,
    ),
    Fault(
        "deactivate",
        "lifecycle deactivate during a step",
        _deactivate_in_step,
        nothing_to_lift,
        (Reason.INACTIVE,),
        Recovery.AFTER_ACTIVATE,
    ),
    Fault(
        "parameter_nan",
        "five parameters set to NaN, which the node refuses; then the camera stops",
        _refuse_nan,
        Rig.good_images,
        (Reason.IMAGE_STALE,),
    ),
)

RAPID_FAULTS = (
    Fault(
        "stop_pulse",
        "true on the stop topic, and immediately false",
        _pulse_stop,
        nothing_to_lift,
        (Reason.STOP_REQUESTED,),
        Recovery.AFTER_ENABLE,
        hold_s=0.1,
        latched_s=0.1,
        repeats=20,
    ),
    Fault(
        "enable_pulse",
        "~/enable false, and immediately true",
        _pulse_enable,
        nothing_to_lift,
        (Reason.DISABLED, Reason.NO_IMAGE, Reason.NO_STEP),
        momentary=True,
        step_s=0.0,
        repeats=5,
    ),
    Fault(
        "instruction_pulse",
        "an empty instruction, and immediately the previous one again",
        _pulse_instruction,
        nothing_to_lift,
        (Reason.NO_INSTRUCTION, Reason.NO_STEP),
        momentary=True,
        step_s=0.0,
        repeats=5,
    ),
    Fault(
        "parameter_flood",
        "a parameter set 40 times per second, as a slider in rqt does; then the camera stops",
        _stop_camera_in_parameter_flood,
        _end_parameter_flood,
        (Reason.IMAGE_STALE,),
    ),
    Fault(
        "slow_rate",
        "publish_rate_hz set to 1; then the camera stops",
        _stop_camera_at_slow_rate,
        _end_slow_rate,
        (Reason.IMAGE_STALE,),
        hold_s=STOP_HOLD_S,
    ),
    _soft_stop_fault("images", "the camera stops", Rig.stop_images, Rig.good_images, (Reason.IMAGE_STALE,)),
    _soft_stop_fault(
        "worker",
        "SIGKILL to the worker",
        Rig.kill_worker,
        Rig.await_another_worker,
        (Reason.WORKER_FAULT, Reason.WORKER_NOT_READY),
    ),
)
