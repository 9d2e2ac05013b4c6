"""Cleanup: a signal ends what runs, but none interrupts what opens or closes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from mobile_vla_inference.harness.interrupts import Cleanup


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_runs_and_everything_is_closed_whatever_comes_then(number):
    closed = []
    with pytest.raises(KeyboardInterrupt), Cleanup() as cleanup, cleanup.interruptible():
        cleanup.callback(lambda: (interrupt(), closed.append("first")))
        cleanup.callback(lambda: (interrupt(number), closed.append("second")))
        interrupt(number)
        closed.append("never")
    assert closed == ["second", "first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_waits_until_what_is_opened_is_noted():
    closed, opened = [], []
    with pytest.raises(KeyboardInterrupt), Cleanup() as cleanup, cleanup.interruptible():
        with cleanup.held():
            interrupt()
            opened.append("graph")
            cleanup.callback(closed.append, "graph")
        opened.append("never")
    assert opened == closed == ["graph"]


def test_a_signal_while_all_is_closed_in_the_end_comes_afterwards():
    closed = []
    with pytest.raises(KeyboardInterrupt), Cleanup() as cleanup, cleanup.interruptible():
        cleanup.callback(lambda: (interrupt(), closed.append("graph")))
    assert closed == ["graph"]


def test_without_a_signal_nothing_is_raised_and_an_error_goes_its_way():
    with Cleanup() as cleanup, cleanup.interruptible():
        pass
    with pytest.raises(ValueError, match="own"), Cleanup() as cleanup, cleanup.interruptible():
        raise ValueError("own")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Cleanup() as cleanup, cleanup.interruptible():
        interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
