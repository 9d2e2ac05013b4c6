"""Layouts: what stands where in a world, how it looks, and how the camera sees it; each is drawn from a seed.

Metres and radians by REP-103: the robot starts at the origin and looks along x, y is left.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, replace

import numpy as np

from mobile_vla_inference.sim.robot import Pose
from mobile_vla_inference.sim.scenarios import SCENARIOS, cone_side, is_by_cone, side_of

#: Red, green and blue, 0 to 1.
Rgb = tuple[float, float, float]

CUP_RADIUS_M = 0.08
CUP_HEIGHT_M = 0.2
CONE_RADIUS_M = 0.1
CONE_HEIGHT_M = 0.35
DOOR_HEIGHT_M = 1.2
_DOOR_HALF_THICKNESS_M = 0.05
#: Boxes and cup are placed as if the robot started this far before the doorway.
_DOORWAY_BEFORE_M = 0.1


@dataclass(frozen=True)
class BoxOnFloor:
    """An upright box: centre, half sides along its own axes, turn, height, and its colour (0 to 1)."""

    x_m: float
    y_m: float
    half_x_m: float
    half_y_m: float
    yaw_rad: float
    height_m: float
    rgb: Rgb

    @property
    def corners(self) -> np.ndarray:
        """The four corners on the floor, counter-clockwise, [4, 2]."""
        cos, sin = math.cos(self.yaw_rad), math.sin(self.yaw_rad)
        local = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * (self.half_x_m, self.half_y_m)
        return local @ np.array([[cos, sin], [-sin, cos]]) + (self.x_m, self.y_m)


@dataclass(frozen=True)
class Doorway:
    """An opening in a wall across the room, and a cone in front of the wall, next to the opening.

    Attributes:
        x_m, y_m: the opening's middle.
        half_width_m: from the middle to either wall.
        cone_side: where the cone stands, one of SIDES.
        wall_rgb, cone_rgb: colours.
    """

    x_m: float
    y_m: float
    half_width_m: float
    cone_side: str
    wall_rgb: Rgb
    cone_rgb: Rgb

    @property
    def cone(self) -> tuple[float, float]:
        """The cone's place on the floor, x and y."""
        aside_m = self.half_width_m + 1.2 * CONE_RADIUS_M
        x_m = self.x_m - _DOOR_HALF_THICKNESS_M - CONE_RADIUS_M
        return x_m, self.y_m + (aside_m if self.cone_side == "left" else -aside_m)


@dataclass(frozen=True)
class Light:
    """How colours and images are changed before the robot gets them.

    Attributes:
        direction_rad: where the light comes from.
        contrast: how much darker a wall away from the light is, 0 to 1.
        gain: factor on each channel.
        noise_std: noise of the sensor, in steps of 1/255.
        blur_px: width of the lens blur; 0 for none.
    """

    direction_rad: float
    contrast: float
    gain: Rgb
    noise_std: float
    blur_px: int


@dataclass(frozen=True)
class Layout:
    """One world, for the renderer, the physics and the expert.

    Attributes:
        scenario: one of SCENARIOS.
        seed: that it was drawn from.
        start: where the robot begins.
        boxes: one or two; passed as a group.
        cup: its place on the floor, x and y.
        cup_rgb: its colour.
        room: x from, x to, y from, y to of the walls.
        wall_rgb, floor_rgb: colours of the four walls (ahead, left, behind, right), and of the two kinds of tiles.
        light: the light and the camera.
        delay_s: seconds from a command to its effect.
        doorway: that the robot has to pass first; None without one.
    """

    scenario: str
    seed: int
    start: Pose
    boxes: tuple[BoxOnFloor, ...]
    cup: tuple[float, float]
    cup_rgb: Rgb
    room: tuple[float, float, float, float]
    wall_rgb: tuple[Rgb, Rgb, Rgb, Rgb]
    floor_rgb: tuple[Rgb, Rgb]
    light: Light
    delay_s: float
    doorway: Doorway | None = None

    @property
    def side(self) -> str:
        """The side on which to pass the boxes, `left` or `right`."""
        return side_of(self.scenario)

    @property
    def door_walls(self) -> tuple[BoxOnFloor, ...]:
        """The walls on the right and on the left of the doorway, as boxes."""
        if self.doorway is None:
            return ()
        door = self.doorway
        ends = (self.room[2], door.y_m - door.half_width_m), (door.y_m + door.half_width_m, self.room[3])
        return tuple(
            BoxOnFloor(
                door.x_m,
                (low + high) / 2.0,
                _DOOR_HALF_THICKNESS_M,
                (high - low) / 2.0,
                0.0,
                DOOR_HEIGHT_M,
                door.wall_rgb,
            )
            for low, high in ends
        )


def draw_layout(scenario: str, seed: int) -> Layout:
    """Draw a world of a scenario. The same seed gives the same world, whatever the side to pass on.

    Raises:
        ValueError: there is no such scenario.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario is {scenario!r}, expected one of {', '.join(SCENARIOS)}")
    count, shape, *_ = scenario.split("_")
    rng = np.random.default_rng([seed, SCENARIOS.index(scenario) // 2])
    boxes = _draw_boxes(rng, count, shape)
    corners = np.concatenate([box.corners for box in boxes])
    cup = _draw_cup(rng, corners)
    doorway = _draw_doorway(scenario, seed)
    if doorway is not None:
        ahead_m, aside_m = doorway.x_m - _DOORWAY_BEFORE_M, doorway.y_m
        boxes = tuple(replace(box, x_m=box.x_m + ahead_m, y_m=box.y_m + aside_m) for box in boxes)
        corners += (ahead_m, aside_m)
        cup = (cup[0] + ahead_m, cup[1] + aside_m)
    low, high = corners.min(axis=0), corners.max(axis=0)
    room = (
        -rng.uniform(0.8, 2.5),
        cup[0] + rng.uniform(1.0, 3.0),
        low[1] - rng.uniform(1.3, 3.0),
        high[1] + rng.uniform(1.3, 3.0),
    )
    floor = _muted(rng)
    tint = rng.uniform(-0.06, 0.06)
    light = Light(
        direction_rad=rng.uniform(-math.pi, math.pi),
        contrast=rng.uniform(0.1, 0.4),
        gain=tuple(rng.uniform(0.7, 1.15) * rng.uniform(0.94, 1.06, 3)),
        noise_std=float(rng.choice([0.0, 3.0, 6.0, 10.0])),
        blur_px=int(rng.choice([0, 0, 3, 5])),
    )
    return Layout(
        scenario=scenario,
        seed=seed,
        start=Pose(0.0, 0.0, rng.uniform(-0.2, 0.2)),
        boxes=boxes,
        cup=cup,
        cup_rgb=_vivid(rng, hue=rng.uniform(0.11, 0.17)),
        room=room,
        wall_rgb=tuple(_muted(rng) for _ in range(4)),
        floor_rgb=(floor, tuple(np.clip(np.array(floor) + tint, 0.0, 1.0))),
        light=light,
        delay_s=rng.uniform(0.0, 0.15),
        doorway=doorway,
    )


def _draw_doorway(scenario: str, seed: int) -> Doorway | None:
    if not is_by_cone(scenario):
        return None
    rng = np.random.default_rng([seed, SCENARIOS.index(scenario) // 2, 7])
    return Doorway(
        x_m=rng.uniform(2.0, 2.4),
        y_m=rng.uniform(-0.1, 0.1),
        half_width_m=rng.uniform(0.42, 0.5),
        cone_side=cone_side(seed),
        wall_rgb=_muted(rng),
        cone_rgb=_vivid(rng, hue=rng.uniform(0.03, 0.07)),
    )


def _draw_boxes(rng: np.random.Generator, count: str, shape: str) -> tuple[BoxOnFloor, ...]:
    """Draw one long box, or two in a row; `vert` is along the robot's path, `hori` across it."""
    along = np.array([1.0, 0.0]) if shape == "vert" else np.array([0.0, 1.0])
    middle = np.array([rng.uniform(1.6, 2.3), rng.uniform(-0.25, 0.25)])
    if count == "1box":
        halves = rng.uniform(0.12, 0.2), rng.uniform(0.25, 0.4)
        half_x, half_y = halves[::-1] if shape == "vert" else halves
        return (_draw_box(rng, middle, half_x, half_y),)
    first, second = rng.uniform(0.13, 0.2, 2)
    gap = rng.uniform(0.06, 0.16)
    shift = np.array([-along[1], along[0]]) * rng.uniform(-0.08, 0.08)
    return (
        _draw_box(rng, middle - along * (first + gap / 2) + shift, first, first),
        _draw_box(rng, middle + along * (second + gap / 2) - shift, second, second),
    )


def _draw_box(rng: np.random.Generator, centre: np.ndarray, half_x: float, half_y: float) -> BoxOnFloor:
    return BoxOnFloor(
        float(centre[0]),
        float(centre[1]),
        half_x,
        half_y,
        rng.uniform(-0.2, 0.2),
        rng.uniform(0.4, 0.7),
        _vivid(rng, hue=rng.uniform(0.25, 1.08)),
    )


def _draw_cup(rng: np.random.Generator, corners: np.ndarray) -> tuple[float, float]:
    """Place the cup behind the boxes, where they hide it from the robot's start."""
    bearings = np.arctan2(corners[:, 1], corners[:, 0])
    x_m = corners[:, 0].max() + rng.uniform(0.75, 1.3)
    low, high = bearings.min(), bearings.max()
    margin = 0.25 * (high - low)
    return float(x_m), float(x_m * math.tan(rng.uniform(low + margin, high - margin)))


def _vivid(rng: np.random.Generator, hue: float) -> Rgb:
    return colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.65, 1.0), rng.uniform(0.55, 0.95))


def _muted(rng: np.random.Generator) -> Rgb:
    return colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.0, 0.25), rng.uniform(0.35, 0.9))
