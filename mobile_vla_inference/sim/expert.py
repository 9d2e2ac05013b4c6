"""The expert: it sees the map, and drives the shortest path around the boxes on the instructed side.

The boxes are grown by the robot's radius and a margin. The convex hull of the grown boxes, the robot and the cup has
two chains from the robot to the cup, one for each side. The expert steers to a point a little ahead on the chain of its
side. This works from any pose, also from one that a policy's mistakes have led to.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from mobile_vla_inference.action import STANDSTILL, VelocityCommand
from mobile_vla_inference.sim.world import MAX_ANGULAR_RADPS, MAX_LINEAR_MPS, ROBOT_RADIUS_M, STOP_M, World

_MARGIN_M = 0.22
_CORNER_POINTS = 8
#: The path through a doorway is straight from this far before it to this far behind it.
_BEFORE_DOOR_M, _BEHIND_DOOR_M = 0.4, 0.25
_LOOK_AHEAD_M = 0.35
#: Time until a command takes effect: the expert steers from the heading predicted for then.
_PREDICTED_S = 0.1
_TURN_GAIN = 2.0
#: Beyond this bearing of the aim, the robot turns in place.
_TURN_IN_PLACE_RAD = 0.9
_SLOW_DOWN_M = 0.35

Point = tuple[float, float]


class Expert:
    """Drive one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        reach_m = (ROBOT_RADIUS_M + _MARGIN_M) / math.cos(math.pi / _CORNER_POINTS)
        turns = np.arange(_CORNER_POINTS) * math.tau / _CORNER_POINTS
        ring = reach_m * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        corners = np.concatenate([box.corners for box in world.layout.boxes])
        points = (corners[:, None, :] + ring[None]).reshape(-1, 2)
        self._hull = convex_hull([tuple(point) for point in points.tolist()])

    def path(self) -> list[Point]:
        """Return the path from the robot to the cup as points, both included."""
        world = self._world
        robot, cup = (world.pose.x_m, world.pose.y_m), world.layout.cup
        door = world.layout.doorway
        if door is not None and robot[0] < door.x_m + _BEHIND_DOOR_M / 2.0:
            before, behind = (door.x_m - _BEFORE_DOOR_M, door.y_m), (door.x_m + _BEHIND_DOOR_M, door.y_m)
            through = [robot, before] if robot[0] < before[0] else [robot]
            return through + _chain(self._hull, behind, cup, world.layout.side)
        side = world.layout.side
        if world.passed_side == side and not _crosses(self._hull, robot, cup):
            return [robot, cup]
        start = _pushed_out(self._hull, robot)
        chain = _chain(self._hull, start, cup, side)
        return chain if start == robot else [robot, *chain]

    def command(self) -> VelocityCommand:
        """Return the command for the robot's present pose."""
        world = self._world
        distance_m = world.cup_distance_m
        if distance_m <= STOP_M and world.passed_side == world.layout.side:
            return STANDSTILL
        pose, motion = world.pose, world.motion
        aim = _ahead_on(self.path(), _LOOK_AHEAD_M)
        bearing_rad = math.atan2(aim[1] - pose.y_m, aim[0] - pose.x_m)
        error_rad = math.remainder(bearing_rad - pose.yaw_rad - _PREDICTED_S * motion.angular_z_radps, math.tau)
        turn = max(-MAX_ANGULAR_RADPS, min(MAX_ANGULAR_RADPS, _TURN_GAIN * error_rad))
        slow = min(1.0, (distance_m - STOP_M) / _SLOW_DOWN_M + 0.15) if world.passed_side else 1.0
        if world.base == "omnidirectional":
            ahead = MAX_LINEAR_MPS * slow
            return VelocityCommand(ahead * math.cos(error_rad), ahead * math.sin(error_rad), turn)
        speed = MAX_LINEAR_MPS * slow * max(0.0, 1.0 - abs(error_rad) / _TURN_IN_PLACE_RAD)
        return VelocityCommand(speed, 0.0, turn)


def path_length_m(path: list[Point]) -> float:
    """Return the length of a path."""
    return sum(math.dist(a, b) for a, b in pairwise(path))


def convex_hull(points: list[Point]) -> list[Point]:
    """Return the corners of the convex hull, counter-clockwise (Andrew's monotone chain)."""
    ordered = sorted(set(points))
    halves = []
    for sequence in (ordered, ordered[::-1]):
        half: list[Point] = []
        for point in sequence:
            while len(half) >= 2 and _cross(half[-2], half[-1], point) <= 0.0:
                half.pop()
            half.append(point)
        halves.append(half[:-1])
    return halves[0] + halves[1]


def _cross(a: Point, b: Point, c: Point) -> float:
    """Return twice the area of a triangle: positive where it turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _chain(hull: list[Point], start: Point, end: Point, side: str) -> list[Point]:
    """Return the shortest path from `start` to `end` that passes the hull on one side of it."""
    around = convex_hull([*hull, start, end])
    if start not in around or end not in around:
        return [start, end]
    if side == "left":  # with the boxes to the right: clockwise
        around = around[::-1]
    first = around.index(start)
    around = around[first:] + around[:first]
    return around[: around.index(end) + 1]


def _pushed_out(hull: list[Point], point: Point) -> Point:
    """Return the point, or the nearest one outside the hull if it is inside."""
    edges = list(zip(hull, [*hull[1:], hull[0]]))
    depths = [_cross(a, b, point) / math.dist(a, b) for a, b in edges]
    depth = min(depths)
    if depth <= 0.0:
        return point
    a, b = edges[depths.index(depth)]
    length = math.dist(a, b)
    out = depth + 0.02
    return (point[0] + out * (b[1] - a[1]) / length, point[1] - out * (b[0] - a[0]) / length)


def _crosses(hull: list[Point], a: Point, b: Point) -> bool:
    """Return whether the line from a to b goes through the hull (Cyrus-Beck clipping)."""
    enters, leaves = 0.0, 1.0
    for p, q in zip(hull, [*hull[1:], hull[0]]):
        at_a, at_b = _cross(p, q, a), _cross(p, q, b)
        if at_a <= 0.0 and at_b <= 0.0:
            return False
        if at_a < 0.0 < at_b:
            enters = max(enters, at_a / (at_a - at_b))
        elif at_b < 0.0 < at_a:
            leaves = min(leaves, at_a / (at_a - at_b))
    return leaves - enters > 1e-6


def _ahead_on(path: list[Point], distance_m: float) -> Point:
    """Return the point at a distance along the path, or its end."""
    for a, b in pairwise(path):
        length_m = math.dist(a, b)
        if length_m >= distance_m > 0.0:
            share = distance_m / length_m
            return (a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1]))
        distance_m -= length_m
    return path[-1]
