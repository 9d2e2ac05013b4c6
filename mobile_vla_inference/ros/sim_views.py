"""Fill the messages that show the simulated world in RViz: odometry, transforms (TF), and markers of the objects.

The caller creates the messages, because no PyPI wheel of ROS 2 contains tf2_msgs and visualization_msgs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mobile_vla_inference.sim.layout import (
    CONE_HEIGHT_M,
    CONE_RADIUS_M,
    CUP_HEIGHT_M,
    CUP_RADIUS_M,
    BoxOnFloor,
    Layout,
    Rgb,
)
from mobile_vla_inference.sim.renderer import CAMERA_AHEAD_M, CAMERA_HEIGHT_M
from mobile_vla_inference.sim.robot import Pose
from mobile_vla_inference.sim.world import Motion

ODOM_FRAME = "odom"
BASE_FRAME = "base_link"

#: The constants of visualization_msgs/Marker.
_CUBE, _CYLINDER, _LINE_STRIP = 1, 3, 4
_DELETE = 2
_WALL_LINE_M = 0.05
#: From x forward, y left, z up to an optical frame: z forward, x right, y down (REP-103).
_TO_OPTICAL_XYZW = (-0.5, 0.5, -0.5, 0.5)


def robot_transforms(make: Callable[[], Any], stamp: Any, pose: Pose, camera_frame: str) -> list[Any]:
    """Return `odom` to `base_link` and `base_link` to the camera.

    Args:
        make: returns an empty geometry_msgs/TransformStamped.
        stamp: builtin_interfaces/Time.
        pose: of the base.
        camera_frame: the images' frame.
    """
    base, camera = make(), make()
    for transform, parent, child in ((base, ODOM_FRAME, BASE_FRAME), (camera, BASE_FRAME, camera_frame)):
        transform.header.stamp, transform.header.frame_id, transform.child_frame_id = stamp, parent, child
    base.transform.translation.x, base.transform.translation.y = pose.x_m, pose.y_m
    _turn(base.transform.rotation, pose.yaw_rad)
    camera.transform.translation.x, camera.transform.translation.z = CAMERA_AHEAD_M, CAMERA_HEIGHT_M
    rotation = camera.transform.rotation
    rotation.x, rotation.y, rotation.z, rotation.w = _TO_OPTICAL_XYZW
    return [base, camera]


def fill_odometry(odometry: Any, pose: Pose, motion: Motion) -> None:
    """Fill an empty nav_msgs/Odometry with the pose of the base in `odom` and its velocity in `base_link`."""
    odometry.header.frame_id = ODOM_FRAME
    odometry.child_frame_id = BASE_FRAME
    odometry.pose.pose.position.x = pose.x_m
    odometry.pose.pose.position.y = pose.y_m
    _turn(odometry.pose.pose.orientation, pose.yaw_rad)
    odometry.twist.twist.linear.x = motion.linear_x_mps
    odometry.twist.twist.linear.y = motion.linear_y_mps
    odometry.twist.twist.angular.z = motion.angular_z_radps


def layout_markers(make: Callable[[], Any], stamp: Any, layout: Layout) -> list[Any]:
    """Return boxes, cup, walls, doorway and cone, in `odom`; always as many, so that those of an earlier world vanish.

    Args:
        make: returns an empty visualization_msgs/Marker.
        stamp: builtin_interfaces/Time.
        layout: the objects and their places.
    """
    markers = []
    for kind, boxes in (("box", layout.boxes), ("door wall", layout.door_walls)):
        for index in range(2):
            box = boxes[index] if index < len(boxes) else None
            markers.append(_box(make, stamp, f"{kind} {index + 1}", box))
    markers.append(_cylinder(make, stamp, "cup", layout.cup, CUP_RADIUS_M, CUP_HEIGHT_M, layout.cup_rgb))
    door = layout.doorway
    if door is None:
        markers.append(_deleted(make, stamp, "cone"))
    else:
        markers.append(_cylinder(make, stamp, "cone", door.cone, CONE_RADIUS_M, CONE_HEIGHT_M, door.cone_rgb))
    walls = _marker(make, stamp, "walls", _LINE_STRIP, layout.wall_rgb[0])
    walls.scale.x = _WALL_LINE_M
    x_from, x_to, y_from, y_to = layout.room
    make_point = type(walls.pose.position)
    corners = ((x_from, y_from), (x_to, y_from), (x_to, y_to), (x_from, y_to), (x_from, y_from))
    walls.points = [make_point(x=float(x), y=float(y), z=0.0) for x, y in corners]
    return [*markers, walls]


def _box(make: Callable[[], Any], stamp: Any, name: str, box: BoxOnFloor | None) -> Any:
    if box is None:
        return _deleted(make, stamp, name)
    marker = _marker(make, stamp, name, _CUBE, box.rgb)
    _place(marker, box.x_m, box.y_m, box.height_m)
    _turn(marker.pose.orientation, box.yaw_rad)
    marker.scale.x, marker.scale.y = 2.0 * box.half_x_m, 2.0 * box.half_y_m
    return marker


def _cylinder(
    make: Callable[[], Any],
    stamp: Any,
    name: str,
    centre: tuple[float, float],
    radius_m: float,
    height_m: float,
    rgb: Rgb,
) -> Any:
    marker = _marker(make, stamp, name, _CYLINDER, rgb)
    _place(marker, *centre, height_m)
    marker.scale.x = marker.scale.y = 2.0 * radius_m
    return marker


def _deleted(make: Callable[[], Any], stamp: Any, name: str) -> Any:
    """Delete a marker of an earlier world."""
    marker = _marker(make, stamp, name, _CUBE, (0.0, 0.0, 0.0))
    marker.action = _DELETE
    return marker


def _marker(make: Callable[[], Any], stamp: Any, name: str, shape: int, rgb: Rgb) -> Any:
    marker = make()
    marker.header.stamp, marker.header.frame_id = stamp, ODOM_FRAME
    marker.ns, marker.type = name, shape
    marker.pose.orientation.w = 1.0
    marker.color.r, marker.color.g, marker.color.b = (float(part) for part in rgb)
    marker.color.a = 1.0
    return marker


def _place(marker: Any, x_m: float, y_m: float, height_m: float) -> None:
    """Place a marker on the floor."""
    marker.pose.position.x, marker.pose.position.y = float(x_m), float(y_m)
    marker.pose.position.z, marker.scale.z = height_m / 2.0, height_m


def _turn(quaternion: Any, yaw_rad: float) -> None:
    quaternion.z, quaternion.w = math.sin(yaw_rad / 2.0), math.cos(yaw_rad / 2.0)
