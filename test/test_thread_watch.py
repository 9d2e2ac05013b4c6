"""ThreadWatch: a thread of the node that fails or hangs ends the node, and messages that waited are recognised."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.reporter import Reporter
from mobile_vla_inference.ros.thread_watch import THREAD_LIMIT_S, ThreadWatch

PATIENCE_S = 20.0
NEVER_S = 3600.0


class Running:
    """Whether the ROS context is valid."""

    value = True

    def __call__(self) -> bool:
        return self.value


@pytest.fixture
def running() -> Running:
    return Running()


@pytest.fixture
def watch(running) -> Iterator[ThreadWatch]:
    reporter = Reporter()
    made = ThreadWatch("node", reporter, running)
    yield made
    made.close()
    reporter.close(PATIENCE_S)


def test_a_pulse_that_fails_ends_the_node_with_the_first_failure(watch, capsys):
    def fail() -> None:
        raise ZeroDivisionError("first")

    watch.start_pulse("pulse", fail, 0.01)
    watch.wait()
    assert isinstance(watch.failure, ZeroDivisionError)
    watch.fail(ValueError("second"))
    assert isinstance(watch.failure, ZeroDivisionError)


def test_what_fails_after_the_end_of_the_context_is_no_failure(watch, running):
    running.value = False
    watch.fail(RuntimeError("the context is gone"))
    assert watch.failure is None
    assert not watch.exit_request.is_set()


@pytest.mark.parametrize("hangs", ["pulse", "executor"])
def test_a_thread_that_hangs_ends_the_node_and_is_named(watch, hangs):
    release = threading.Event()
    began_s = time.monotonic()
    if hangs == "pulse":
        watch.start_pulse("pulse", lambda: release.wait(PATIENCE_S), 0.01)
        watch.start_pulse("executor", watch.note_executor, 0.05)
    waiter = threading.Thread(target=watch.wait, daemon=True)
    waiter.start()
    waiter.join(PATIENCE_S)
    release.set()
    assert not waiter.is_alive()
    assert time.monotonic() - began_s > THREAD_LIMIT_S - 0.1
    assert f"thread {hangs} has done nothing" in str(watch.failure)


def test_a_message_of_after_a_stall_of_the_executor_may_have_waited(watch):
    watch.note_executor()
    assert not watch.is_catching_up_since(steady_s()), "the executor has not stalled"
    time.sleep(0.35)
    before_s = steady_s()
    watch.note_executor()
    assert watch.is_catching_up_since(steady_s())
    assert not watch.is_catching_up_since(before_s), "this message was handled before the stall ended"
