"""A video of episodes: the camera's image and the map from above, with instruction, command, time and outcome."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from mobile_vla_inference.action import AXES, AXIS_UNITS, VelocityCommand
from mobile_vla_inference.atomic import replacing
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.lettering import can_draw, draw_text, fitting_size_px, text_width_px
from mobile_vla_inference.sim.closed_loop import Watcher
from mobile_vla_inference.sim.layout import CONE_RADIUS_M, CUP_RADIUS_M, Layout
from mobile_vla_inference.sim.robot import Pose
from mobile_vla_inference.sim.world import ROBOT_RADIUS_M, World

_SIDE_PX = 336
_HEADER_PX, _FOOTER_PX = 36, 32
#: Width and height of a frame of the video.
SIZE_PX = (2 * _SIDE_PX, _HEADER_PX + _SIDE_PX + _FOOTER_PX)

#: The video shows a drive this many times as fast as it was.
SPEED_UP = 2.0
#: The last frame of an episode stays for so long, so that its outcome can be read.
_END_S = 1.5

_GROUND_RGB = (250, 250, 250)
_TEXT_RGB = (30, 34, 40)
_QUIET_RGB = (110, 116, 124)
_PATH_RGB = (60, 90, 200)
_ROBOT_RGB = (30, 34, 40)
HEADING_RGB = (240, 120, 20)
_SUCCESS_RGB = (30, 130, 60)
_FAILURE_RGB = (190, 40, 30)
_TEXT_PX, _MARGIN_PX = 17, 10
#: Shown in the place of an instruction in letters that this OpenCV can't draw.
_NO_LETTERS = "(instruction in letters that this OpenCV can't draw: see lettering.py)"
#: Half the length of the arrow that stands for the robot: smaller ones would not show where it heads.
_LEAST_ROBOT_PX = 9


class Video:
    """Frames of SIZE_PX, written as they come.

    Attributes:
        frames: how many were written.
    """

    def __init__(self, writer: cv2.VideoWriter, frames_per_s: float) -> None:
        self._writer = writer
        self.frames = 0
        self._end_frames = max(1, math.ceil(_END_S * frames_per_s))

    def watcher(self, instruction: str) -> Watcher:
        """Return what adds a frame for each step of an episode."""
        path: list[tuple[float, float]] = []

        def watch(world: World, frame: np.ndarray, command: VelocityCommand) -> None:
            path.append((world.pose.x_m, world.pose.y_m))
            drawn = draw(world, frame, path, instruction, command)
            for _ in range(self._end_frames if world.outcome else 1):
                self._writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
                self.frames += 1

        return watch


@contextmanager
def open_video(path: Path | None, period_s: float) -> Iterator[Video | None]:
    """Open a video that appears at `path` once all of it is written; None for no path.

    Args:
        path: the file, which ends in .mp4.
        period_s: seconds from one step of the policy to the next.

    Raises:
        MobileVlaError: OpenCV can't write such a file, or the disk is full; a file that was at `path` stays.
    """
    if path is None:
        yield None
        return
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:  # OpenCV would crash
        raise MobileVlaError(f"{str(path)!r} is not UTF-8, expected a path in UTF-8; choose another place") from error
    frames_per_s = SPEED_UP / period_s
    with replacing(path, path.suffix or ".mp4") as part:
        writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*"mp4v"), frames_per_s, SIZE_PX)
        try:
            if not writer.isOpened():
                raise MobileVlaError(f"{path} can't be written as video, expected a name that ends in .mp4; change it")
            video = Video(writer, frames_per_s)
            yield video
        finally:
            writer.release()
        if _count_frames(part) != video.frames:  # OpenCV reports no error of the disk
            raise MobileVlaError(f"{path} was not written completely, expected space on its disk; free some")


def _count_frames(path: Path) -> int:
    """Return how many frames a video has; 0 if it can't be read."""
    capture = cv2.VideoCapture(str(path))
    try:
        return round(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    finally:
        capture.release()


def draw(
    world: World, frame: np.ndarray, path: list[tuple[float, float]], instruction: str, command: VelocityCommand
) -> np.ndarray:
    """Draw one frame of the video; return uint8 RGB [SIZE_PX[1], SIZE_PX[0], 3].

    Args:
        world: after the step.
        frame: the camera's image, uint8 RGB [side, side, 3].
        path: where the robot has been, metres.
        instruction: what the driver follows.
        command: what it answered.
    """
    seen = cv2.resize(frame, (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_NEAREST)
    middle = np.hstack([seen, room_from_above(world, path)])
    return np.vstack([_header(instruction), middle, _footer(world, command)])


def status_texts(world: World, command: VelocityCommand) -> tuple[str, str]:
    """Return the time with the command, and how the episode ended or that it goes on."""
    driven = [
        f"{axis} {value:+.2f} {unit}"
        for axis, unit, value in zip(AXES, AXIS_UNITS, command.values)
        if axis != "linear.y" or world.base == "omnidirectional"
    ]
    return "   ".join([f"{world.time_s:.1f} s", *driven]), world.outcome or "driving"


def _header(instruction: str) -> np.ndarray:
    band = np.full((_HEADER_PX, SIZE_PX[0], 3), _GROUND_RGB, dtype=np.uint8)
    text = instruction if can_draw(instruction) else _NO_LETTERS
    size_px = fitting_size_px(text, SIZE_PX[0] - 2 * _MARGIN_PX, _TEXT_PX + 2, 8)
    draw_text(band, text, (_MARGIN_PX, _HEADER_PX - 12), _TEXT_RGB, size_px)
    return band


def _footer(world: World, command: VelocityCommand) -> np.ndarray:
    band = np.full((_FOOTER_PX, SIZE_PX[0], 3), _GROUND_RGB, dtype=np.uint8)
    text, outcome = status_texts(world, command)
    baseline = _FOOTER_PX - 10
    draw_text(band, text, (_MARGIN_PX, baseline), _TEXT_RGB, _TEXT_PX)
    color = {None: _QUIET_RGB, "success": _SUCCESS_RGB}.get(world.outcome, _FAILURE_RGB)
    left = SIZE_PX[0] - _MARGIN_PX - text_width_px(outcome, _TEXT_PX)
    draw_text(band, outcome, (left, baseline), color, _TEXT_PX)
    return band


def room_from_above(world: World, path: list[tuple[float, float]]) -> np.ndarray:
    """Draw the map from above, x upwards and y to the left, as the robot sees it from its start."""
    layout = world.layout
    drawn = np.full((_SIDE_PX, _SIDE_PX, 3), 240, dtype=np.uint8)
    to_px, scale = _projection(layout)
    x_from, x_to, y_from, y_to = layout.room
    cv2.rectangle(drawn, to_px((x_from, y_to)), to_px((x_to, y_from)), _GROUND_RGB, -1)
    cv2.rectangle(drawn, to_px((x_from, y_to)), to_px((x_to, y_from)), (120, 120, 120), 2)
    for box in (*layout.boxes, *layout.door_walls):
        outline = np.array([to_px(tuple(corner)) for corner in box.corners])
        cv2.fillConvexPoly(drawn, outline, _rgb(box.rgb), cv2.LINE_AA)
    cup_px = max(4, round(CUP_RADIUS_M * scale))
    cv2.circle(drawn, to_px(layout.cup), cup_px, _rgb(layout.cup_rgb), -1, cv2.LINE_AA)
    _label(drawn, "cup", to_px(layout.cup), cup_px)
    if layout.doorway is not None:
        cone, cone_px = to_px(layout.doorway.cone), max(4, round(CONE_RADIUS_M * scale))
        cv2.circle(drawn, cone, cone_px, _rgb(layout.doorway.cone_rgb), -1, cv2.LINE_AA)
        _label(drawn, "cone", cone, cone_px)
    if len(path) > 1:
        cv2.polylines(drawn, [np.array([to_px(point) for point in path])], False, _PATH_RGB, 2, cv2.LINE_AA)
    _draw_robot(drawn, to_px((world.pose.x_m, world.pose.y_m)), world.pose, scale)
    _draw_metre(drawn, scale)
    return drawn


def _label(drawn: np.ndarray, text: str, at: tuple[int, int], radius_px: int) -> None:
    """Write a name next to a thing, on the side away from the middle, where the robot rarely drives."""
    gap_px = radius_px + 4
    left = at[0] + gap_px if at[0] >= _SIDE_PX // 2 else at[0] - gap_px - text_width_px(text, 12)
    draw_text(drawn, text, (left, at[1] + 4), _QUIET_RGB, 12)


def _draw_robot(drawn: np.ndarray, at: tuple[int, int], pose: Pose, scale: float) -> None:
    """Draw the robot as a disc with an arrow that shows where it heads."""
    radius_px = max(_LEAST_ROBOT_PX, round(ROBOT_RADIUS_M * scale))
    cv2.circle(drawn, at, radius_px, _ROBOT_RGB, -1, cv2.LINE_AA)
    ahead = np.array([-math.sin(pose.yaw_rad), -math.cos(pose.yaw_rad)])  # of the image: x right, y down
    side = np.array([-ahead[1], ahead[0]])
    corners = (1.9 * ahead, 0.75 * side - 0.1 * ahead, 0.1 * ahead, -0.75 * side - 0.1 * ahead)
    outline = np.array([np.round(np.array(at) + radius_px * corner) for corner in corners], dtype=np.int32)
    cv2.fillPoly(drawn, [outline], HEADING_RGB, cv2.LINE_AA)


def _draw_metre(drawn: np.ndarray, scale: float) -> None:
    """Draw a bar of one metre at the lower left."""
    left, bottom = 10, _SIDE_PX - 10
    right = left + round(scale)
    cv2.line(drawn, (left, bottom), (right, bottom), _QUIET_RGB, 2)
    draw_text(drawn, "1 m", (left, bottom - 5), _QUIET_RGB, 12)


def _projection(layout: Layout):
    x_from, x_to, y_from, y_to = layout.room
    scale = (_SIDE_PX - 12) / max(x_to - x_from, y_to - y_from)
    middle_x, middle_y = (x_from + x_to) / 2.0, (y_from + y_to) / 2.0

    def to_px(point: tuple[float, float]) -> tuple[int, int]:
        return round(_SIDE_PX / 2 - (point[1] - middle_y) * scale), round(_SIDE_PX / 2 - (point[0] - middle_x) * scale)

    return to_px, scale


def _rgb(color: tuple[float, float, float]) -> tuple[int, int, int]:
    return tuple(round(255 * value) for value in color)
