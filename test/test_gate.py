"""CommandGate: no assumed setting, no stale or broken input moves the robot; every velocity is limited."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from mobile_vla_inference.action import STANDSTILL, ActionMapping, VelocityCommand
from mobile_vla_inference.control.gate import (
    ADVICE,
    INSTRUCTION_SETTLE_S,
    ROLL_OUT_LIMIT_S,
    STALL_S,
    CommandGate,
    Decision,
    GateLimits,
    Reason,
)

FORWARD = VelocityCommand(0.4, 0.0, 0.2)
INSTANT = GateLimits(max_linear_acceleration_mps2=1e9, max_angular_acceleration_radps2=1e9)


def driving_gate(limits: GateLimits = INSTANT, now_s: float = 100.0) -> CommandGate:
    """Return a gate that lets the robot move."""
    gate = CommandGate(limits)
    gate.active = gate.settings_confirmed = gate.worker_ready = gate.has_instruction = True
    gate.decide(now_s - 0.1)
    gate.image_accepted(now_s)
    gate.action_ready(FORWARD, now_s)
    return gate


def decide_until(gate: CommandGate, from_s: float, to_s: float) -> Decision:
    """Ask 20 times a second, as the node does, and return the last decision."""
    count = math.ceil((to_s - from_s) / 0.05)
    for index in range(1, count):
        gate.decide(from_s + index * 0.05)
    return gate.decide(to_s)


def test_it_moves_when_nothing_is_missing():
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
        (lambda gate: setattr(gate, "worker_changed", True), Reason.WORKER_CHANGED),
        (lambda gate: setattr(gate, "cmd_vel_shared", True), Reason.CMD_VEL_SHARED),
        (lambda gate: setattr(gate, "stop_unheard", True), Reason.STOP_UNHEARD),
        (lambda gate: setattr(gate, "executor_stalled", True), Reason.NODE_STALLED),
        (lambda gate: setattr(gate, "clock_missing", True), Reason.NO_CLOCK),
        (lambda gate: gate.image_sources(2), Reason.IMAGE_AMBIGUOUS),
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


def test_the_reasons_are_listed_in_the_order_in_which_they_are_checked():
    """With all faults at once, corrected one by one, the reasons come in the order of Reason and of ADVICE."""
    gate = CommandGate(INSTANT)
    gate.stop_unheard = gate.executor_stalled = gate.cmd_vel_shared = gate.clock_missing = gate.worker_changed = True
    gate.request_stop(True)
    gate.enable(False)
    gate.image_sources(2)
    gate.image_refused()
    mends = (
        lambda: setattr(gate, "active", True),
        lambda: gate.request_stop(False),
        lambda: setattr(gate, "stop_unheard", False),
        lambda: setattr(gate, "executor_stalled", False),
        lambda: gate.enable(True),
        lambda: (setattr(gate, "worker_changed", False), gate.latch(Reason.WORKER_FAULT)),
        lambda: gate.enable(True),
        lambda: setattr(gate, "worker_ready", True),
        lambda: setattr(gate, "settings_confirmed", True),
        lambda: setattr(gate, "cmd_vel_shared", False),
        lambda: setattr(gate, "has_instruction", True),
        lambda: setattr(gate, "clock_missing", False),
        lambda: gate.image_sources(1),
        lambda: gate.action_ready(FORWARD, 0.0),
        lambda: gate.image_accepted(0.0),
    )
    reported = []
    for mend in (lambda: None, *mends):
        mend()
        reported.append(gate.decide(0.0).reason)
    expected = [reason for reason in Reason if reason in reported and reason is not Reason.MOVING]
    assert reported == [*expected, Reason.MOVING]
    assert len(expected) == len(mends)
    assert list(ADVICE) == list(Reason)


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
        decide_until(gate, 100.0, 100.0 + INSTANT.resume_within_s + 0.01)
        assert gate.latched is Reason.IMAGE_STALE
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


def test_an_action_is_as_old_as_its_frame():
    gate = driving_gate(GateLimits(step_timeout_s=1.0, image_timeout_s=10.0))
    gate.action_ready(FORWARD, captured_s=99.2)  # its step took 0.8 s
    assert decide_until(gate, 100.0, 100.19).reason is Reason.MOVING
    assert gate.decide(100.21).reason is Reason.STEP_STALE
    gate.action_ready(FORWARD, captured_s=99.0)  # late by a worker that was stopped meanwhile
    assert gate.decide(100.22).command == STANDSTILL


@pytest.mark.parametrize("stalled_s", [STALL_S + 0.1, INSTANT.resume_within_s + 0.1])
def test_after_a_stall_of_its_own_it_stands_and_blames_nobody_else(stalled_s):
    gate = driving_gate()
    assert gate.decide(100.0).reason is Reason.MOVING
    now_s = 100.0 + stalled_s
    decision = gate.decide(now_s)
    assert decision.command == STANDSTILL
    assert decision.reason in (Reason.NO_IMAGE, Reason.NODE_STALLED), "neither the camera nor the worker was at fault"
    gate.image_accepted(now_s)
    gate.action_ready(FORWARD, now_s)
    long = stalled_s > INSTANT.resume_within_s
    assert gate.decide(now_s + 0.05).reason is (Reason.NODE_STALLED if long else Reason.MOVING)
    gate.enable(True)
    gate.image_accepted(now_s)
    gate.action_ready(FORWARD, now_s)
    assert gate.decide(now_s + 0.1).reason is Reason.MOVING


def test_a_camera_that_was_lost_before_a_stall_of_the_node_is_still_lost_after_it():
    gate = driving_gate()
    gate.decide(100.0)
    gate.decide(100.0 + STALL_S + 0.1)
    decide_until(gate, 100.6, 100.7 + INSTANT.resume_within_s)
    assert gate.latched is Reason.IMAGE_STALE
    gate.image_accepted(103.0)
    gate.action_ready(FORWARD, 103.0)
    assert gate.decide(103.0).command in (STANDSTILL, None), "it does not drive off by itself"


def test_when_a_second_camera_leaves_what_was_made_of_its_images_counts_no_more():
    gate = driving_gate()
    assert not gate.image_sources(1)
    assert gate.image_sources(2)
    gate.image_accepted(100.0)
    gate.action_ready(FORWARD, 100.0)
    assert gate.image_sources(1)
    assert gate.decide(100.0).reason is Reason.NO_STEP


def test_a_lowered_speed_limit_holds_at_once():
    gate = driving_gate(GateLimits(max_linear_acceleration_mps2=50.0))
    assert gate.decide(100.0).command.linear_x_mps == 0.4
    gate.limits = GateLimits(max_linear_acceleration_mps2=0.01, max_linear_x_mps=0.05)
    assert gate.decide(100.05).command.linear_x_mps == 0.05


def test_a_robot_that_slows_down_stops_in_the_end():
    gate = driving_gate(GateLimits(max_linear_acceleration_mps2=50.0, image_timeout_s=10.0))
    assert not gate.decide(100.0).command.is_zero
    gate.limits = GateLimits(soft_stop=True, max_linear_acceleration_mps2=0.01, image_timeout_s=10.0)
    gate.enable(False)
    assert not decide_until(gate, 100.0, 100.0 + ROLL_OUT_LIMIT_S).command.is_zero
    assert gate.decide(100.1 + ROLL_OUT_LIMIT_S).command == STANDSTILL


def test_after_a_halt_nothing_slows_down_softly():
    gate = driving_gate(GateLimits(soft_stop=True, max_linear_acceleration_mps2=10.0))
    assert not gate.decide(100.0).command.is_zero
    gate.halt()
    gate.active = True
    gate.enable(False)
    assert gate.decide(100.01).command == STANDSTILL


@pytest.mark.parametrize(
    "fault",
    [
        lambda gate: gate.latch(Reason.WORKER_FAULT),
        lambda gate: gate.request_stop(True),
        lambda gate: gate.image_refused(),
        lambda gate: gate.image_sources(2),
        lambda gate: setattr(gate, "worker_ready", False),
        lambda gate: setattr(gate, "active", False),
        lambda gate: gate.action_ready(VelocityCommand(math.nan, 0.0, 0.0), 100.1),
        lambda gate: decide_until(gate, 100.1, 100.0 + INSTANT.image_timeout_s),
    ],
)
def test_a_fault_halts_at_once_in_the_middle_of_a_gentle_stop(fault):
    gate = driving_gate(GateLimits(soft_stop=True, max_linear_acceleration_mps2=0.1))
    gate.limits = GateLimits(soft_stop=True, max_linear_acceleration_mps2=10.0)
    assert not gate.decide(100.0).command.is_zero
    gate.limits = GateLimits(soft_stop=True, max_linear_acceleration_mps2=0.1)
    gate.enable(False)
    assert not gate.decide(100.1).command.is_zero, "it rolls out"
    fault(gate)
    assert decide_until(gate, 100.1, 100.52 if gate.latched is None else 100.15).command in (STANDSTILL, None)


def test_acceleration_is_limited_along_a_straight_line():
    gate = driving_gate(GateLimits(max_linear_acceleration_mps2=1.0, max_angular_acceleration_radps2=10.0))
    gate.decide(99.9)
    command = gate.decide(100.0).command
    assert command.linear_x_mps == pytest.approx(0.1)
    assert command.angular_z_radps == pytest.approx(0.05), "both axes change by the same share"


numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(st.floats(0.0, 0.2), st.tuples(numbers, numbers, numbers)), max_size=30))
def test_whatever_the_policy_says_the_output_is_finite_and_within_the_limits(steps):
    limits = GateLimits()
    gate = driving_gate(limits, now_s=0.0)
    now_s = 0.0
    last = gate.decide(now_s).command
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


class GateModel:
    """What must not happen, stated without the gate: which facts forbid motion, and how old they are."""

    def __init__(self) -> None:
        self.flags = dict.fromkeys(("active", "settings_confirmed", "worker_ready", "has_instruction"), True)
        self.flags |= dict.fromkeys(
            ("worker_changed", "cmd_vel_shared", "stop_unheard", "executor_stalled", "clock_missing"), False
        )
        self.enabled = True
        self.stop = self.latched = self.refused = False
        self.sources = 1
        self.image_s = self.action_s = -math.inf
        self.lost_s = math.inf

    def is_at_fault(self, now_s: float, limits: GateLimits) -> bool:
        wanted = {"active": True, "settings_confirmed": True, "worker_ready": True}
        wanted |= dict.fromkeys(("worker_changed", "cmd_vel_shared", "stop_unheard", "executor_stalled"), False)
        wanted["clock_missing"] = False
        return (
            any(self.flags[name] != value for name, value in wanted.items())
            or self.stop
            or self.latched
            or self.refused
            or self.sources > 1
            or now_s - self.image_s > limits.image_timeout_s
        )


class AnySequence(RuleBasedStateMachine):
    """No sequence of events and times lets a command through during a fault, or for an image that is too old."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.limits = GateLimits(soft_stop=True, image_timeout_s=0.5, step_timeout_s=0.8, resume_within_s=1.0)
        self.gate = CommandGate(self.limits)
        self.model = GateModel()
        for name, value in self.model.flags.items():
            setattr(self.gate, name, value)
        self.gate.decide(self.now_s)
        self.last = STANDSTILL

    @rule(elapsed_s=st.sampled_from((0.0, 0.01, 0.05, 0.05, 0.05, 0.2, 0.45, 0.6, 1.5)))
    def ask(self, elapsed_s: float) -> None:
        self.now_s += elapsed_s
        decision = self.gate.decide(self.now_s)
        command = decision.command or STANDSTILL
        model, limits = self.model, self.limits
        if elapsed_s > STALL_S:
            if model.image_s > -math.inf:
                model.lost_s = self.now_s
            model.image_s = model.action_s = -math.inf
            model.latched |= model.flags["active"] and elapsed_s > limits.resume_within_s
        elif self.now_s - model.image_s > limits.resume_within_s and model.image_s > -math.inf:
            model.latched = True
        if self.now_s - model.lost_s > limits.resume_within_s:
            model.latched, model.lost_s = True, math.inf
        if not command.is_zero:
            assert not model.is_at_fault(self.now_s, limits), decision
            if model.enabled and model.flags["has_instruction"]:
                assert self.now_s - model.action_s <= limits.step_timeout_s, decision
            else:  # a soft stop by a person: the robot only gets slower
                assert all(abs(now) <= abs(was) + 1e-12 for now, was in zip(command.values, self.last.values))
        assert all(abs(value) <= limit for value, limit in zip(command.values, limits.max_velocity))
        assert (decision.reason is Reason.MOVING) <= (not model.is_at_fault(self.now_s, limits))
        self.last = command

    @rule(age_s=st.floats(0.0, 0.6))
    def image(self, age_s: float) -> None:
        captured_s = self.now_s - age_s
        self.gate.image_accepted(captured_s)
        self.model.image_s, self.model.lost_s = max(self.model.image_s, captured_s), math.inf

    @rule(age_s=st.floats(0.0, 1.0), forward=st.sampled_from((0.5, -0.5, 9.0)))
    def action(self, age_s: float, forward: float) -> None:
        self.gate.action_ready(VelocityCommand(forward, 0.1, 0.5), self.now_s - age_s)
        self.model.action_s, self.model.refused = self.now_s - age_s, False

    @rule()
    def everything_is_good(self) -> None:
        self.image(0.0)
        self.action(0.0, 0.5)

    @rule()
    def broken_action(self) -> None:
        self.gate.action_ready(VelocityCommand(math.nan, 0.0, 0.0), self.now_s)
        self.forget()
        self.model.latched = True

    @rule()
    def refused_image(self) -> None:
        self.gate.image_refused()
        self.model.refused = True
        self.model.action_s = -math.inf

    @rule(count=st.integers(0, 2))
    def sources(self, count: int) -> None:
        self.gate.image_sources(count)
        if (count > 1) != (self.model.sources > 1):
            self.model.action_s = -math.inf
        self.model.sources = count

    @rule(stop=st.booleans())
    def stop(self, stop: bool) -> None:
        self.gate.request_stop(stop)
        self.model.stop = stop
        self.model.latched |= stop

    @rule(reason=st.sampled_from((Reason.WORKER_FAULT, Reason.ACTION_NOT_FINITE)))
    def fault(self, reason: Reason) -> None:
        self.gate.latch(reason)
        self.forget()
        self.model.latched = True

    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        self.gate.enable(enabled)
        self.model.enabled = enabled
        self.model.action_s = -math.inf
        if enabled:
            self.model.latched = self.model.stop
            self.model.image_s, self.model.lost_s = -math.inf, math.inf

    @rule(present=st.booleans())
    def instruction(self, present: bool) -> None:
        self.gate.instruction_changed(present, self.now_s)
        self.model.flags["has_instruction"] = present
        self.model.action_s = -math.inf

    @rule()
    def forget(self) -> None:
        self.gate.forget_action()
        self.model.action_s = -math.inf

    @rule(name=st.sampled_from(sorted(GateModel().flags)), value=st.booleans())
    def flag(self, name: str, value: bool) -> None:
        if name != "has_instruction":
            setattr(self.gate, name, value)
            self.model.flags[name] = value

    @precondition(lambda self: self.model.is_at_fault(self.now_s, self.limits))
    @rule()
    def all_is_well_again(self) -> None:
        for name in self.model.flags:
            self.flag(name, GateModel().flags[name])
        self.instruction(True)
        self.sources(1)
        self.stop(False)
        self.enable(True)
        self.everything_is_good()


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
