"""Stamps of images: which are refused and why, when time runs backwards, and when the LSTM state can't be kept."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from mobile_vla_inference.control.reset_cause import ResetCause
from mobile_vla_inference.control.stamps import StampAge, StampFault, StampJudge, broken_sequence, stamp_seconds


def age(seconds: float) -> StampAge:
    return StampAge(seconds, max_age_s=0.5, max_ahead_s=0.1)


@pytest.mark.parametrize(
    ("stamp", "age_s", "fault", "sentence"),
    [
        (10.0, 0.0, None, ""),
        (10.0, 0.5, None, ""),
        (10.0, -0.1, None, ""),
        (10.0, 0.501, StampFault.STALE, "0.501 s old by its stamp, expected at most 0.5 s"),
        (10.0, -0.101, StampFault.FUTURE, "stamped 0.101 s ahead, expected at most 0.1 s"),
        (0.0, 10.0, StampFault.NO_STAMP, "has no stamp"),
    ],
)
def test_a_stamp_is_compared_with_the_clock(stamp, age_s, fault, sentence):
    verdict = StampJudge().judge(stamp, age(age_s))
    assert verdict.fault is fault
    assert sentence in verdict.sentence
    assert bool(verdict.sentence) is (fault is not None)


def test_a_recording_has_no_clock_but_zero_and_repeated_stamps_are_found():
    judge = StampJudge()
    assert [judge.judge(stamp).fault for stamp in (0.0, 5.0, 5.0, 6.0, 5.0)] == [
        StampFault.NO_STAMP,
        None,
        StampFault.REPEATED,
        None,
        None,
    ]


def test_time_that_runs_backwards_is_found_also_after_a_refused_image():
    judge = StampJudge()
    assert judge.last_s is None
    assert not judge.judge(5.0, age(0.0)).is_backwards, "nothing came before"
    assert judge.judge(4.0, age(0.0)).is_backwards
    assert judge.judge(9.0, age(-5.0)).fault is StampFault.FUTURE
    verdict = judge.judge(4.5, age(0.0))
    assert (verdict.fault, verdict.elapsed_s, verdict.is_backwards) == (None, -4.5, True)
    assert judge.last_s == 4.5


@pytest.mark.parametrize(
    ("last_s", "stamp", "cause"),
    [
        (None, 5.0, None),
        (5.0, 7.0, None),
        (5.0, 7.001, ResetCause.IMAGE_GAP),
        (5.0, 4.999, ResetCause.TIME_BACKWARDS),
    ],
)
def test_the_state_is_kept_over_a_short_gap_only(last_s, stamp, cause):
    assert broken_sequence(last_s, stamp, max_gap_s=2.0) is cause


def test_a_time_message_is_read_in_seconds():
    assert stamp_seconds(SimpleNamespace(sec=3, nanosec=250_000_000)) == 3.25


@pytest.mark.parametrize("kind", [ResetCause, StampFault])
def test_a_cause_is_its_plain_name_wherever_it_is_written(kind):
    for cause in kind:
        assert f"dropped_{cause}" == f"dropped_{cause.value}"
        assert json.loads(json.dumps({cause: cause})) == {cause.value: cause.value}
        assert {cause: 1}[cause.value] == 1
