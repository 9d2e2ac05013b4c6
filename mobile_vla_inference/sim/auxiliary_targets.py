"""What there is to see in a frame, read from the map: a second lesson for a network that learns to drive.

A few numbers for each frame say where the boxes and the cup stand in the picture and which side is meant. A network
that has to tell them too learns to see from far fewer episodes; nothing of it is used when it drives.
"""

from __future__ import annotations

import math

import numpy as np

from mobile_vla_inference.sim.renderer import CAMERA_AHEAD_M, FIELD_OF_VIEW_DEG
from mobile_vla_inference.sim.world import World

#: What the numbers are: whether boxes are seen, where their left and right edges are (1 at the picture's left edge, -1
#: at its right), how near they are (1 / (1 + m)); the same for the cup; whether and where the cone is seen; the side
#: that is told, 1 for left and -1 for right; 1 where the cone's side is told, -1 for the other.
SIGHT = (
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
#: What is less far ahead of the camera is beside it.
_AHEAD_M = 0.02


def sight(world: World) -> np.ndarray:
    """Return the numbers of SIGHT for where the robot is now, float32; NaN where there is nothing to tell."""
    pose, layout = world.pose, world.layout
    cos, sin = math.cos(pose.yaw_rad), math.sin(pose.yaw_rad)
    camera = np.array((pose.x_m + CAMERA_AHEAD_M * cos, pose.y_m + CAMERA_AHEAD_M * sin))
    to_robot = np.array(((cos, -sin), (sin, cos)))
    outlines = [(box.corners - camera) @ to_robot for box in layout.boxes]
    walls = [(wall.corners - camera) @ to_robot for wall in layout.door_walls]
    values = dict.fromkeys(SIGHT, math.nan)
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
    return np.array([values[name] for name in SIGHT], dtype=np.float32)


def _bearing(point: np.ndarray) -> float | None:
    """Return where a point is in the picture, 1 at its left edge and -1 at its right; None where it is not in it."""
    if point[0] <= _AHEAD_M:
        return None
    bearing = float(_across(point))
    return bearing if abs(bearing) < 1.0 else None


def _across(points: np.ndarray) -> np.ndarray:
    """Return where points [..., 2] ahead of the camera are in the picture, 1 at its left edge and -1 at its right."""
    return points[..., 1] / points[..., 0] / math.tan(_HALF_VIEW_RAD)


def _opening(walls: list[np.ndarray]) -> tuple[float, float]:
    """Return the left and right end of what a doorway's walls leave to be seen; the whole picture without them."""
    if not walls or any(wall[:, 0].min() <= _AHEAD_M for wall in walls):
        return 1.0, -1.0
    right, left = map(_across, walls)
    return min(1.0, float(left.min())), max(-1.0, float(right.max()))


def _edges(outlines: list[np.ndarray], opening: tuple[float, float]) -> tuple[float, float] | None:
    """Return where the boxes' left and right edges are in the picture; None where they are not in it."""
    corners = np.concatenate(outlines)
    ahead = corners[corners[:, 0] > _AHEAD_M]
    if not len(ahead):
        return None
    across = _across(ahead)
    left, right = min(float(across.max()), opening[0]), max(float(across.min()), opening[1])
    return (left, right) if left > right else None


def _hides(outline: np.ndarray, point: np.ndarray) -> bool:
    """Tell whether an outline [corners, 2] lies between the origin and a point."""
    crosses = outline[:, 0] * point[1] - outline[:, 1] * point[0]
    if crosses.min() >= 0.0 or crosses.max() <= 0.0:
        return False
    return float(np.hypot(outline[:, 0], outline[:, 1]).min()) < math.hypot(*point)
