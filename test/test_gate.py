"""CommandGate: no guess, no stale or broken input reaches a wheel; what passes is limited."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_vla_inference.control.action import STANDSTILL, ActionMapping, VelocityCommand
from mobile_vla_inference.control.gate import ADVICE, INSTRUCTION_SETTLE_S, CommandGate, GateLimits, Reason

FORWARD = VelocityCommand(0.4, 0.0, 0.2)
INSTANT = GateLimits(max_linear_acceleration_mps2=1e9, max_angular_acceleration_radps2=1e9)


def driving_gate(limits: GateLimits = INSTANT, now_s: float = 100.0) -> CommandGate:
    """Return a gate that moves: everything that it asks for is there."""
    gate = CommandGate(limits)
    gate.active = gate.settings_confirmed = gate.worker_ready = gate.has_instruction = True
    gate.decide(now_s - 1.0)
    gate.image_accepted(now_s)
    gate.action_ready(FORWARD, now_s)
    return gate


def test_it_moves_when_everything_is_there():
    decision = driving_gate().decide(100.0)
    assert decision.reason is Reason.MOVING
    assert decision.command == FORWARD


def test_a_new_gate_never_moves():
    gate = CommandGate(INSTANT)
    gate.image_accepted(0.0)
    gate.action_ready(FORWARD, 0.0)
    assert gate.decide(0.0).command == STANDSTILL


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda gate: setattr(gate, "active", False), Reason.INACTIVE),
        (lambda gate: gate.request_stop(True), Reason.STOP_REQUESTED),
        (lambda gate: gate.enable(False), Reason.DISABLED),
        (lambda gate: setattr(gate, "settings_confirmed", False), Reason.SETTINGS_ASSUMED),
        (lambda gate: gate.latch(Reason.WORKER_FAULT), Reason.WORKER_FAULT),
        (lambda gate: setattr(gate, "worker_ready", False), Reason.WORKER_NOT_READY),
        (lambda gate: setattr(gate, "has_instruction", False), Reason.NO_INSTRUCTION),
        (lambda gate: gate.image_refused(), Reason.IMAGE_REFUSED),
        (lambda gate: gate.forget_action(), Reason.NO_STEP),
        (lambda gate: gate.action_ready(VelocityCommand(math.nan, 0.0, 0.0), 100.0), Reason.ACTION_NOT_FINITE),
        (lambda gate: gate.action_ready(VelocityCommand(0.0, 0.0, math.inf), 100.0), Reason.ACTION_NOT_FINITE),
    ],
)
def test_each_refusal_is_standstill_at_once_with_its_reason(change, reason):
    gate = driving_gate()
    change(gate)
    decision = gate.decide(100.0)
    assert decision.reason is reason
    assert decision.command == STANDSTILL
    assert ADVICE[reason]


def test_images_and_steps_go_stale():
    limits = GateLimits(image_timeout_s=0.5, step_timeout_s=0.3)
    gate = driving_gate(limits)
    assert gate.decide(100.29).reason is Reason.MOVING
    assert gate.decide(100.31).reason is Reason.STEP_STALE
    gate.action_ready(FORWARD, 100.49)
    assert gate.decide(100.49).reason is Reason.MOVING
    assert gate.decide(100.51).reason is Reason.IMAGE_STALE
    gate.image_accepted(100.6)
    assert gate.decide(100.6).reason is Reason.MOVING, "a short gap heals by itself"


@pytest.mark.parametrize("cause", ["stop", "fault", "long_gap", "not_finite"])
def test_after_a_fault_a_stop_or_a_long_gap_it_stays_stopped_until_enabled(cause):
    gate = driving_gate()
    if cause == "stop":
        gate.request_stop(True)
        gate.request_stop(False)
    elif cause == "fault":
        gate.latch(Reason.WORKER_FAULT)
    elif cause == "not_finite":
        gate.action_ready(VelocityCommand(math.nan, 0.0, 0.0), 100.0)
    else:
        gate.decide(100.0 + INSTANT.resume_within_s + 0.01)
    now_s = 103.0
    gate.image_accepted(now_s)
    gate.action_ready(FORWARD, now_s)
    assert gate.decide(now_s).command in (STANDSTILL, None)
    assert gate.latched is not None
    gate.enable(True)
    assert gate.decide(now_s).command in (STANDSTILL, None), "nothing from before the release moves the robot"
    gate.image_accepted(now_s)
    gate.action_ready(FORWARD, now_s)
    assert gate.decide(now_s).reason is Reason.MOVING


def test_a_changed_instruction_is_followed_once_it_has_settled():
    gate = driving_gate()
    gate.instruction_changed(True, 100.0)
    assert gate.decide(100.0).reason is Reason.NO_STEP
    for now_s in (100.05, 100.1, 100.15):  # a flood: each one comes before the last has settled
        gate.action_ready(FORWARD, now_s)
        assert gate.decide(now_s).command in (STANDSTILL, None)
        gate.instruction_changed(True, now_s)
    gate.action_ready(FORWARD, 100.2)
    assert gate.decide(100.2 + INSTRUCTION_SETTLE_S).reason is Reason.MOVING
    gate.instruction_changed(False, 100.3)
    assert gate.decide(100.3).reason is Reason.NO_INSTRUCTION


def test_enabling_does_not_override_a_stop_that_is_still_asked_for():
    gate = driving_gate()
    gate.request_stop(True)
    gate.enable(True)
    gate.request_stop(False)
    gate.image_accepted(100.0)
    gate.action_ready(FORWARD, 100.0)
    assert gate.decide(100.0).reason is Reason.STOP_REQUESTED


def test_standstill_is_held_then_silence():
    gate = driving_gate(GateLimits(stop_hold_s=1.0))
    assert gate.decide(100.0).reason is Reason.MOVING
    gate.enable(False)
    assert gate.decide(200.0).command == STANDSTILL
    assert gate.decide(201.0).command == STANDSTILL
    assert gate.decide(201.01).command is None
    assert gate.decide(300.0).command is None


def test_acceleration_is_limited_along_a_straight_line():
    gate = driving_gate(GateLimits(max_linear_acceleration_mps2=1.0, max_angular_acceleration_radps2=10.0))
    gate._last_decision_s = 99.9
    command = gate.decide(100.0).command
    assert command.linear_x_mps == pytest.approx(0.1)
    assert command.angular_z_radps == pytest.approx(0.05), "both axes change by the same share"


numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(st.floats(0.0, 0.2), st.tuples(numbers, numbers, numbers)), max_size=30))
def test_whatever_the_policy_says_the_output_is_finite_and_within_the_limits(steps):
    limits = GateLimits()
    gate = driving_gate(limits, now_s=0.0)
    now_s, last = 0.0, STANDSTILL
    gate.decide(now_s)
    last = gate._last_command
    for elapsed_s, values in steps:
        now_s += elapsed_s
        gate.image_accepted(now_s)
        gate.action_ready(VelocityCommand(*values), now_s)
        command = gate.decide(now_s).command or STANDSTILL
        assert command.is_finite
        assert all(abs(value) <= limit for value, limit in zip(command.values, limits.max_velocity))
        if not command.is_zero:
            for value, before, rate in zip(command.values, last.values, limits.max_acceleration):
                assert abs(value - before) <= rate * elapsed_s + 1e-9
        last = command


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=2))
def test_the_mapping_puts_each_action_on_its_axis(values):
    mapping = ActionMapping(("linear.x", "angular.z"), (2.0, 0.5), (0.1, 0.0))
    command = mapping.velocity(values)
    assert command.values == (values[0] * 2.0 + 0.1, 0.0, values[1] * 0.5)


def test_the_mapping_refuses_another_number_of_values():
    with pytest.raises(ValueError, match="expected 2"):
        ActionMapping(("linear.x", "angular.z"), (1.0, 1.0), (0.0, 0.0)).velocity([1.0])
