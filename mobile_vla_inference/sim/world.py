"""The world in motion: a base with limits, collisions, the side on which it passes, and when it reaches the cup.

Pure: no images, no clock, no library but numpy. Commands are VelocityCommand; time passes only in `step`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from mobile_vla_inference.action import STANDSTILL, VelocityCommand
from mobile_vla_inference.sim.layout import CONE_RADIUS_M, CUP_RADIUS_M, Layout
from mobile_vla_inference.sim.robot import Pose, clamp

ROBOT_RADIUS_M = 0.18
#: The cup is reached where the robot's centre is this near to the cup's.
REACH_M = 0.45
#: Distance from the cup at which the expert stops.
STOP_M = 0.36
#: Seconds of one step of the physics.
PHYSICS_STEP_S = 0.025

BASES = ("differential", "omnidirectional")
MAX_LINEAR_MPS = 0.5
MAX_ANGULAR_RADPS = 1.2
LINEAR_ACCELERATION_MPS2 = 1.5
ANGULAR_ACCELERATION_RADPS2 = 5.0

#: How an episode can end.
OUTCOMES = ("success", "wrong side", "collision", "timeout")


@dataclass(frozen=True)
class Motion:
    """Velocities of the base in its own axes."""

    linear_x_mps: float = 0.0
    linear_y_mps: float = 0.0
    angular_z_radps: float = 0.0


class World:
    """One robot in one layout.

    Attributes:
        layout: what stands where.
        base: one of BASES; the differential one ignores linear.y.
        pose: of the robot.
        motion: of the robot.
        time_s: since the start.
        path_m: driven distance.
        passed_side: the side on which it has passed the boxes; None before.
        collided: whether it has touched anything; after that it never moves.
    """

    def __init__(self, layout: Layout, base: str = "differential", timeout_s: float | None = None) -> None:
        """Put the robot at the layout's start.

        Args:
            layout: the world.
            base: one of BASES.
            timeout_s: when an episode is over; None: three times the time of the straight line, and 6 s.
        """
        if base not in BASES:
            raise ValueError(f"base is {base!r}, expected one of {', '.join(BASES)}")
        self.layout = layout
        self.base = base
        self.pose = layout.start
        self.motion = Motion()
        self.time_s = 0.0
        self.path_m = 0.0
        self.passed_side: str | None = None
        self.collided = False
        straight_s = math.dist((layout.start.x_m, layout.start.y_m), layout.cup) / MAX_LINEAR_MPS
        self.timeout_s = 3.0 * straight_s + 6.0 if timeout_s is None else timeout_s
        self._group_centre = np.concatenate([box.corners for box in layout.boxes]).mean(axis=0)
        way = np.array(layout.cup) - (layout.start.x_m, layout.start.y_m)
        self._ahead = way / np.linalg.norm(way)
        self._pending: deque[tuple[float, VelocityCommand]] = deque()
        self._command = STANDSTILL
        self._boxes = [
            (box.x_m, box.y_m, math.cos(box.yaw_rad), math.sin(box.yaw_rad), box.half_x_m, box.half_y_m)
            for box in (*layout.boxes, *layout.door_walls)
        ]
        self._was_before = self._along(self.pose) < 0.0

    @property
    def cup_distance_m(self) -> float:
        """From the robot's centre to the cup's."""
        return math.dist((self.pose.x_m, self.pose.y_m), self.layout.cup)

    @property
    def outcome(self) -> str | None:
        """How the episode ended, one of OUTCOMES; None before its end."""
        if self.collided:
            return "collision"
        if self.passed_side not in (None, self.layout.side):
            return "wrong side"
        if self.cup_distance_m <= REACH_M:
            return "success" if self.passed_side else "wrong side"
        return "timeout" if self.time_s >= self.timeout_s else None

    def command(self, command: VelocityCommand) -> None:
        """Take a command, which is executed after the layout's delay. Values beyond the base's limits are clamped."""
        if not command.is_finite:
            raise ValueError(f"velocity command is {command.values}, expected finite numbers")
        self._pending.append((self.time_s + self.layout.delay_s, command))

    def step(self, duration_s: float) -> None:
        """Let time pass."""
        for _ in range(max(1, round(duration_s / PHYSICS_STEP_S))):
            self._tick(PHYSICS_STEP_S)

    def _tick(self, dt_s: float) -> None:
        self.time_s += dt_s
        while self._pending and self._pending[0][0] <= self.time_s:
            self._command = self._pending.popleft()[1]
        if self.collided:
            self.motion = Motion()
            return
        self.motion = _towards(self.motion, self._command, self.base, dt_s)
        self._move(dt_s)
        self.collided = self._touches()
        self._note_passing()

    def _move(self, dt_s: float) -> None:
        motion, pose = self.motion, self.pose
        middle_rad = pose.yaw_rad + motion.angular_z_radps * dt_s / 2.0
        cos, sin = math.cos(middle_rad), math.sin(middle_rad)
        dx = (motion.linear_x_mps * cos - motion.linear_y_mps * sin) * dt_s
        dy = (motion.linear_x_mps * sin + motion.linear_y_mps * cos) * dt_s
        yaw = math.remainder(pose.yaw_rad + motion.angular_z_radps * dt_s, math.tau)
        self.pose = Pose(pose.x_m + dx, pose.y_m + dy, yaw)
        self.path_m += math.hypot(dx, dy)

    def _touches(self) -> bool:
        x, y = self.pose.x_m, self.pose.y_m
        x_from, x_to, y_from, y_to = self.layout.room
        if min(x - x_from, x_to - x, y - y_from, y_to - y) < ROBOT_RADIUS_M:
            return True
        if self.cup_distance_m < ROBOT_RADIUS_M + CUP_RADIUS_M:
            return True
        door = self.layout.doorway
        if door is not None and math.dist((x, y), door.cone) < ROBOT_RADIUS_M + CONE_RADIUS_M:
            return True
        return any(_box_distance_m(box, x, y) < ROBOT_RADIUS_M for box in self._boxes)

    def _along(self, pose: Pose) -> float:
        return float((np.array((pose.x_m, pose.y_m)) - self._group_centre) @ self._ahead)

    def _note_passing(self) -> None:
        """Remember the side on which the robot crosses the line through the boxes' centre, across its path."""
        offset_x, offset_y = self.pose.x_m - self._group_centre[0], self.pose.y_m - self._group_centre[1]
        is_before = offset_x * self._ahead[0] + offset_y * self._ahead[1] < 0.0
        if self._was_before and not is_before:
            left = self._ahead[0] * offset_y - self._ahead[1] * offset_x > 0.0
            self.passed_side = "left" if left else "right"
        elif is_before and not self._was_before:
            self.passed_side = None
        self._was_before = is_before


def _towards(motion: Motion, command: VelocityCommand, base: str, dt_s: float) -> Motion:
    """Change the velocities towards a command, within the base's acceleration."""
    sideways = command.linear_y_mps if base == "omnidirectional" else 0.0
    step = LINEAR_ACCELERATION_MPS2 * dt_s
    return Motion(
        _limited(motion.linear_x_mps, clamp(command.linear_x_mps, MAX_LINEAR_MPS), step),
        _limited(motion.linear_y_mps, clamp(sideways, MAX_LINEAR_MPS), step),
        _limited(
            motion.angular_z_radps,
            clamp(command.angular_z_radps, MAX_ANGULAR_RADPS),
            ANGULAR_ACCELERATION_RADPS2 * dt_s,
        ),
    )


def _limited(value: float, target: float, step: float) -> float:
    return value + clamp(target - value, step)


def _box_distance_m(box: tuple[float, ...], x: float, y: float) -> float:
    """Return the distance from a point to a box on the floor; 0 inside."""
    centre_x, centre_y, cos, sin, half_x, half_y = box
    dx, dy = x - centre_x, y - centre_y
    local_x, local_y = abs(dx * cos + dy * sin), abs(dy * cos - dx * sin)
    return math.hypot(max(local_x - half_x, 0.0), max(local_y - half_y, 0.0))
