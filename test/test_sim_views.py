"""TF and markers of the simulated world: the fields of the real messages, and the places that the physics knows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_typestore

from mobile_vla_inference.ros.sim_views import fill_odometry, layout_markers, robot_transforms
from mobile_vla_inference.sim.layout import CUP_HEIGHT_M, draw_layout
from mobile_vla_inference.sim.renderer import CAMERA_AHEAD_M, CAMERA_HEIGHT_M
from mobile_vla_inference.sim.robot import Pose
from mobile_vla_inference.sim.scenarios import SCENARIOS
from mobile_vla_inference.sim.world import Motion

STORE = get_typestore(Stores.ROS2_HUMBLE)
BLANK = {"string": "", "bool": False, "float32": 0.0, "float64": 0.0}


def blank(name: str) -> Any:
    """Return an empty message of a type's real definition."""
    values = {field: blank_value(*kind) for field, kind in STORE.get_msgdef(name).fields}
    return STORE.types[name](**values)


def blank_value(node: Nodetype, of: Any) -> Any:
    if node == Nodetype.NAME:
        return blank(of)
    if node == Nodetype.BASE:
        return BLANK.get(of[0], 0)
    (_, element), _ = of
    return np.zeros(0, np.uint8) if element[0] in ("byte", "uint8") else []


def blank_marker() -> Any:
    return blank("visualization_msgs/msg/Marker")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_markers_stand_where_the_physics_has_them(scenario):
    layout = draw_layout(scenario, 3)
    stamp = STORE.types["builtin_interfaces/msg/Time"](sec=7, nanosec=8)
    markers = layout_markers(blank_marker, stamp, layout)
    for marker in markers:  # a field of a wrong name or type can't be written
        STORE.serialize_cdr(marker, "visualization_msgs/msg/Marker")
        assert (marker.header.frame_id, marker.header.stamp) == ("odom", stamp)
    named = {marker.ns: marker for marker in markers}
    assert set(named) == {"box 1", "box 2", "door wall 1", "door wall 2", "cone", "cup", "walls"}
    upright = [(f"box {number + 1}", box) for number, box in enumerate(layout.boxes)]
    upright += [(f"door wall {number + 1}", wall) for number, wall in enumerate(layout.door_walls)]
    for name, box in upright:
        marker = named[name]
        position, scale, turn = marker.pose.position, marker.scale, marker.pose.orientation
        assert (position.x, position.y, scale.z) == (box.x_m, box.y_m, box.height_m)
        assert (scale.x / 2.0, scale.y / 2.0) == pytest.approx((box.half_x_m, box.half_y_m))
        assert 2.0 * math.atan2(turn.z, turn.w) == pytest.approx(box.yaw_rad)
        assert marker.action == 0
    assert named["box 2"].action == (0 if len(layout.boxes) == 2 else 2)
    door = layout.doorway
    assert [named[name].action for name in ("door wall 1", "door wall 2", "cone")] == [0 if door else 2] * 3
    if door is not None:
        assert (named["cone"].pose.position.x, named["cone"].pose.position.y) == door.cone
    assert (named["cup"].pose.position.x, named["cup"].pose.position.y) == layout.cup
    assert named["cup"].scale.z == CUP_HEIGHT_M
    assert len(named["walls"].points) == 5


def test_the_camera_looks_ahead_from_its_place():
    stamp = STORE.types["builtin_interfaces/msg/Time"](sec=7, nanosec=8)
    base, camera = robot_transforms(
        lambda: blank("geometry_msgs/msg/TransformStamped"), stamp, Pose(1.0, 2.0, math.pi / 2.0), "camera"
    )
    for transform in (base, camera):
        STORE.serialize_cdr(transform, "geometry_msgs/msg/TransformStamped")
    assert (base.header.frame_id, base.child_frame_id) == ("odom", "base_link")
    assert (camera.header.frame_id, camera.child_frame_id) == ("base_link", "camera")
    assert (base.transform.translation.x, base.transform.translation.y) == (1.0, 2.0)
    assert base.transform.rotation.z == pytest.approx(math.sin(math.pi / 4.0))
    place = camera.transform.translation
    assert (place.x, place.y, place.z) == (CAMERA_AHEAD_M, 0.0, CAMERA_HEIGHT_M)
    # The optical frame's z is the base's x, its x the base's right.
    turn = camera.transform.rotation
    assert rotated(turn, (0.0, 0.0, 1.0)) == pytest.approx((1.0, 0.0, 0.0))
    assert rotated(turn, (1.0, 0.0, 0.0)) == pytest.approx((0.0, -1.0, 0.0))


def rotated(turn: Any, vector: tuple[float, float, float]) -> np.ndarray:
    axis, vector = np.array([turn.x, turn.y, turn.z]), np.array(vector)
    return vector + 2.0 * np.cross(axis, np.cross(axis, vector) + turn.w * vector)


def test_odometry_contains_pose_and_velocity():
    odometry = blank("nav_msgs/msg/Odometry")
    fill_odometry(odometry, Pose(1.0, 2.0, math.pi / 2.0), Motion(0.5, 0.125, 0.25))
    position, orientation = odometry.pose.pose.position, odometry.pose.pose.orientation
    assert (odometry.header.frame_id, odometry.child_frame_id) == ("odom", "base_link")
    assert (position.x, position.y) == (1.0, 2.0)
    assert (orientation.z, orientation.w) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    twist = odometry.twist.twist
    assert (twist.linear.x, twist.linear.y, twist.angular.z) == (0.5, 0.125, 0.25)
