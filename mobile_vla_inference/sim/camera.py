"""Cameras of a simulated robot: a plain drawn world in first person, or the images of a folder in turn.

Both cameras have one method, `frame(pose)`. The drawn world repeats every WORLD_M metres, so that a robot can drive for
hours without leaving it: a tiled floor with a lane, coloured boxes, and hills at the horizon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mobile_vla_inference.frames import list_frames, read_image
from mobile_vla_inference.sim.robot import Pose

#: Side of the square after which the world repeats, metres.
WORLD_M = 16.0

_CAMERA_HEIGHT_M = 0.35
_FIELD_OF_VIEW_RAD = math.radians(80.0)
_HORIZON = 0.42  # rows above the horizon, as a share of the image's height
_NEAR_M = 0.05

_FLOOR_PX = 2048  # side of the drawing of the floor
_PANORAMA_PX = (256, 2048)  # rows, columns of the 360 degree view above the horizon
_HAZE_M = 5.0  # distance over which the floor fades by 1 / e; it also hides the aliasing of far tiles
_HAZE_RGB = np.array([196, 205, 214], dtype=np.float32)

_BOX_COLORS = ((200, 40, 40), (40, 90, 200), (230, 160, 30), (40, 150, 70), (140, 60, 160), (30, 160, 170))
_FACE_LIGHT = (1.0, 0.8, 0.6, 0.7)  # brightness of the faces to the east, north, west and south


@dataclass(frozen=True)
class Box:
    """An upright box on the floor: centre, half side and height in metres, and its colour."""

    x_m: float
    y_m: float
    half_side_m: float
    height_m: float
    rgb: tuple[int, int, int]


class SimulatedCamera:
    """A pinhole camera that looks ahead, parallel to the floor, in a world drawn from a seed.

    Attributes:
        boxes: of the world, once per period.
    """

    def __init__(self, width: int = 320, height: int = 240, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._width, self._height = width, height
        self._focal_px = width / 2.0 / math.tan(_FIELD_OF_VIEW_RAD / 2.0)
        self._horizon_row = int(_HORIZON * height)
        self._floor = _draw_floor(rng)
        self.boxes = _place_boxes(rng)
        self._panorama = cv2.resize(_draw_panorama(rng), (_PANORAMA_PX[1], self._horizon_row))
        slope = (np.arange(width) + 0.5 - width / 2.0) / self._focal_px
        self._column_bearing_rad = -np.arctan(slope)
        rows = np.arange(self._horizon_row, height) + 0.5 - self._horizon_row
        forward_m = self._focal_px * _CAMERA_HEIGHT_M / rows
        #: Point on the floor of each pixel below the horizon, relative to the robot; metres.
        self._ahead_m = np.repeat(forward_m[:, None], width, axis=1).astype(np.float32)
        self._left_m = (-forward_m[:, None] * slope).astype(np.float32)
        haze = 1.0 - np.exp(-forward_m / _HAZE_M)
        self._clearness = np.repeat((1.0 - haze)[:, None, None], width, axis=1).repeat(3, axis=2).astype(np.float32)
        self._haze = ((1.0 - self._clearness) * _HAZE_RGB).astype(np.uint8)

    def frame(self, pose: Pose) -> np.ndarray:
        """Return the camera's image from `pose`, uint8 RGB [height, width, 3]."""
        image = np.empty((self._height, self._width, 3), dtype=np.uint8)
        bearing_rad = pose.yaw_rad + self._column_bearing_rad
        columns = np.floor(bearing_rad * (_PANORAMA_PX[1] / math.tau)).astype(np.intp) % _PANORAMA_PX[1]
        image[: self._horizon_row] = self._panorama[:, columns]
        image[self._horizon_row :] = self._seen_floor(pose)
        for box in sorted(self.boxes, key=lambda box: -math.hypot(*_offset(box, pose))):
            self._draw_box(image, box, pose)
        return image

    def _seen_floor(self, pose: Pose) -> np.ndarray:
        """Sample the drawing of the floor for every pixel below the horizon."""
        px_per_m = _FLOOR_PX / WORLD_M
        cos_px, sin_px = px_per_m * math.cos(pose.yaw_rad), px_per_m * math.sin(pose.yaw_rad)
        # The modulo keeps the coordinates exact in float32, even far from the origin.
        x_px = cos_px * self._ahead_m - sin_px * self._left_m + np.float32(pose.x_m % WORLD_M * px_per_m)
        y_px = sin_px * self._ahead_m + cos_px * self._left_m + np.float32(pose.y_m % WORLD_M * px_per_m)
        floor = cv2.remap(self._floor, x_px, y_px, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        clear = cv2.multiply(floor, self._clearness, dtype=cv2.CV_8U)
        return cv2.add(clear, self._haze)

    def _draw_box(self, image: np.ndarray, box: Box, pose: Pose) -> None:
        """Paint the sides of a box that face the camera."""
        offset = np.array(_offset(box, pose))
        cos, sin = math.cos(pose.yaw_rad), math.sin(pose.yaw_rad)
        to_robot = np.array([[cos, sin], [-sin, cos]])
        corners = np.array([[1, -1], [1, 1], [-1, 1], [-1, -1]]) * box.half_side_m + offset
        normals = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
        clearness = math.exp(-float(np.hypot(*offset)) / (2.0 * _HAZE_M))
        for face in range(4):
            edge = corners[[face, (face + 1) % 4]]
            if edge[0] @ normals[face] >= 0.0:  # faces away from the camera
                continue
            outline = self._project_wall(edge @ to_robot.T, box.height_m)
            if outline is not None:
                color = _FACE_LIGHT[face] * clearness * np.array(box.rgb) + (1.0 - clearness) * _HAZE_RGB
                cv2.fillConvexPoly(image, outline, color.tolist())

    def _project_wall(self, edge_m: np.ndarray, height_m: float) -> np.ndarray | None:
        """Project a wall over a floor edge [2, (ahead, left)] to pixels [4, 2]; None where it is behind the camera."""
        ahead = edge_m[:, 0]
        if ahead.max() <= _NEAR_M:
            return None
        if ahead.min() < _NEAR_M:
            behind = int(ahead.argmin())
            share = (_NEAR_M - ahead[behind]) / (ahead[1 - behind] - ahead[behind])
            edge_m = edge_m.copy()
            edge_m[behind] += share * (edge_m[1 - behind] - edge_m[behind])
        scale = self._focal_px / edge_m[:, 0]
        columns = self._width / 2.0 - scale * edge_m[:, 1]
        bottom = self._horizon_row + scale * _CAMERA_HEIGHT_M
        top = self._horizon_row - scale * (height_m - _CAMERA_HEIGHT_M)
        outline = [[columns[0], bottom[0]], [columns[1], bottom[1]], [columns[1], top[1]], [columns[0], top[0]]]
        return np.rint(outline).astype(np.int32)


class FolderCamera:
    """Repeat the images of a folder in the numeric order of their names; the pose doesn't matter."""

    def __init__(self, folder: Path | str) -> None:
        """List the folder; raise FrameError where it holds no image or the first can't be read."""
        self._paths = list_frames(folder)
        self._next = 0
        read_image(self._paths[0])

    def frame(self, pose: Pose) -> np.ndarray:
        """Return the next image as uint8 RGB [height, width, 3]; raise FrameError where it can't be read."""
        path = self._paths[self._next]
        self._next = (self._next + 1) % len(self._paths)
        return read_image(path)


def _offset(box: Box, pose: Pose) -> tuple[float, float]:
    """Return the offset from the robot to the nearest repetition of a box, metres in the world's axes."""
    return math.remainder(box.x_m - pose.x_m, WORLD_M), math.remainder(box.y_m - pose.y_m, WORLD_M)


def _draw_floor(rng: np.random.Generator) -> np.ndarray:
    """Draw one period of the floor from above: tiles of 1 m in mixed greys, and a lane along x that winds."""
    tiles = int(WORLD_M)
    light = np.where(np.indices((tiles, tiles)).sum(axis=0) % 2, 165, 110)[..., None]
    tints = light + rng.integers(-18, 19, (tiles, tiles, 3))
    floor = cv2.resize(tints.astype(np.uint8), (_FLOOR_PX, _FLOOR_PX), interpolation=cv2.INTER_NEAREST)
    px_per_m = _FLOOR_PX / WORLD_M
    x_m = np.linspace(0.0, WORLD_M, 257)
    middle_m = 0.8 * np.sin(math.tau * x_m / WORLD_M)
    for side_m, color in ((0.8, (245, 245, 245)), (-0.8, (245, 245, 245)), (0.0, (240, 200, 40))):
        for repetition_m in (0.0, WORLD_M):
            line = np.stack([x_m, middle_m + side_m + repetition_m], axis=1) * px_per_m
            cv2.polylines(floor, [np.rint(line).astype(np.int32)], False, color, thickness=12, lineType=cv2.LINE_AA)
    return floor


def _draw_panorama(rng: np.random.Generator) -> np.ndarray:
    """Draw the 360 degree view above the horizon: sky, and hills whose outline is continuous around it."""
    rows, columns = _PANORAMA_PX
    sky = np.linspace([120, 165, 215], _HAZE_RGB, rows)
    panorama = np.repeat(sky[:, None], columns, axis=1).astype(np.uint8)
    turn = np.linspace(0.0, math.tau, columns, endpoint=False)
    for color, height in (((150, 165, 175), 0.36), ((95, 125, 105), 0.22)):
        waves = sum(np.sin(n * turn + rng.uniform(0.0, math.tau)) / n for n in range(2, 12))
        outline = rows * (1.0 - height * (0.55 + 0.3 * waves))
        panorama[np.arange(rows)[:, None] >= outline] = color
    return panorama


def _place_boxes(rng: np.random.Generator) -> list[Box]:
    """Place one box of each colour next to the lane, spread along it."""
    boxes = []
    for index, rgb in enumerate(_BOX_COLORS):
        x_m = 2.5 + (index + rng.uniform(-0.25, 0.25)) * WORLD_M / len(_BOX_COLORS)
        side = 1.0 if index % 2 else -1.0
        y_m = 0.8 * math.sin(math.tau * x_m / WORLD_M) + side * rng.uniform(1.4, 2.6)
        boxes.append(Box(x_m, y_m, rng.uniform(0.2, 0.4), rng.uniform(0.5, 1.1), rgb))
    return boxes
