"""Pulse: beats that come each period, a period anew after a restart, and an end that is told."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.pulse import Pulse

PATIENCE_S = 10.0
NEVER_S = 3600.0


def unexpected(error: Exception) -> None:
    raise AssertionError(f"the pulse failed: {error}")


def test_beats_come_a_period_apart_and_never_early():
    beats: queue.Queue[float] = queue.Queue()
    began_s = time.monotonic()
    pulse = Pulse(lambda: beats.put(time.monotonic()), 0.02, unexpected)
    times_s = [beats.get(timeout=PATIENCE_S) for _ in range(5)]
    pulse.close()
    # Planned from the start on, a late beat doesn't put off the next: only the sum is bounded from below.
    assert times_s[-1] - began_s >= 5 * 0.02
    assert times_s == sorted(times_s)


def test_beats_that_were_missed_are_not_made_up_for():
    release, began, done = threading.Event(), threading.Event(), threading.Event()
    beats: list[float] = []

    def beat() -> None:
        beats.append(time.monotonic())
        began.set()
        if len(beats) == 1:
            release.wait(PATIENCE_S)
        if len(beats) == 3:
            done.set()

    pulse = Pulse(beat, 0.05, unexpected)
    assert began.wait(PATIENCE_S)
    while time.monotonic() < beats[0] + 6 * 0.05:
        done.wait(0.01)
    released_s = time.monotonic()
    release.set()
    assert done.wait(PATIENCE_S)
    pulse.close()
    assert beats[2] - released_s >= 0.05


def test_a_new_period_counts_from_the_last_beat():
    beats: queue.Queue[float] = queue.Queue()
    pulse = Pulse(lambda: beats.put(time.monotonic()), NEVER_S, unexpected)
    pulse.period_s = 0.05
    assert pulse.period_s == 0.05
    first_s = beats.get(timeout=PATIENCE_S)
    pulse.period_s = 0.2
    assert beats.get(timeout=PATIENCE_S) - first_s >= 0.19
    pulse.close()


def test_nothing_that_is_set_puts_a_beat_off():
    beats: queue.Queue[float] = queue.Queue()
    began_s = time.monotonic()
    pulse = Pulse(lambda: beats.put(time.monotonic()), 0.05, unexpected)
    while beats.empty():  # a slider that is dragged
        pulse.period_s = 0.05
        assert time.monotonic() - began_s < PATIENCE_S, "the beat was put off"
    pulse.close()


def test_the_last_beat_is_known():
    beats: queue.Queue[float] = queue.Queue()
    pulse = Pulse(lambda: beats.put(steady_s()), 0.01, unexpected)
    times_s = [beats.get(timeout=PATIENCE_S) for _ in range(3)]
    assert times_s[1] <= pulse.last_beat_s
    pulse.close()


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError, SystemExit])
def test_a_beat_that_fails_ends_the_pulse_and_tells_why(error):
    failures: queue.Queue[BaseException] = queue.Queue()

    def beat() -> None:
        raise error

    pulse = Pulse(beat, 0.01, failures.put)
    assert isinstance(failures.get(timeout=PATIENCE_S), error)
    pulse.close()
    assert failures.empty()


@pytest.mark.parametrize("times", [1, 2])
def test_closing_ends_the_thread_at_once(times):
    before = threading.active_count()
    pulse = Pulse(lambda: None, NEVER_S, unexpected)
    for _ in range(times):
        pulse.close()
    assert threading.active_count() == before
