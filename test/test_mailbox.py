"""Mailbox: generations, pacing, order and accounting of frames, without a process or a thread."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mobile_vla_inference.control.mailbox import ContextOrder, Frame, Mailbox, StepOrder
from mobile_vla_inference.control.worker_events import StepFailed, StepResult, WorkerFault

PERIOD_S = 0.3


def frame(stamp_s: float) -> Frame:
    return Frame(stamp_s, stamp_s, stamp_s, lambda size_px, keep_aspect: np.zeros((size_px, size_px, 3), np.uint8))


def result(order: StepOrder) -> StepResult:
    stamp_s = order.frame.stamp_s
    return StepResult((0.0, 0.0), stamp_s, stamp_s, stamp_s, 0.0, 0.0, 0.0, 0.01, False)


@pytest.fixture
def mailbox() -> Mailbox:
    """Return the mailbox of a worker that knows the instruction and waits for frames."""
    mailbox = Mailbox(state_gap_s=2.0)
    mailbox.set_worker_ready(True)
    mailbox.allow_steps(True)
    mailbox.set_instruction("go")
    mailbox.begin_session()
    assert mailbox.next_order(0.0) == ContextOrder(2, "go")
    return mailbox


def step(mailbox: Mailbox, stamp_s: float, now_s: float) -> StepOrder:
    """Submit a frame and start its step."""
    mailbox.submit(frame(stamp_s))
    order = mailbox.next_order(now_s)
    assert isinstance(order, StepOrder)
    mailbox.step_started(order, now_s, PERIOD_S)
    return order


def test_a_step_is_due_a_period_after_the_last_one_was(mailbox):
    assert mailbox.next_order_s() == math.inf, "nothing waits"
    step(mailbox, 1.0, now_s=10.0)
    mailbox.submit(frame(1.1))
    assert mailbox.next_order_s() == 10.0 + PERIOD_S
    assert mailbox.next_order(10.29) is None
    assert isinstance(mailbox.next_order(10.31), StepOrder)


def test_a_frame_that_could_not_be_converted_does_not_use_up_the_period(mailbox):
    mailbox.submit(frame(1.0))
    assert isinstance(mailbox.next_order(10.0), StepOrder)
    mailbox.step_lost("unreadable")
    mailbox.submit(frame(1.1))
    assert isinstance(mailbox.next_order(10.01), StepOrder)


def test_contexts_are_sent_at_most_ten_times_a_second_and_the_last_one_counts(mailbox):
    for count in range(5):
        mailbox.set_instruction(f"go {count}")
    assert mailbox.next_order_s() == pytest.approx(0.1)
    assert mailbox.next_order(0.09) is None
    assert mailbox.next_order(0.11) == ContextOrder(7, "go 4")
    assert mailbox.next_order(1.0) is None


def test_a_context_goes_before_a_frame(mailbox):
    mailbox.reset("request")
    mailbox.submit(frame(1.0))
    assert isinstance(mailbox.next_order(1.0), ContextOrder)
    assert isinstance(mailbox.next_order(1.0), StepOrder)


def test_the_next_worker_process_gets_the_context_again(mailbox):
    assert mailbox.next_order(5.0) is None
    mailbox.begin_session()
    assert mailbox.next_order(5.0) == ContextOrder(2, "go")


@pytest.mark.parametrize(("stamp_s", "cause"), [(0.5, "time_backwards"), (3.5, "image_gap")])
def test_a_broken_sequence_resets_the_state_and_keeps_the_frame(mailbox, stamp_s, cause):
    step(mailbox, 1.0, now_s=1.0)
    mailbox.submit(frame(stamp_s))
    assert mailbox.next_order(2.0) == ContextOrder(3, "go")
    assert mailbox.next_order(2.0).frame.stamp_s == stamp_s
    assert mailbox.counters().state_resets[cause] == 1


def test_a_failed_step_starts_the_sequence_afresh(mailbox):
    step(mailbox, 1.0, now_s=1.0)
    mailbox.step_failed("not finite")
    assert mailbox.take_events() == [StepFailed("not finite")]
    mailbox.submit(frame(0.5))
    assert isinstance(mailbox.next_order(2.0), StepOrder), "the worker has reset its state itself"


def test_no_result_outlives_a_reset(mailbox):
    order = step(mailbox, 1.0, now_s=1.0)
    assert mailbox.step_finished(order, result(order))
    mailbox.post(WorkerFault("scripted", False))
    mailbox.reset("request")
    assert mailbox.take_events() == [WorkerFault("scripted", False)], "results are discarded, faults are not"
    assert isinstance(mailbox.next_order(2.0), ContextOrder)
    late = step(mailbox, 2.0, now_s=2.0)
    mailbox.reset("request")
    assert not mailbox.step_finished(late, result(late))
    assert mailbox.take_events() == []
    assert mailbox.counters().discarded_results == 2


def test_frames_are_refused_by_the_first_cause():
    mailbox = Mailbox(state_gap_s=2.0)
    mailbox.submit(frame(1.0))
    mailbox.set_worker_ready(True)
    mailbox.submit(frame(1.0))
    mailbox.allow_steps(True)
    mailbox.submit(frame(1.0))
    mailbox.set_instruction("go")
    mailbox.submit(frame(1.0))
    mailbox.set_worker_ready(False)
    assert dict(mailbox.counters().dropped) == {"worker_not_ready": 2, "inactive": 1, "no_instruction": 1}


class Accounting(RuleBasedStateMachine):
    """Whatever happens in whatever order, every frame is accounted for."""

    def __init__(self) -> None:
        super().__init__()
        self.mailbox = Mailbox(state_gap_s=2.0)
        self.now_s = self.stamp_s = 0.0
        self.order: StepOrder | None = None

    @rule(gap_s=st.sampled_from((-1.0, 0.1, 3.0)))
    def submit(self, gap_s):
        self.stamp_s += gap_s
        self.mailbox.submit(frame(self.stamp_s))

    @rule(seconds=st.sampled_from((0.01, 0.5)))
    def wait(self, seconds):
        self.now_s += seconds

    @rule(allowed=st.booleans())
    def allow(self, allowed):
        self.mailbox.allow_steps(allowed)

    @rule(text=st.sampled_from(("", "go", "stay")))
    def instruct(self, text):
        self.mailbox.set_instruction(text)

    @rule()
    def reset(self):
        self.mailbox.reset("request")

    @rule()
    def count_refused(self):
        self.mailbox.count_refused("no_stamp")

    @rule(ready=st.booleans())
    def become_ready(self, ready):
        self.mailbox.set_worker_ready(ready)

    @precondition(lambda self: self.order is None)
    @rule()
    def order_next(self):
        order = self.mailbox.next_order(self.now_s)
        if isinstance(order, StepOrder):
            self.order = order
            self.mailbox.step_started(order, self.now_s, PERIOD_S)

    @precondition(lambda self: self.order is not None)
    @rule(outcome=st.sampled_from(("finished", "failed", "lost")))
    def end_step(self, outcome):
        if outcome == "finished":
            self.mailbox.step_finished(self.order, result(self.order))
        elif outcome == "failed":
            self.mailbox.step_failed("scripted")
        else:
            self.mailbox.step_lost("worker_fault")
        self.order = None

    @rule()
    def restart(self):
        if self.order is not None:
            self.end_step("lost")
        self.mailbox.begin_session()

    @invariant()
    def every_frame_is_accounted_for(self):
        counters = self.mailbox.counters()
        waiting = counters.received - counters.stepped - sum(counters.dropped.values())
        under_way = self.order is not None
        assert under_way <= waiting <= under_way + 1


Accounting.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestAccounting = Accounting.TestCase
