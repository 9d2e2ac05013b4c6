"""The time from one step of a recording to the next, as its stamps or its duration tell it. Pure numpy.

A step of the cell has no dt: what it learned at 20 Hz is wrong at 3 Hz. So the period of a recording is read, never
assumed, and two recordings that are learned from together must have the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mobile_vla_inference.border import MobileVlaError

#: Periods this far apart, as a share, are the same: stamps jitter and cameras are not exact.
TOLERANCE = 0.1
#: The most that a recording of a few steps may be off, whose times vary.
_TOLERANCE_MOST = 0.5
_FEW_STEPS = 12
#: A step is uneven where it is this share of the period longer or shorter; at most MAX_UNEVEN_SHARE of all may be.
_UNEVEN = 0.5
MAX_UNEVEN_SHARE = 0.05
_NOTABLE = 0.4
#: Longer than so many medians is a gap and says nothing about the period.
_GAP_MEDIANS = 2.5
#: What a step of a policy can stand for (policy.json), seconds.
_LEAST_S, _MOST_S = 0.001, 10.0


class StepPeriodError(MobileVlaError):
    """A recording's times can't be used, or contradict what they should agree with."""


@dataclass(frozen=True)
class StepPeriod:
    """What a recording tells about the time from step to step.

    Attributes:
        where: the recording, for messages.
        period_s: seconds from one step to the next.
        steps: how many such times there are.
        uneven: how many of them are more than half a period longer or shorter.
        by: what told it, `stamps` or `duration`.
        tolerance: how far off, as a share, it may be.
    """

    where: str
    period_s: float
    steps: int
    uneven: int = 0
    by: str = "stamps"
    tolerance: float = TOLERANCE

    def agrees(self, period_s: float) -> bool:
        """Whether another period is the same within the tolerance."""
        return abs(period_s - self.period_s) <= self.tolerance * max(period_s, self.period_s)


def period_of_stamps(stamps_s: Sequence[float] | np.ndarray, where: str) -> StepPeriod | None:
    """Return the period of rising stamps (seconds); None where there are fewer than two.

    Raises:
        StepPeriodError: a stamp is NaN, they don't rise, or they can't be seconds.
    """
    stamps = np.asarray(stamps_s, dtype=np.float64)
    if not np.isfinite(stamps).all():
        raise StepPeriodError(f"{where} has stamps that are NaN or Inf, expected seconds; leave it out")
    if len(stamps) < 2:
        return None
    times = np.diff(stamps)
    if (times <= 0.0).any():
        index = int(np.argmax(times <= 0.0))
        raise StepPeriodError(
            f"{where} has step {index + 1} stamped {stamps[index + 1]:g} s after {stamps[index]:g} s, expected stamps "
            "that rise; correct them or leave it out"
        )
    # Images that are not a multiple of the period apart give two times in turn: neither is the period, their mean is.
    median_s = float(np.median(times))
    mean_s = float(times[times < _GAP_MEDIANS * median_s].mean())
    period_s = min(median_s, mean_s, key=lambda each: _beyond(times, each, _NOTABLE))
    uneven = _beyond(times, period_s, _UNEVEN)
    tolerance = TOLERANCE
    if len(times) < _FEW_STEPS:
        spread = float(np.ptp(times)) / 2.0 / period_s if len(times) > 2 else _TOLERANCE_MOST
        tolerance = min(_TOLERANCE_MOST, max(TOLERANCE, spread))
    return _plausible(StepPeriod(where, _rounded(period_s), len(times), uneven, tolerance=tolerance))


def period_of_duration(duration_s: float | None, count: int, where: str) -> StepPeriod | None:
    """Return the mean period of `count` steps that took `duration_s` from the first to the last.

    None where nothing is told: no duration, 0, or a single step.

    Raises:
        StepPeriodError: the duration is NaN or negative, or can't be seconds.
    """
    if duration_s is None or duration_s == 0.0 or count < 2:
        return None
    if not 0.0 < duration_s < float("inf"):
        raise StepPeriodError(f"{where} lasts {duration_s:g} s, expected more than 0; correct total_duration")
    # It may count the last step's own time, or not.
    tolerance = min(_TOLERANCE_MOST, max(TOLERANCE, 1.0 / (count - 1)))
    return _plausible(
        StepPeriod(where, _rounded(duration_s / (count - 1)), count - 1, by="duration", tolerance=tolerance)
    )


def common_period(periods: Sequence[StepPeriod]) -> StepPeriod:
    """Return the one period of several recordings, at least one.

    Raises:
        StepPeriodError: they have different ones, or too many steps are uneven.
    """
    ordered = sorted(periods, key=lambda each: each.period_s)
    steps = np.cumsum([each.steps for each in ordered])
    middle = ordered[int(np.searchsorted(steps, steps[-1] / 2.0))]
    for each in (ordered[0], ordered[-1], *ordered):
        if not each.agrees(middle.period_s):
            slowest_s = max(each.period_s, middle.period_s)
            raise StepPeriodError(
                f"{each.where} has {each.period_s:g} s from step to step, {middle.where} has {middle.period_s:g} s, "
                f"expected the same in all; {resample_advice(slowest_s, 0.0)}, or use them apart"
            )
    uneven = sum(each.uneven for each in ordered)
    if uneven > MAX_UNEVEN_SHARE * steps[-1]:
        raise StepPeriodError(
            f"{uneven} of {steps[-1]} steps are more than half longer or shorter than {middle.period_s:g} s "
            f"({max(ordered, key=lambda each: each.uneven).where}), expected at most {MAX_UNEVEN_SHARE:.0%}; "
            f"{resample_advice(middle.period_s, 0.0)}, or leave out what is uneven"
        )
    by = "stamps" if any(each.by == "stamps" for each in ordered) else "duration"
    return StepPeriod(middle.where, middle.period_s, int(steps[-1]), uneven, by, middle.tolerance)


def resample_advice(period_s: float, recorded_s: float) -> str:
    """Say how a recording gets another period: steps can be left out, not made up."""
    if period_s < recorded_s:
        return f"record it every {period_s:g} s"
    return f"resample (make-bag or episodes-to-bag, then bag-to-episodes --period {period_s:g})"


def _beyond(times_s: np.ndarray, period_s: float, share: float) -> int:
    return int((np.abs(times_s - period_s) > share * period_s).sum())


def _rounded(period_s: float) -> float:
    """Return the period to four digits: stamps are rounded, too."""
    return float(f"{period_s:.4g}")


def _plausible(period: StepPeriod) -> StepPeriod:
    if not _LEAST_S <= period.period_s <= _MOST_S:
        raise StepPeriodError(
            f"{period.where} has {period.period_s:g} s from step to step by its {period.by}, expected {_LEAST_S:g} to "
            f"{_MOST_S:g} s; check that its times are in seconds"
        )
    return period
