"""A video of episodes: what the robot sees beside the map with its way."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from mobile_vla_inference.action import VelocityCommand
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.sim.closed_loop import Watcher
from mobile_vla_inference.sim.layout import CONE_RADIUS_M, CUP_RADIUS_M, Layout
from mobile_vla_inference.sim.world import ROBOT_RADIUS_M, World

_SIDE_PX = 336
_SPEED_UP = 2.0
_END_FRAMES = 4
_OUTCOME_RGB = {"success": (40, 160, 60)}
_FAILURE_RGB = (200, 50, 40)


class Video:
    """Pictures of side 2 x _SIDE_PX by _SIDE_PX, written as they come."""

    def __init__(self, writer: cv2.VideoWriter) -> None:
        self._writer = writer

    def watcher(self, instruction: str) -> Watcher:
        """Return what is shown each step of an episode."""
        way: list[tuple[float, float]] = []

        def watch(world: World, frame: np.ndarray, command: VelocityCommand) -> None:
            way.append((world.pose.x_m, world.pose.y_m))
            picture = draw(world, frame, way, instruction)
            for _ in range(_END_FRAMES if world.outcome else 1):
                self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

        return watch


@contextmanager
def open_video(path: Path | None, period_s: float) -> Iterator[Video | None]:
    """Open a video that appears at `path` when all of it is written; None for no path.

    Raises:
        MobileVlaError: OpenCV can't write such a file.
    """
    if path is None:
        yield None
        return
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.stem}.", suffix=path.suffix or ".mp4")
    os.close(handle)
    part = Path(name)
    writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*"mp4v"), _SPEED_UP / period_s, (2 * _SIDE_PX, _SIDE_PX))
    try:
        if not writer.isOpened():
            raise MobileVlaError(f"{path} can't be written as a video, expected a name that ends in .mp4; change it")
        yield Video(writer)
        writer.release()
        part.chmod(0o644)
        part.replace(path)
    finally:
        writer.release()
        part.unlink(missing_ok=True)


def draw(world: World, frame: np.ndarray, way: list[tuple[float, float]], instruction: str) -> np.ndarray:
    """Draw one picture: the camera's frame at the left, the map at the right; uint8 RGB [height, 2 height, 3]."""
    seen = cv2.resize(frame, (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_NEAREST)
    text = instruction if instruction.isascii() else f"[{world.layout.side}]"  # OpenCV's letters are ASCII
    cv2.putText(seen, text[:60], (6, _SIDE_PX - 10), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
    return np.hstack([seen, _map(world, way)])


def _map(world: World, way: list[tuple[float, float]]) -> np.ndarray:
    """Draw the room from above, x upwards and y to the left, as the robot sees it from its start."""
    layout = world.layout
    picture = np.full((_SIDE_PX, _SIDE_PX, 3), 245, dtype=np.uint8)
    to_px, scale = _projection(layout)
    x_from, x_to, y_from, y_to = layout.room
    cv2.rectangle(picture, to_px((x_from, y_to)), to_px((x_to, y_from)), (120, 120, 120), 2)
    for box in (*layout.boxes, *layout.door_walls):
        outline = np.array([to_px(tuple(corner)) for corner in box.corners])
        cv2.fillConvexPoly(picture, outline, _rgb(box.rgb), cv2.LINE_AA)
    cv2.circle(picture, to_px(layout.cup), max(3, round(CUP_RADIUS_M * scale)), _rgb(layout.cup_rgb), -1, cv2.LINE_AA)
    if layout.doorway is not None:
        cone, radius = to_px(layout.doorway.cone), max(3, round(CONE_RADIUS_M * scale))
        cv2.circle(picture, cone, radius, _rgb(layout.doorway.cone_rgb), -1, cv2.LINE_AA)
    if len(way) > 1:
        cv2.polylines(picture, [np.array([to_px(point) for point in way])], False, (60, 90, 200), 2, cv2.LINE_AA)
    pose = world.pose
    cv2.circle(picture, to_px((pose.x_m, pose.y_m)), round(ROBOT_RADIUS_M * scale), (40, 40, 40), 2, cv2.LINE_AA)
    nose = (pose.x_m + ROBOT_RADIUS_M * np.cos(pose.yaw_rad), pose.y_m + ROBOT_RADIUS_M * np.sin(pose.yaw_rad))
    cv2.line(picture, to_px((pose.x_m, pose.y_m)), to_px(nose), (40, 40, 40), 2, cv2.LINE_AA)
    if world.outcome:
        color = _OUTCOME_RGB.get(world.outcome, _FAILURE_RGB)
        cv2.putText(picture, world.outcome, (8, 22), cv2.FONT_HERSHEY_SIMPLEX, 0.6, color, 2, cv2.LINE_AA)
    return picture


def _projection(layout: Layout):
    x_from, x_to, y_from, y_to = layout.room
    scale = (_SIDE_PX - 12) / max(x_to - x_from, y_to - y_from)
    middle_x, middle_y = (x_from + x_to) / 2.0, (y_from + y_to) / 2.0

    def to_px(point: tuple[float, float]) -> tuple[int, int]:
        return round(_SIDE_PX / 2 - (point[1] - middle_y) * scale), round(_SIDE_PX / 2 - (point[0] - middle_x) * scale)

    return to_px, scale


def _rgb(color: tuple[float, float, float]) -> tuple[int, int, int]:
    return tuple(round(255 * value) for value in color)
