"""The time between the steps of a recording, by its stamps or its duration. Pure numpy.

A step of the recurrent cell has no dt: a policy trained at 20 Hz is wrong at 3 Hz. So the period of a recording is
read, never assumed, and recordings for one training must have the same period.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mobile_vla_inference.errors import MobileVlaError

#: Relative difference up to which periods are the same: stamps jitter and cameras are not exact.
TOLERANCE = 0.1
#: Largest tolerance of a recording with few steps, whose times vary.
_TOLERANCE_MOST = 0.5
_FEW_STEPS = 12
#: A step is uneven if it is longer or shorter by this share of the period. Largest share of uneven steps.
_UNEVEN = 0.5
MAX_UNEVEN_SHARE = 0.05
_NOTABLE = 0.4
#: A time of more than this many medians is a gap, and is left out of the mean.
_GAP_MEDIANS = 2.5
#: Most medians that a resampled step can have; beyond that the recording is too uneven.
_MOST_MEDIANS = 20
#: An image counts as a step up to this long before its time: stamps jitter.
_EARLY_S = 0.01
#: A longer time without an image ends an episode of a bag, as it resets the policy's hidden state in the node.
EPISODE_GAP_S = 2.0
#: Limits of a policy's step period (policy.json), seconds.
_LEAST_S, _MOST_S = 0.001, 10.0


class StepPeriodError(MobileVlaError):
    """A recording's times can't be used, or contradict an option, a policy or another recording."""


@dataclass(frozen=True)
class StepPeriod:
    """The time between the steps of a recording.

    Attributes:
        where: the recording, for messages.
        period_s: seconds from one step to the next.
        steps: number of times between steps.
        uneven: how many of them are more than half a period longer or shorter.
        by: its source, `stamps` or `duration`.
        tolerance: its possible error, as a share.
        stamps_s: the stamps, float64 [steps + 1]; None where the source is a duration.
    """

    where: str
    period_s: float
    steps: int
    uneven: int = 0
    by: str = "stamps"
    tolerance: float = TOLERANCE
    stamps_s: np.ndarray | None = field(default=None, repr=False, compare=False)

    def agrees(self, period_s: float) -> bool:
        """Return whether another period is the same within the tolerance."""
        return abs(period_s - self.period_s) <= self.tolerance * max(period_s, self.period_s)


def period_of_stamps(stamps_s: Sequence[float] | np.ndarray, where: str) -> StepPeriod | None:
    """Return the period of rising stamps (seconds); None where there are fewer than two.

    Raises:
        StepPeriodError: a stamp is NaN, the stamps don't increase, or they can't be seconds.
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
            "that increase; correct them or leave it out"
        )
    # Where a period lies between two multiples of the camera's, two times alternate: then the mean is the period.
    median_s = float(np.median(times))
    mean_s = float(times[times < _GAP_MEDIANS * median_s].mean())
    period_s = min(median_s, mean_s, key=lambda each: _beyond(times, each, _NOTABLE))
    uneven = _beyond(times, period_s, _UNEVEN)
    tolerance = TOLERANCE
    if len(times) < _FEW_STEPS:
        spread = float(np.ptp(times)) / 2.0 / period_s if len(times) > 2 else _TOLERANCE_MOST
        tolerance = min(_TOLERANCE_MOST, max(TOLERANCE, spread))
    return _plausible(StepPeriod(where, _rounded(period_s), len(times), uneven, tolerance=tolerance, stamps_s=stamps))


def period_of_duration(duration_s: float | None, count: int, where: str) -> StepPeriod | None:
    """Return the mean period of `count` steps that took `duration_s` from the first to the last.

    None where the duration is missing or 0, or there is a single step.

    Raises:
        StepPeriodError: the duration is NaN or negative, or can't be seconds.
    """
    if duration_s is None or duration_s == 0.0 or count < 2:
        return None
    if not 0.0 < duration_s < float("inf"):
        raise StepPeriodError(f"{where} lasts {duration_s:g} s, expected more than 0; correct total_duration")
    # The duration can include the time of the last step, or not.
    tolerance = min(_TOLERANCE_MOST, max(TOLERANCE, 1.0 / (count - 1)))
    return _plausible(
        StepPeriod(where, _rounded(duration_s / (count - 1)), count - 1, by="duration", tolerance=tolerance)
    )


def common_period(periods: Sequence[StepPeriod]) -> StepPeriod:
    """Return the one period of several recordings, at least one.

    Raises:
        StepPeriodError: their periods differ, or too many steps are uneven.
    """
    ordered = sorted(periods, key=lambda each: each.period_s)
    steps = np.cumsum([each.steps for each in ordered])
    middle = ordered[int(np.searchsorted(steps, steps[-1] / 2.0))]
    for each in (ordered[0], ordered[-1], *ordered):
        if not each.agrees(middle.period_s):
            slowest_s = max(each.period_s, middle.period_s)
            raise StepPeriodError(
                f"{each.where} has {each.period_s:g} s between steps, {middle.where} has {middle.period_s:g} s, "
                f"expected the same in all; {resample_advice(slowest_s, 0.0)}, or use them separately"
            )
    uneven = sum(each.uneven for each in ordered)
    if _too_uneven(ordered):
        raise StepPeriodError(
            f"{uneven} of {steps[-1]} steps are more than half longer or shorter than {middle.period_s:g} s "
            f"({max(ordered, key=lambda each: each.uneven).where}), expected at most {MAX_UNEVEN_SHARE:.0%}; "
            f"{_even_advice(ordered, middle.period_s)}"
        )
    by = "stamps" if any(each.by == "stamps" for each in ordered) else "duration"
    return StepPeriod(middle.where, middle.period_s, int(steps[-1]), uneven, by, middle.tolerance)


def resample_advice(period_s: float, recorded_s: float) -> str:
    """Return how to give a recording another period: steps can be left out, but not added."""
    if period_s < recorded_s:
        return f"record it every {period_s:g} s"
    return f"resample (make-bag or episodes-to-bag, then bag-to-episodes --period {period_s:g})"


class Pace:
    """Select the images of a recording that are steps: at most one for each period."""

    def __init__(self, period_s: float) -> None:
        """Begin before the first image; `period_s` is the time from one step to the next."""
        self._period_s = period_s
        self._due_s = self._taken_s = -math.inf

    def takes(self, stamp_s: float) -> bool:
        """Return whether the image with this stamp is a step; a late one starts a new sequence of periods."""
        backwards = stamp_s < self._taken_s
        if not backwards and stamp_s < self._due_s - _EARLY_S:
            return False
        late = backwards or stamp_s > self._due_s + self._period_s
        self._due_s = (stamp_s if late else self._due_s) + self._period_s
        self._taken_s = stamp_s
        return True


def even_period(stamps: Sequence[np.ndarray], median_s: float) -> float | None:
    """Return the shortest multiple of a median that gives even steps after resampling; None where there is none.

    Args:
        stamps: rising stamps of each recording, seconds.
        median_s: the present time between steps.
    """
    for multiple in range(2, _MOST_MEDIANS + 1):
        period_s = _rounded(multiple * median_s)
        parts = [part for each in stamps for part in _resampled(each, period_s)]
        try:
            periods = [period for part in parts if (period := period_of_stamps(part, "")) is not None]
            if periods and not _too_uneven(periods) and common_period(periods).agrees(period_s):
                return period_s
        except StepPeriodError:
            continue
    return None


def _resampled(stamps_s: np.ndarray, period_s: float) -> list[np.ndarray]:
    """Return the stamps of the episodes that `bag-to-episodes --period` would make from a recording."""
    pace = Pace(period_s)
    taken = np.array([stamp_s for stamp_s in stamps_s.tolist() if pace.takes(stamp_s)])
    return np.split(taken, np.flatnonzero(np.diff(taken) > EPISODE_GAP_S) + 1)


def _even_advice(periods: Sequence[StepPeriod], median_s: float) -> str:
    """Return how to make uneven recordings even, and which one to leave out where there are several."""
    worst = max(periods, key=lambda each: each.uneven)
    leave_out = f"leave out {worst.where} (move it out of the folder or file that you give)"
    period_s = even_period([each.stamps_s for each in periods if each.stamps_s is not None], median_s)
    ways = [] if period_s is None else [resample_advice(period_s, 0.0)]
    ways += [leave_out] if len(periods) > 1 else []
    return ", or ".join(ways) or "record it again with a camera of constant rate"


def _too_uneven(periods: Sequence[StepPeriod]) -> bool:
    return sum(each.uneven for each in periods) > MAX_UNEVEN_SHARE * sum(each.steps for each in periods)


def _beyond(times_s: np.ndarray, period_s: float, share: float) -> int:
    return int((np.abs(times_s - period_s) > share * period_s).sum())


def _rounded(period_s: float) -> float:
    """Return the period with four digits: stamps are rounded, too."""
    return float(f"{period_s:.4g}")


def _plausible(period: StepPeriod) -> StepPeriod:
    if not _LEAST_S <= period.period_s <= _MOST_S:
        raise StepPeriodError(
            f"{period.where} has {period.period_s:g} s between steps by its {period.by}, expected {_LEAST_S:g} to "
            f"{_MOST_S:g} s; check that its times are in seconds"
        )
    return period
