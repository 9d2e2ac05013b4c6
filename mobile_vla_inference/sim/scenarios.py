"""What stands where, and what the robot is told: layouts and instructions, each drawn from a seed.

A scenario is one or two boxes between the robot and a cup, and the side on which to pass them: the eight of the
original data, `{1box,2box}_{vert,hori}_{left,right}`, and eight that need a memory, `..._cone_{left,right}`: there the
boxes stand behind a doorway, a cone beside it shows the side, and behind the doorway the cone is out of sight. Metres
and radians by REP-103: the robot starts at the origin and looks along x, y is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from mobile_vla_inference.sim.robot import Pose

SIDES = ("left", "right")
SCENARIOS = tuple(
    f"{boxes}_{shape}_{cue}{side}"
    for cue in ("", "cone_")
    for boxes in ("1box", "2box")
    for shape in ("vert", "hori")
    for side in SIDES
)

Rgb = tuple[float, float, float]

CUP_RADIUS_M = 0.08
CUP_HEIGHT_M = 0.2
CONE_RADIUS_M = 0.1
CONE_HEIGHT_M = 0.35
DOOR_HEIGHT_M = 1.2
_DOOR_HALF_THICKNESS_M = 0.05
#: Boxes and cup stand as far behind a doorway as else behind a start that lies so far before it.
_DOORWAY_BEFORE_M = 0.1
#: Seeds of the worlds that training may draw lie below; those of evaluation from here on.
EVALUATION_SEEDS_FROM = 1_000_000

# Phrases of training, by language; {box} and {cup} are replaced, {left} by the side to pass on, {right} by the other.
_BOX_WORDS = {"en": ("box", "crate", "block", "obstacle"), "ko": ("박스", "상자", "장애물")}
_CUP_WORDS = {"en": ("cup", "mug"), "ko": ("컵", "머그컵")}
_SIDE_WORDS = {"en": {"left": "left", "right": "right"}, "ko": {"left": "왼쪽", "right": "오른쪽"}}
_PHRASES = {
    "en": (
        "Go around the {box} on the {side} to the {cup}",
        "Go around the {box} to the {side} and drive to the {cup}",
        "Pass the {box} on the {side} and go to the {cup}",
        "Drive to the {cup}, passing the {box} on the {side}",
        "Take the {side} side of the {box} to reach the {cup}",
        "Keep {side} of the {box} and stop at the {cup}",
        "Reach the {cup} by going {side} around the {box}",
        "Avoid the {box} on its {side} side, then go to the {cup}",
        "Move to the {cup} around the {side} of the {box}",
        "{side} around the {box}, then to the {cup}",
        "Please go past the {box} on the {side} and on to the {cup}",
        "On the {side} of the {box}, drive to the {cup}",
        "Head for the {cup} and leave the {box} by its {side} side",
        "Turn {side} at the {box} and go to the {cup}",
        "Get to the {cup}; use the {side} side",
        "{side} side, please: go to the {cup}",
        "Steer {side} of the {box} and find the {cup}",
        "Go {side}",
    ),
    "ko": (
        "{box}를 {side}으로 돌아서 {cup}까지 가세요",
        "{box}를 {side}으로 돌아 {cup}으로 가 주세요",
        "{side}으로 {box}를 피해서 {cup}까지 이동하세요",
        "{box}의 {side}으로 지나서 {cup} 앞까지 가세요",
        "{cup}까지 가세요, {box}는 {side}으로 피하세요",
        "{box} {side}으로 돌아서 {cup}에 가",
        "{side}으로 돌아가서 {cup} 앞에 멈추세요",
        "{box}를 {side}으로 비켜서 {cup}까지 주행해",
        "{box} {side} 길로 {cup}까지 가 주십시오",
        "{cup}으로 이동, {box}는 {side}으로 통과",
        "{box}를 피해 {side}으로 가서 {cup}을 찾으세요",
        "{side}으로 우회해서 {cup}까지 가세요",
        "{box} 앞에서 {side}으로 꺾어 {cup}까지 가세요",
        "{cup}이 보일 때까지 {box} {side}으로 도세요",
        "{side}으로 가세요",
        "로봇아, {box}를 {side}으로 돌아서 {cup}까지 가",
        "{side} 방향으로 {box}를 돌아 {cup}에 도착하세요",
    ),
}
# The same where a cone shows the side: {where} is on its side, or on the other.
_WHERE_WORDS = {
    "en": {
        True: ("on the side of the cone", "on the cone's side", "on the same side as the cone", "where the cone was"),
        False: (
            "on the side without the cone",
            "on the side opposite the cone",
            "on the other side than the cone",
            "where no cone was",
        ),
    },
    "ko": {
        True: ("콘이 있는 쪽으로", "콘 쪽으로", "콘이 있던 쪽으로", "콘과 같은 쪽으로"),
        False: ("콘이 없는 쪽으로", "콘 반대쪽으로", "콘이 없던 쪽으로", "콘과 다른 쪽으로"),
    },
}
_CONE_PHRASES = {
    "en": (
        "Go around the {box} {where} to the {cup}",
        "Pass the {box} {where} and go to the {cup}",
        "Drive to the {cup}, passing the {box} {where}",
        "Go through the door, then round the {box} {where}",
        "Avoid the {box} {where}, then go to the {cup}",
        "Behind the door, drive {where} to the {cup}",
        "Go {where}",
    ),
    "ko": (
        "{box}를 {where} 돌아서 {cup}까지 가세요",
        "{where} {box}를 피해서 {cup}까지 이동하세요",
        "{cup}까지 가세요, {box}는 {where} 피하세요",
        "문을 지나 {where} {box}를 돌아서 가세요",
        "{box}를 {where} 지나서 {cup} 앞까지 가세요",
        "문을 지나서 {where} {cup}까지 가",
        "{where} 가세요",
    ),
}
#: Never used in training: what `mobile_vla drive --unseen-phrasing` says.
UNSEEN_PHRASES = (
    "Navigate to the {cup} while keeping to the {side} side of the {box}",
    "Circle the {box} on the {side} until you are at the {cup}",
    "The {cup} is behind the {box}: approach it from the {side}",
    "Slowly drive {side} past the {box} and park at the {cup}",
    "I want you to go {side} round the {box}, over to the {cup}",
    "{box}를 {side}으로 우회하여 {cup} 쪽으로 이동해 주세요",
    "{side}으로 {box}를 지나쳐 {cup} 앞에 서세요",
    "천천히 {box} {side}을 지나 {cup}까지 가 주세요",
    "{box} 뒤에 있는 {cup}까지 {side}으로 돌아서 가 줘",
    "저기 {cup}까지 {side} 방향으로 돌아가 주세요",
)
UNSEEN_CONE_PHRASES = (
    "Navigate to the {cup} and pass the {box} {where}",
    "Circle the {box} {where} until you are at the {cup}",
    "I want you to drive {where} round the {box}, over to the {cup}",
    "{box}를 {where} 우회하여 {cup} 쪽으로 이동해 주세요",
    "{where} {box}를 지나쳐 {cup} 앞에 서세요",
    "{box} 뒤에 있는 {cup}까지 {where} 돌아서 가 줘",
)
#: The sentence of the original data; what the demo and the figures without a phrasing use.
CANONICAL_PHRASES = {
    "en": "Go around the {box} on the {side} to the {cup}",
    "ko": "{box}를 {side}으로 돌아서 {cup}까지 가세요",
}
_CANONICAL_CONE_PHRASES = {
    "en": "Go around the {box} {where} to the {cup}",
    "ko": "{box}를 {where} 돌아서 {cup}까지 가세요",
}


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
    """An opening in a wall across the room, and a cone on the near side of the wall, beside the opening.

    Attributes:
        x_m, y_m: the opening's middle.
        half_width_m: from there to either end of the wall.
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
    """How the camera sees: what colours and pictures go through.

    Attributes:
        direction_rad: where the light comes from.
        contrast: how much darker a wall away from the light is, 0 to 1.
        gain: factor on each channel.
        noise_std: noise of the sensor, in steps of 255.
        blur_px: width of the lens blur; 0 for none.
    """

    direction_rad: float
    contrast: float
    gain: Rgb
    noise_std: float
    blur_px: int


@dataclass(frozen=True)
class Layout:
    """One world: everything that the renderer, the physics and the expert need to know.

    Attributes:
        scenario: one of SCENARIOS; its side is the one to pass on.
        seed: what it was drawn from.
        start: where the robot begins.
        boxes: one or two; passed as a group.
        cup: its place on the floor, x and y.
        cup_rgb: its colour.
        room: x from, x to, y from, y to of the walls.
        wall_rgb, floor_rgb: colours of the four walls (ahead, left, behind, right), and of the two kinds of tiles.
        light: the light and the camera.
        delay_s: seconds from a command to its effect.
        doorway: what the robot has to pass first; None for nothing.
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
        return self.scenario.rpartition("_")[2]

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


def other_side(scenario: str) -> str:
    """Return the same scenario with the instruction of the other side."""
    stem, _, side = scenario.rpartition("_")
    return f"{stem}_{'right' if side == 'left' else 'left'}"


def draw_layout(scenario: str, seed: int) -> Layout:
    """Draw a world of a scenario. The same seed gives the same world; the side to pass on changes nothing in it."""
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


def instruction(scenario: str, seed: int, phrasing: str = "training", language: str | None = None) -> str:
    """Return what the robot is told in a scenario.

    Args:
        scenario: one of SCENARIOS.
        seed: draws the language and the words.
        phrasing: `training`, `unseen` (never trained on), or `canonical` (the sentence of the original data).
        language: `en` or `ko`; None: drawn.
    """
    rng = np.random.default_rng([seed, 1])
    by_cone = _is_by_cone(scenario)
    if phrasing == "unseen":
        phrase = str(rng.choice(UNSEEN_CONE_PHRASES if by_cone else UNSEEN_PHRASES))
        language = "en" if phrase.isascii() else "ko"
    else:
        language = language or str(rng.choice(["en", "ko"]))
        phrases = (_CONE_PHRASES if by_cone else _PHRASES)[language]
        canonical = (_CANONICAL_CONE_PHRASES if by_cone else CANONICAL_PHRASES)[language]
        phrase = canonical if phrasing == "canonical" else str(rng.choice(phrases))
    plain = phrasing == "canonical"
    box = _BOX_WORDS[language][0] if plain else str(rng.choice(_BOX_WORDS[language]))
    cup = _CUP_WORDS[language][0] if plain else str(rng.choice(_CUP_WORDS[language]))
    if language == "en" and scenario.startswith("2box"):
        box = {"box": "boxes"}.get(box, f"{box}s")
    side = scenario.rpartition("_")[2]
    wheres = _WHERE_WORDS[language][_cone_side(seed) == side]
    where = wheres[0] if plain else str(rng.choice(wheres))
    text = phrase.format(box=box, cup=cup, side=_SIDE_WORDS[language][side], where=where)
    if language == "ko":
        return _with_particles(text)
    text = text[0].upper() + text[1:]
    if phrasing == "training":  # people write as they like
        text = [text, text.lower(), text + ".", text + "!"][rng.choice(4, p=[0.5, 0.2, 0.2, 0.1])]
    return text


def training_sentences() -> list[str]:
    """Return every sentence of the training phrases, for the tokenizers."""
    return [
        _with_particles(phrase.format(box=box, cup=cup, side=side, where=where))
        for language in _PHRASES
        for box in _BOX_WORDS[language]
        for cup in _CUP_WORDS[language]
        for phrases, sides, wheres in (
            (_PHRASES, _SIDE_WORDS[language].values(), [""]),
            (_CONE_PHRASES, [""], chain.from_iterable(_WHERE_WORDS[language].values())),
        )
        for where in wheres
        for side in sides
        for phrase in phrases[language]
    ]


def with_unknown_word(text: str, rng: np.random.Generator) -> str:
    """Return a sentence with a made-up word in it, from which a learner learns to hear past what it doesn't know."""
    if text.isascii():
        word = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 9)))
    else:
        word = "".join(chr(code) for code in rng.integers(0xAC00, 0xD7A4, rng.integers(1, 4)))  # syllables of Hangul
    words = text.split(" ")
    words.insert(int(rng.integers(0, len(words) + 1)), word)
    return " ".join(words)


def _is_by_cone(scenario: str) -> bool:
    """Tell whether a cone shows the side in a scenario, and not the instruction."""
    return "_cone_" in scenario


def _cone_side(seed: int) -> str:
    return SIDES[np.random.default_rng([seed, 5]).integers(2)]


def _draw_doorway(scenario: str, seed: int) -> Doorway | None:
    if not _is_by_cone(scenario):
        return None
    rng = np.random.default_rng([seed, SCENARIOS.index(scenario) // 2, 7])
    return Doorway(
        x_m=rng.uniform(2.0, 2.4),
        y_m=rng.uniform(-0.1, 0.1),
        half_width_m=rng.uniform(0.42, 0.5),
        cone_side=_cone_side(seed),
        wall_rgb=_muted(rng),
        cone_rgb=_vivid(rng, hue=rng.uniform(0.03, 0.07)),
    )


def _with_particles(text: str) -> str:
    """Put the Korean particles right after a consonant: 장애물를 becomes 장애물을."""
    for wrong, right in (("장애물를", "장애물을"), ("장애물는", "장애물은")):
        text = text.replace(wrong, right)
    return text


def _draw_boxes(rng: np.random.Generator, count: str, shape: str) -> tuple[BoxOnFloor, ...]:
    """Draw one long box, or two beside or behind each other; `vert` runs along the robot's way, `hori` across it."""
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
    """Place the cup behind the boxes, in their shadow as the robot sees it from its start."""
    bearings = np.arctan2(corners[:, 1], corners[:, 0])
    x_m = corners[:, 0].max() + rng.uniform(0.75, 1.3)
    low, high = bearings.min(), bearings.max()
    margin = 0.25 * (high - low)
    return float(x_m), float(x_m * math.tan(rng.uniform(low + margin, high - margin)))


def _vivid(rng: np.random.Generator, hue: float) -> Rgb:
    return _rgb(hue % 1.0, rng.uniform(0.65, 1.0), rng.uniform(0.55, 0.95))


def _muted(rng: np.random.Generator) -> Rgb:
    return _rgb(rng.uniform(), rng.uniform(0.0, 0.25), rng.uniform(0.35, 0.9))


def _rgb(hue: float, saturation: float, value: float) -> Rgb:
    """Convert a colour from hue, saturation and value, each 0 to 1."""
    channels = (abs((hue * 6.0 + shift) % 6.0 - 3.0) - 1.0 for shift in (0.0, 4.0, 2.0))
    return tuple(value * (1.0 - saturation + saturation * min(max(each, 0.0), 1.0)) for each in channels)
