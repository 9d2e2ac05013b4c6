"""A differential-drive base: velocity commands in, pose out. Pure: the caller gives the time.

Poses follow REP-103: x forward, y left, yaw counter-clockwise, in metres and radians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Largest speeds of the base; a faster command is clamped, as by a motor driver.
MAX_LINEAR_MPS = 2.0
MAX_ANGULAR_RADPS = 4.0


@dataclass(frozen=True)
class Pose:
    """Position and heading in the world: metres and radians, yaw in [-pi, pi]."""

    x_m: float = 0.0
    y_m: float = 0.0
    yaw_rad: float = 0.0


class DifferentialDrive:
    """Follow velocity commands exactly, without slip, and stop when no more come.

    Attributes:
        pose: after the last `step`.
        linear_x_mps, angular_z_radps: velocities of the robot.
    """

    def __init__(
        self,
        command_timeout_s: float = 0.5,
        max_linear_mps: float = MAX_LINEAR_MPS,
        max_angular_radps: float = MAX_ANGULAR_RADPS,
    ) -> None:
        self.pose = Pose()
        self.linear_x_mps = 0.0
        self.angular_z_radps = 0.0
        self._command_timeout_s = command_timeout_s
        self._max_linear_mps = max_linear_mps
        self._max_angular_radps = max_angular_radps
        self._now_s: float | None = None
        self._expires_s = -math.inf

    def command(self, linear_x_mps: float, angular_z_radps: float, now_s: float) -> None:
        """Move with these velocities, clamped to the base's limits, until the timeout or the next command.

        Raises:
            ValueError: a velocity is not finite; the last command stays until its timeout.
        """
        if not (math.isfinite(linear_x_mps) and math.isfinite(angular_z_radps)):
            raise ValueError(
                f"velocity command is ({linear_x_mps} m/s, {angular_z_radps} rad/s), expected finite numbers; "
                "check its publisher"
            )
        self.step(now_s)
        self.linear_x_mps = clamp(linear_x_mps, self._max_linear_mps)
        self.angular_z_radps = clamp(angular_z_radps, self._max_angular_radps)
        self._expires_s = now_s + self._command_timeout_s

    def step(self, now_s: float) -> Pose:
        """Advance to `now_s` (seconds of a clock that never goes back) and return the pose.

        A command that expires between two steps moves the robot exactly until it expires.
        """
        last_s = now_s if self._now_s is None else self._now_s
        moving_s = min(now_s, self._expires_s) - last_s
        if moving_s > 0.0:
            self.pose = _advance(self.pose, self.linear_x_mps * moving_s, self.angular_z_radps * moving_s)
        if now_s >= self._expires_s:
            self.linear_x_mps = self.angular_z_radps = 0.0
        self._now_s = max(last_s, now_s)
        return self.pose


def _advance(pose: Pose, distance_m: float, turn_rad: float) -> Pose:
    """Move along a circular arc; its chord is distance * sin(half turn) / (half turn), a line where it doesn't turn."""
    half_rad = turn_rad / 2.0
    chord_m = distance_m * (math.sin(half_rad) / half_rad if half_rad else 1.0)
    return Pose(
        pose.x_m + chord_m * math.cos(pose.yaw_rad + half_rad),
        pose.y_m + chord_m * math.sin(pose.yaw_rad + half_rad),
        math.remainder(pose.yaw_rad + turn_rad, math.tau),
    )


def clamp(value: float, limit: float) -> float:
    """Return the nearest value whose magnitude is at most the limit."""
    return max(-limit, min(limit, value))
