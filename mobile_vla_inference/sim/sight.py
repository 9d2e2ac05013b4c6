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
#: at its right), how near they are (1 / (1 + m)); the same for the cup; 1 for left and -1 for right.
SIGHT = ("boxes_seen", "boxes_left", "boxes_right", "boxes_near", "cup_seen", "cup_bearing", "cup_near", "side")

_HALF_VIEW_RAD = math.radians(FIELD_OF_VIEW_DEG / 2.0)


def sight(world: World) -> np.ndarray:
    """Return the numbers of SIGHT for where the robot is now, float32; NaN where there is nothing to tell."""
    pose, layout = world.pose, world.layout
    cos, sin = math.cos(pose.yaw_rad), math.sin(pose.yaw_rad)
    camera = np.array((pose.x_m + CAMERA_AHEAD_M * cos, pose.y_m + CAMERA_AHEAD_M * sin))
    to_robot = np.array(((cos, -sin), (sin, cos)))
    outlines = [(box.corners - camera) @ to_robot for box in layout.boxes]
    values = np.full(len(SIGHT), np.nan, dtype=np.float32)
    corners = np.concatenate(outlines)
    values[0] = -1.0
    ahead = corners[corners[:, 0] > 0.02]
    if len(ahead):
        slopes = ahead[:, 1] / ahead[:, 0] / math.tan(_HALF_VIEW_RAD)
        if slopes.min() < 1.0 and slopes.max() > -1.0:
            nearest_m = float(np.hypot(corners[:, 0], corners[:, 1]).min())
            values[:4] = 1.0, min(slopes.max(), 1.0), max(slopes.min(), -1.0), 1.0 / (1.0 + nearest_m)
    cup = (np.array(layout.cup) - camera) @ to_robot
    values[4] = -1.0
    if cup[0] > 0.02:
        slope = cup[1] / cup[0] / math.tan(_HALF_VIEW_RAD)
        if abs(slope) < 1.0 and not any(_hides(outline, cup) for outline in outlines):
            values[4:7] = 1.0, slope, 1.0 / (1.0 + math.hypot(*cup))
    values[7] = 1.0 if layout.side == "left" else -1.0
    return values


def _hides(outline: np.ndarray, point: np.ndarray) -> bool:
    """Tell whether an outline [corners, 2] lies between the origin and a point."""
    crosses = outline[:, 0] * point[1] - outline[:, 1] * point[0]
    if crosses.min() >= 0.0 or crosses.max() <= 0.0:
        return False
    return float(np.hypot(outline[:, 0], outline[:, 1]).min()) < math.hypot(*point)
