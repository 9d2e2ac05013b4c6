"""Pulse: one beat each period, at no time too early; a changed period; and an end that is reported."""

from __future__ import annotations

import itertools
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
    # A late beat does not delay the next one, so two of them can be closer than a period; but none comes too early.
    early = [number for number, at_s in enumerate(times_s, 1) if at_s < began_s + number * 0.02]
    assert not early


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


def test_a_new_period_takes_effect_at_once():
    beats: queue.Queue[float] = queue.Queue()
    pulse = Pulse(lambda: beats.put(time.monotonic()), NEVER_S, unexpected)
    pulse.period_s = 0.05
    assert pulse.period_s == 0.05
    beats.get(timeout=PATIENCE_S)
    pulse.period_s = NEVER_S
    set_s = time.monotonic()
    with pytest.raises(queue.Empty):  # a beat that was under way is allowed, none of the old period after it
        while beats.get(timeout=0.3) < set_s + 0.05:
            pass
    pulse.close()


def test_a_new_period_counts_from_the_last_beat():
    beats: queue.Queue[float] = queue.Queue()

    def beat() -> None:
        beats.put(time.monotonic())
        pulse.period_s = 0.2  # set in the beat, so that no beat of the old period can come first

    pulse = Pulse(beat, NEVER_S, unexpected)
    pulse.period_s = 0.05
    first_s = beats.get(timeout=PATIENCE_S)
    assert beats.get(timeout=PATIENCE_S) - first_s >= 0.19
    pulse.close()


@pytest.mark.parametrize("periods_s", [(0.05,), (0.05, 0.06)], ids=["the same one", "another one"])
def test_a_period_that_is_set_again_and_again_delays_no_beat(periods_s):
    """As a slider does that is dragged: a new period counts from the last beat on, not from now."""
    beats: queue.Queue[float] = queue.Queue()
    began_s = time.monotonic()
    pulse = Pulse(lambda: beats.put(time.monotonic()), 0.05, unexpected)
    for period_s in itertools.cycle(periods_s):
        pulse.period_s = period_s
        if not beats.empty():
            break
        assert time.monotonic() - began_s < PATIENCE_S, "the beat was delayed"
        time.sleep(0.001)
    pulse.close()


def test_the_last_beat_is_known():
    beats: queue.Queue[float] = queue.Queue()
    pulse = Pulse(lambda: beats.put(steady_s()), 0.01, unexpected)
    times_s = [beats.get(timeout=PATIENCE_S) for _ in range(3)]
    assert times_s[1] <= pulse.last_beat_s
    pulse.close()


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError, SystemExit])
def test_a_beat_that_fails_ends_the_pulse_and_reports_why(error):
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
