"""The camera's images of a layout, drawn by Panda3D's software renderer: no GPU, no display.

One Renderer is enough for many worlds: each is its own scene, and all share one image buffer. Panda3D is imported when
a Renderer is made, so that code without images runs without it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import cv2
import numpy as np

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.sim.layout import (
    CONE_HEIGHT_M,
    CONE_RADIUS_M,
    CUP_HEIGHT_M,
    CUP_RADIUS_M,
    BoxOnFloor,
    Layout,
    Rgb,
)
from mobile_vla_inference.sim.robot import Pose

if TYPE_CHECKING:
    from panda3d.core import NodePath

#: Side of the camera's square image, pixels.
FRAME_PX = 224
FIELD_OF_VIEW_DEG = 60.0
#: Position of the camera: ahead of the robot's centre, and above the floor.
CAMERA_AHEAD_M = 0.12
CAMERA_HEIGHT_M = 0.28

_CONFIGURATION = """
load-display p3tinydisplay
window-type offscreen
audio-library-name null
notify-level-display fatal
notify-level-x11display fatal
notify-level-tinydisplay error
textures-power-2 none
"""
_NEAR_M, _FAR_M = 0.03, 30.0
_TILE_M = 0.5
_WALL_HEIGHT_M = 1.2
_ROUND_SIDES = 10
_NOISE_BANK_PX = 512


class SimulatorError(MobileVlaError):
    """The world can't be drawn here."""


class Renderer:
    """An image buffer and its camera.

    Attributes:
        core: the module panda3d.core.
        size_px: side of the images.
    """

    def __init__(self, size_px: int = FRAME_PX) -> None:
        """Open the buffer; raise SimulatorError where Panda3D is missing or can't draw."""
        try:
            from panda3d import core
        except ImportError as error:
            raise SimulatorError(
                f"Panda3D can't be imported ({error}), expected the version in requirements/world.txt; "
                f"install it with pip install -r requirements/world.txt"
            ) from error
        self.core = core
        self.size_px = size_px
        core.load_prc_file_data("", _CONFIGURATION)
        pipe = core.GraphicsPipeSelection.get_global_ptr().make_module_pipe("p3tinydisplay")
        self._engine = core.GraphicsEngine.get_global_ptr()
        properties = core.FrameBufferProperties()
        properties.set_rgb_color(True)
        properties.set_depth_bits(24)
        size = core.WindowProperties.size(size_px, size_px)
        refuse_window = core.GraphicsPipe.BF_refuse_window
        self._buffer = pipe and self._engine.make_output(pipe, "camera", 0, properties, size, refuse_window)
        if not self._buffer:
            raise SimulatorError(
                "Panda3D has no software renderer here, expected p3tinydisplay, which its wheel for Linux contains; "
                "install the wheel"
            )
        self._texture = core.Texture()
        self._buffer.add_render_texture(self._texture, core.GraphicsOutput.RTM_copy_ram)
        lens = core.PerspectiveLens()
        lens.set_fov(FIELD_OF_VIEW_DEG, FIELD_OF_VIEW_DEG)
        lens.set_near_far(_NEAR_M, _FAR_M)
        self._camera = core.NodePath(core.Camera("camera", lens))
        region = self._buffer.make_display_region()
        region.set_camera(self._camera)

    def scene(self, layout: Layout) -> Scene:
        """Build the scene of a layout."""
        return Scene(self, layout)

    def close(self) -> None:
        """Free the buffer."""
        self._engine.remove_window(self._buffer)

    def draw(self, root: NodePath, sky: Rgb, pose: Pose) -> np.ndarray:
        """Draw the nodes below `root` from the camera of a robot at `pose`; uint8 RGB [size, size, 3]."""
        cos, sin = math.cos(pose.yaw_rad), math.sin(pose.yaw_rad)
        self._buffer.set_clear_color((*sky, 1.0))
        self._camera.reparent_to(root)
        self._camera.set_pos(pose.x_m + CAMERA_AHEAD_M * cos, pose.y_m + CAMERA_AHEAD_M * sin, CAMERA_HEIGHT_M)
        self._camera.set_h(math.degrees(pose.yaw_rad) - 90.0)  # Panda3D's cameras look along y
        self._engine.render_frame()
        bgra = np.frombuffer(self._texture.get_ram_image(), np.uint8).reshape(self.size_px, self.size_px, -1)
        return cv2.cvtColor(cv2.flip(bgra, 0), cv2.COLOR_BGRA2RGB)


class Scene:
    """A layout as the camera sees it."""

    def __init__(self, renderer: Renderer, layout: Layout) -> None:
        self._renderer = renderer
        self._layout = layout
        self._rng = np.random.default_rng([layout.seed, 2])
        self._root = renderer.core.NodePath("scene")
        light = layout.light
        self._sky = _shaded((0.92, 0.93, 0.95), light.gain)
        quads = [*_floor(layout), *_walls(layout)]
        for box in (*layout.boxes, *layout.door_walls):
            quads += _box(box, layout)
        quads += _round(layout, layout.cup, CUP_RADIUS_M, CUP_RADIUS_M, CUP_HEIGHT_M, layout.cup_rgb)
        if layout.doorway is not None:
            door = layout.doorway
            quads += _round(layout, door.cone, CONE_RADIUS_M, 0.01, CONE_HEIGHT_M, door.cone_rgb)
        self._root.attach_new_node(_geometry(renderer.core, quads))

    def frame(self, pose: Pose) -> np.ndarray:
        """Return the camera's image from a pose, uint8 RGB [size, size, 3], with its blur and noise."""
        image = self._renderer.draw(self._root, self._sky, pose)
        light = self._layout.light
        if light.blur_px:
            image = cv2.GaussianBlur(image, (light.blur_px, light.blur_px), 0)
        if light.noise_std:
            top, left = self._rng.integers(0, _NOISE_BANK_PX - image.shape[0], 2)
            noise = _noise_bank(light.noise_std)[top : top + image.shape[0], left : left + image.shape[1]]
            image = cv2.add(image, noise, dtype=cv2.CV_8U)
        return image

    def close(self) -> None:
        """Free the geometry."""
        self._root.remove_node()


_Quad = tuple[np.ndarray, Rgb]  # corners [4, 3] in metres, colour in the image

_banks: dict[float, np.ndarray] = {}


def _noise_bank(std: float) -> np.ndarray:
    """Return noise of which each image takes a random part: new noise would cost more than the image itself."""
    if std not in _banks:
        rng = np.random.default_rng(0)
        noise = rng.normal(0.0, std, (_NOISE_BANK_PX, _NOISE_BANK_PX, 3))
        _banks[std] = noise.round().astype(np.int16)
    return _banks[std]


def _geometry(core: object, quads: list[_Quad]) -> object:
    """Turn quads into one node."""
    vertices = np.empty(4 * len(quads), dtype=[("position", "<f4", 3), ("rgba", "u1", 4)])
    vertices["position"] = np.concatenate([quad for quad, _ in quads])
    rgba = np.array([(*rgb, 1.0) for _, rgb in quads])
    vertices["rgba"] = np.repeat((rgba * 255.0).round().astype(np.uint8), 4, axis=0)
    first = 4 * np.arange(len(quads), dtype=np.uint16)[:, None]
    indices = (first + np.array([0, 1, 2, 0, 2, 3], dtype=np.uint16)).ravel()
    data = core.GeomVertexData("quads", core.GeomVertexFormat.get_v3c4(), core.Geom.UH_static)
    data.unclean_set_num_rows(len(vertices))
    memoryview(data.modify_array(0)).cast("B")[:] = vertices.tobytes()
    triangles = core.GeomTriangles(core.Geom.UH_static)
    index_array = triangles.modify_vertices()
    index_array.unclean_set_num_rows(len(indices))
    memoryview(index_array).cast("B")[:] = indices.tobytes()
    geom = core.Geom(data)
    geom.add_primitive(triangles)
    node = core.GeomNode("quads")
    node.add_geom(geom)
    node.set_attrib(core.CullFaceAttrib.make(core.CullFaceAttrib.M_cull_none))
    return node


def _shaded(rgb: Rgb, gain: Rgb, brightness: float = 1.0) -> Rgb:
    """Return a colour in the image, after light and gain, 0 to 1."""
    return tuple(min(1.0, value * factor * brightness) for value, factor in zip(rgb, gain))


def _upright(a: tuple[float, float], b: tuple[float, float], height_m: float) -> np.ndarray:
    return np.array([(*a, 0.0), (*b, 0.0), (*b, height_m), (*a, height_m)])


def _brightness(layout: Layout, normal_rad: float) -> float:
    """Return the brightness of a face by the direction of its normal."""
    away = 0.5 * (1.0 - math.cos(normal_rad - layout.light.direction_rad))
    return 1.0 - layout.light.contrast * away


def _floor(layout: Layout) -> list[_Quad]:
    x_from, x_to, y_from, y_to = layout.room
    columns = np.append(np.arange(x_from, x_to, _TILE_M), x_to)
    rows = np.append(np.arange(y_from, y_to, _TILE_M), y_to)
    colors = [_shaded(rgb, layout.light.gain) for rgb in layout.floor_rgb]
    return [
        (np.array([(x, y, 0.0), (x1, y, 0.0), (x1, y1, 0.0), (x, y1, 0.0)]), colors[(i + j) % 2])
        for i, (x, x1) in enumerate(pairwise(columns))
        for j, (y, y1) in enumerate(pairwise(rows))
    ]


def _walls(layout: Layout) -> list[_Quad]:
    x_from, x_to, y_from, y_to = layout.room
    corners = [(x_to, y_from), (x_to, y_to), (x_from, y_to), (x_from, y_from)]
    quads = []
    for index, rgb in enumerate(layout.wall_rgb):
        a, b = corners[index], corners[(index + 1) % 4]
        bright = _brightness(layout, math.pi + index * math.pi / 2.0)
        quads.append((_upright(a, b, _WALL_HEIGHT_M), _shaded(rgb, layout.light.gain, bright)))
    return quads


def _box(box: BoxOnFloor, layout: Layout) -> list[_Quad]:
    corners = [tuple(corner) for corner in box.corners.tolist()]
    quads = []
    for index in range(4):
        a, b = corners[index], corners[(index + 1) % 4]
        normal_rad = math.atan2(b[1] - a[1], b[0] - a[0]) - math.pi / 2.0
        color = _shaded(box.rgb, layout.light.gain, _brightness(layout, normal_rad))
        quads.append((_upright(a, b, box.height_m), color))
    top = np.array([(*corner, box.height_m) for corner in corners])
    return [*quads, (top, _shaded(box.rgb, layout.light.gain))]


def _round(
    layout: Layout, centre: tuple[float, float], foot_m: float, top_m: float, height_m: float, rgb: Rgb
) -> list[_Quad]:
    """Build a cup or a cone, by its radius at the foot and at the top."""
    turns = [math.tau * index / _ROUND_SIDES for index in range(_ROUND_SIDES + 1)]
    x, y = centre
    rings = [
        [(x + radius * math.cos(turn), y + radius * math.sin(turn), z) for turn in turns]
        for radius, z in ((foot_m, 0.0), (top_m, height_m))
    ]
    feet, tops = rings
    return [
        (
            np.array([feet[index], feet[index + 1], tops[index + 1], tops[index]]),
            _shaded(rgb, layout.light.gain, _brightness(layout, (turns[index] + turns[index + 1]) / 2.0)),
        )
        for index in range(_ROUND_SIDES)
    ]
