"""Auxiliary targets: what a frame shows, computed from the map, for a network that learns to drive.

A few numbers for each frame: where the boxes and the cup are in the image, and which side is instructed. A network that
also predicts them learns to see from far fewer episodes. Nothing of it is used when the network drives.
"""

from __future__ import annotations

import math

import numpy as np

from mobile_vla_inference.sim.renderer import CAMERA_AHEAD_M, FIELD_OF_VIEW_DEG
from mobile_vla_inference.sim.world import World

#: Names of the numbers. Bearings are 1 at the image's left edge and -1 at its right; `seen` is 1 or -1; nearness is
#: 1 / (1 + metres). The side is 1 for left and -1 for right; `cone_meant` is 1 where the instruction means the cone's
#: side, and -1 where it means the other.
AUXILIARY_TARGETS = (
    "boxes_seen",
    "boxes_left",
    "boxes_right",
    "boxes_near",
    "cup_seen",
    "cup_bearing",
    "cup_near",
    "cone_seen",
    "cone_bearing",
    "side",
    "cone_meant",
)

_HALF_VIEW_RAD = math.radians(FIELD_OF_VIEW_DEG / 2.0)
#: Points less far ahead of the camera are not in the image.
_AHEAD_M = 0.02


def auxiliary_targets(world: World) -> np.ndarray:
    """Return the numbers of AUXILIARY_TARGETS at the robot's present pose, float32; NaN where one does not apply."""
    pose, layout = world.pose, world.layout
    cos, sin = math.cos(pose.yaw_rad), math.sin(pose.yaw_rad)
    camera = np.array((pose.x_m + CAMERA_AHEAD_M * cos, pose.y_m + CAMERA_AHEAD_M * sin))
    to_robot = np.array(((cos, -sin), (sin, cos)))
    outlines = [(box.corners - camera) @ to_robot for box in layout.boxes]
    walls = [(wall.corners - camera) @ to_robot for wall in layout.door_walls]
    values = dict.fromkeys(AUXILIARY_TARGETS, math.nan)
    values["boxes_seen"] = values["cup_seen"] = values["cone_seen"] = -1.0
    edges = _edges(outlines, _opening(walls))
    if edges is not None:
        nearest_m = float(np.hypot(*np.concatenate(outlines).T).min())
        near = 1.0 / (1.0 + nearest_m)
        values |= {"boxes_seen": 1.0, "boxes_left": edges[0], "boxes_right": edges[1], "boxes_near": near}
    cup = (np.array(layout.cup) - camera) @ to_robot
    bearing = _bearing(cup)
    if bearing is not None and not any(_hides(outline, cup) for outline in (*outlines, *walls)):
        values |= {"cup_seen": 1.0, "cup_bearing": bearing, "cup_near": 1.0 / (1.0 + math.hypot(*cup))}
    side = 1.0 if layout.side == "left" else -1.0
    door = layout.doorway
    if door is None:
        values["side"] = side
    else:
        values["cone_meant"] = 1.0 if door.cone_side == layout.side else -1.0
        bearing = _bearing((np.array(door.cone) - camera) @ to_robot)
        if bearing is not None and camera[0] < door.x_m:
            values |= {"cone_seen": 1.0, "cone_bearing": bearing}
    return np.array([values[name] for name in AUXILIARY_TARGETS], dtype=np.float32)


def _bearing(point: np.ndarray) -> float | None:
    """Return the bearing of a point, 1 at the image's left edge and -1 at its right; None outside the image."""
    if point[0] <= _AHEAD_M:
        return None
    bearing = float(_across(point))
    return bearing if abs(bearing) < 1.0 else None


def _across(points: np.ndarray) -> np.ndarray:
    """Return the bearings of points [..., 2] ahead of the camera, 1 at the image's left edge and -1 at its right."""
    return points[..., 1] / points[..., 0] / math.tan(_HALF_VIEW_RAD)


def _opening(walls: list[np.ndarray]) -> tuple[float, float]:
    """Return the bearings of a doorway's left and right end; those of the whole image without walls ahead."""
    if not walls or any(wall[:, 0].min() <= _AHEAD_M for wall in walls):
        return 1.0, -1.0
    right, left = map(_across, walls)
    return min(1.0, float(left.min())), max(-1.0, float(right.max()))


def _edges(outlines: list[np.ndarray], opening: tuple[float, float]) -> tuple[float, float] | None:
    """Return the bearings of the boxes' left and right edge within an opening; None where they are not visible."""
    corners = np.concatenate(outlines)
    ahead = corners[corners[:, 0] > _AHEAD_M]
    if not len(ahead):
        return None
    across = _across(ahead)
    left, right = min(float(across.max()), opening[0]), max(float(across.min()), opening[1])
    return (left, right) if left > right else None


def _hides(outline: np.ndarray, point: np.ndarray) -> bool:
    """Return whether an outline [corners, 2] lies between the origin and a point."""
    crosses = outline[:, 0] * point[1] - outline[:, 1] * point[0]
    if crosses.min() >= 0.0 or crosses.max() <= 0.0:
        return False
    return float(np.hypot(outline[:, 0], outline[:, 1]).min()) < math.hypot(*point)
