"""What the drill requires of a stop, judged by the recorded velocities, without ROS.

The first zero must arrive by the deadline, and only zeros after it until the fault is lifted and, if the node latches,
the drill enables it again. Every velocity must be within the limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: The longest time from the moment when a fault can be known to the first zero that arrives.
REACTION_LIMIT_S = 0.1
#: The longest gap between two zeros while zero is held: 0.1 s at 10 Hz, and as much for a busy machine.
ZERO_GAP_LIMIT_S = 0.2


@dataclass(frozen=True)
class Command:
    """A velocity that arrived: steady time in seconds, and linear x, y, z, angular x, y, z."""

    time_s: float
    values: tuple[float, ...]

    @property
    def is_zero(self) -> bool:
        """Whether every component is zero; NaN is not."""
        return not any(self.values)


@dataclass(frozen=True)
class SpeedLimits:
    """The limits of the velocity components, by the node's parameters."""

    linear_x_mps: float
    linear_y_mps: float
    angular_z_radps: float

    def allow(self, command: Command) -> bool:
        """Whether every component is finite and within its limit."""
        limits = (self.linear_x_mps, self.linear_y_mps, 0.0, 0.0, 0.0, self.angular_z_radps)
        return all(abs(value) <= limit for value, limit in zip(command.values, limits))


@dataclass(frozen=True)
class Onset:
    """When a fault began, steady clock.

    Attributes:
        since_s: the injection; for a timeout, the last good frame or step.
        timeout_s: how long the fault can't be known: the configured timeout, or 0.
        injected_s: the injection, if it is later than `since_s`; an earlier zero does not count.
        until_s: when motion is allowed again by itself, if that is known.
        at_once: only zeros may arrive from the injection on; a velocity before the deadline is a miss, too.
    """

    since_s: float
    timeout_s: float = 0.0
    injected_s: float = -math.inf
    until_s: float = math.inf
    at_once: bool = False

    @property
    def deadline_s(self) -> float:
        """When the first zero must have arrived."""
        return self.since_s + self.timeout_s + REACTION_LIMIT_S

    @property
    def watched_from_s(self) -> float:
        """The time from which velocities count."""
        return max(self.since_s, self.injected_s)


@dataclass(frozen=True)
class Verdict:
    """What the recording shows.

    Attributes:
        reaction_s: from `Onset.since_s` to the first zero; None if none arrived.
        misses: a sentence for each requirement that was not met.
    """

    reaction_s: float | None
    misses: tuple[str, ...]


def judge(
    commands: Sequence[Command],
    onset: Onset,
    until_s: float,
    limits: SpeedLimits,
    *,
    momentary: bool = False,
    zero_held_s: float = 0.0,
) -> Verdict:
    """Judge the velocities of one fault.

    Args:
        commands: velocities that arrived, in order of time; they can begin before the fault.
        onset: when the fault began.
        until_s: when motion was allowed again.
        limits: the configured speed limits.
        momentary: the fault is over with the first zero; motion may follow.
        zero_held_s: how long zero has to be repeated after the first zero, unless motion is allowed earlier.
    """
    until_s = min(until_s, onset.until_s)
    during = [command for command in commands if onset.watched_from_s <= command.time_s < until_s]
    first_zero_s = next((command.time_s for command in during if command.is_zero), math.inf)
    misses = []
    if not all(limits.allow(command) for command in during):
        misses.append("a velocity was not finite or beyond the limits")
    if first_zero_s == math.inf:
        misses.append("no zero arrived")
    elif first_zero_s > onset.deadline_s:
        late_s = first_zero_s - onset.deadline_s
        misses.append(f"the first zero arrived {late_s * 1000.0:.0f} ms after its deadline")
    if not momentary:
        still_from_s = onset.watched_from_s if onset.at_once else min(first_zero_s, onset.deadline_s)
        moving = [command for command in during if command.time_s > still_from_s and not command.is_zero]
        if moving:
            last_ms = (moving[-1].time_s - still_from_s) * 1000.0
            misses.append(
                f"{len(moving)} velocities other than zero, the last one {last_ms:.0f} ms after the robot should have "
                "stood still"
            )
    held_until_s = min(until_s, first_zero_s + zero_held_s)
    gap_s = _largest_gap_s([c.time_s for c in during if c.is_zero and c.time_s < held_until_s], held_until_s)
    if not momentary and gap_s > ZERO_GAP_LIMIT_S:
        misses.append(f"no zero for {gap_s * 1000.0:.0f} ms while zero has to be held")
    return Verdict(None if first_zero_s == math.inf else first_zero_s - onset.since_s, tuple(misses))


def _largest_gap_s(times_s: Sequence[float], until_s: float) -> float:
    """Return the largest gap from one time to the next, the last one to `until_s`; 0 without any time."""
    return max((later - earlier for earlier, later in zip(times_s, (*times_s[1:], until_s))), default=0.0)


def judge_rest(commands: Sequence[Command], since_s: float, until_s: float) -> Verdict:
    """Judge a robot that stands and must not start: both zeros and silence are right."""
    moving = [command for command in commands if since_s <= command.time_s < until_s and not command.is_zero]
    return Verdict(None, (f"{len(moving)} velocities other than zero, expected none",) if moving else ())
