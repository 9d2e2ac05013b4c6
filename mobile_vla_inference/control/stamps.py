"""Judge the stamps of images, for the live node and for a replay by the same rules.

Pure logic on seconds: no clock, no ROS. A stamp is `header.stamp`, the capture time of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mobile_vla_inference.control.reset_cause import ResetCause


class StampFault(str, Enum):
    """Why an image can't be used; the value is the cause in the frame accounting (`dropped_*`)."""

    NO_STAMP = "no_stamp"
    REPEATED = "repeated_stamp"
    STALE = "stale_stamp"
    FUTURE = "future_stamp"

    def __str__(self) -> str:
        """Return the value, in every Python release."""
        return self.value


@dataclass(frozen=True)
class StampAge:
    """How old an image is by the ROS clock, and what is allowed, seconds.

    Attributes:
        age_s: the clock's time minus the stamp; negative: the stamp is in the future.
        max_age_s: an older image is refused.
        max_ahead_s: an image stamped further in the future is refused.
    """

    age_s: float
    max_age_s: float
    max_ahead_s: float


@dataclass(frozen=True)
class StampVerdict:
    """What a stamp means.

    Attributes:
        fault: why the image can't be used; None: it can.
        sentence: the fault for people; empty without one.
        elapsed_s: seconds since the stamp before; 0 for the first one.
    """

    fault: StampFault | None
    sentence: str
    elapsed_s: float

    @property
    def is_backwards(self) -> bool:
        """Whether time ran backwards: the image is older than the one before."""
        return self.elapsed_s < 0.0


class StampJudge:
    """Compare each stamp with the one before, and with the clock where there is one."""

    def __init__(self) -> None:
        self._last_s: float | None = None

    @property
    def last_s(self) -> float | None:
        """The newest stamp that was judged; None before the first."""
        return self._last_s

    def judge(self, stamp_s: float, age: StampAge | None = None) -> StampVerdict:
        """Judge the next image's stamp, and remember it whatever the verdict is.

        Args:
            stamp_s: capture time, seconds.
            age: how old the image is; None: there is no clock to compare with (a recording).
        """
        elapsed_s = 0.0 if self._last_s is None else stamp_s - self._last_s
        fault, sentence = _fault(stamp_s, self._last_s, age)
        self._last_s = stamp_s
        return StampVerdict(fault, sentence, elapsed_s)


def stamp_seconds(stamp: object) -> float:
    """Return a builtin_interfaces/Time (`sec`, `nanosec`) in seconds."""
    return stamp.sec + stamp.nanosec * 1e-9


def broken_sequence(last_stepped_s: float | None, stamp_s: float, max_gap_s: float) -> ResetCause | None:
    """Return why the LSTM state of the last stepped image can't be used for the next one; None: it can.

    Args:
        last_stepped_s: stamp of the last stepped image, seconds; None: there is none.
        stamp_s: stamp of the image to step, seconds.
        max_gap_s: the longest time between the two.
    """
    if last_stepped_s is None:
        return None
    if stamp_s < last_stepped_s:
        return ResetCause.TIME_BACKWARDS
    return ResetCause.IMAGE_GAP if stamp_s - last_stepped_s > max_gap_s else None


def _fault(stamp_s: float, last_s: float | None, age: StampAge | None) -> tuple[StampFault | None, str]:
    if stamp_s == 0.0:
        return (
            StampFault.NO_STAMP,
            "image has no stamp, expected the capture time in header.stamp; set it in the camera driver",
        )
    if stamp_s == last_s:
        return (
            StampFault.REPEATED,
            "image repeats the stamp of the one before, expected a newer one; check the camera",
        )
    if age is not None and age.age_s > age.max_age_s:
        return (
            StampFault.STALE,
            f"image is {age.age_s:.3f} s old by its stamp, expected at most {age.max_age_s:g} s; "
            "check the clocks, use_sim_time and the load",
        )
    if age is not None and age.age_s < -age.max_ahead_s:
        return (
            StampFault.FUTURE,
            f"image is stamped {-age.age_s:.3f} s ahead, expected at most {age.max_ahead_s:g} s; check the clocks",
        )
    return None, ""
