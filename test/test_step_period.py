"""The time between steps: the periods of stamps and durations, and recordings without one."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_vla_inference.bags.step_period import (
    EPISODE_GAP_S,
    Pace,
    StepPeriod,
    StepPeriodError,
    common_period,
    even_period,
    period_of_duration,
    period_of_stamps,
    resample_advice,
)


@given(
    st.floats(0.002, 5.0),
    st.integers(2, 200),
    st.lists(st.floats(-0.2, 0.2), min_size=200, max_size=200),
    st.floats(0.0, 1e9),
)
def test_the_period_is_found_under_jitter(period_s, count, jitter, start_s):
    """Stamps that are off by up to a fifth of a period each way; those of 2001 have 120 ns of their own."""
    stamps = start_s + period_s * (np.arange(count) + np.array(jitter[:count]))
    found = period_of_stamps(stamps, "it")
    assert found.steps == count - 1
    assert found.uneven == 0
    assert found.agrees(period_s) or found.steps < 12  # a few steps are as exact as their jitter
    assert abs(found.period_s - period_s) <= 0.41 * period_s + 1e-3 * period_s


def test_a_camera_that_is_no_multiple_of_the_period_is_even():
    """30 Hz, taken every 0.05 s: 0.067 s and 0.033 s in turn."""
    found = period_of_stamps(np.cumsum([0.0, *[2 / 30, 1 / 30] * 20, 2 / 30]), "it")
    assert found.period_s == pytest.approx(0.05, rel=0.02)
    assert found.uneven == 0


def test_gaps_are_uneven_and_leave_the_period_as_it_is():
    times = np.full(100, 0.05)
    times[[10, 40]] = 1.5
    found = period_of_stamps(np.cumsum(times), "it")
    assert (found.period_s, found.uneven, found.steps) == (0.05, 1 + 1, 99)
    assert common_period([found]).period_s == 0.05
    times[50:56] = 0.2
    with pytest.raises(StepPeriodError, match=r"8 of 99 steps .* expected at most 5%"):
        common_period([period_of_stamps(np.cumsum(times), "it")])


@given(st.integers(0, 10_000), st.floats(0.02, 0.3), st.floats(0.3, 0.9))
def test_what_is_advised_against_uneven_steps_makes_them_even(seed, period_s, spread):
    """The period that the sentence names is taken as bag-to-episodes takes it, and passes."""
    random = np.random.default_rng(seed)
    times = period_s * random.choice([1.0 - spread, 1.0, 1.0 + spread, 2.5], 400)
    stamps = np.cumsum(times)
    found = period_of_stamps(stamps, "it")
    if found.uneven <= 0.05 * found.steps:
        return
    with pytest.raises(StepPeriodError, match="steps are more than half longer") as raised:
        common_period([found])
    (advised,) = re.findall(r"--period (\S+)\)", str(raised.value)) or [None]
    if advised is None:
        assert "record it again" in str(raised.value)
        return
    assert float(advised) >= 1.9 * found.period_s
    pace = Pace(float(advised))
    taken = np.array([stamp for stamp in stamps.tolist() if pace.takes(stamp)])
    parts = np.split(taken, np.flatnonzero(np.diff(taken) > EPISODE_GAP_S) + 1)
    again = common_period([each for part in parts if (each := period_of_stamps(part, "it")) is not None])
    assert again.agrees(float(advised))


def test_uneven_steps_can_be_resampled_or_left_out():
    stamps = np.cumsum(np.resize([0.02, 0.02, 0.02, 0.09], 200))
    uneven = period_of_stamps(stamps, "uneven")
    even = even_period([stamps], uneven.period_s)
    assert even is not None
    assert even >= 2.0 * uneven.period_s
    with pytest.raises(StepPeriodError, match=rf"bag-to-episodes --period {even:g}\)$"):
        common_period([uneven])
    other = StepPeriod("even", uneven.period_s, 20)
    with pytest.raises(StepPeriodError, match=r"--period \S+\), or leave out uneven \(move it out of the folder"):
        common_period([uneven, other])


def test_one_step_or_no_duration_gives_no_period():
    assert period_of_stamps([7.0], "it") is None
    assert period_of_duration(None, 18, "it") is None
    assert period_of_duration(0.0, 18, "it") is None
    assert period_of_duration(1.0, 1, "it") is None


@pytest.mark.parametrize("duration_s", [float("nan"), float("inf"), -1.0, 1e6])
def test_a_duration_that_can_not_be_is_refused(duration_s):
    with pytest.raises(StepPeriodError):
        period_of_duration(duration_s, 18, "it")


def test_a_duration_may_count_the_last_step_or_not():
    for duration_s in (0.3 * 8, 0.3 * 7):
        assert period_of_duration(duration_s, 8, "it").agrees(0.3)
    assert not period_of_duration(0.3 * 8, 8, "it").agrees(0.2)


def test_the_longer_recordings_decide_and_the_other_is_named():
    long, short = StepPeriod("long", 0.05, 1000), StepPeriod("short", 0.3, 20)
    assert common_period([long, StepPeriod("like", 0.052, 20)]).period_s == 0.05
    with pytest.raises(StepPeriodError, match=r"short has 0.3 s .* long has 0.05 s.* --period 0.3"):
        common_period([short, long])


def test_steps_are_left_out_not_made_up():
    assert "--period 0.3" in resample_advice(0.3, 0.05)
    assert resample_advice(0.05, 0.3) == "record it every 0.05 s"
