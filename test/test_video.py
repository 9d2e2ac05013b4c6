"""The video of `mobile_vla drive`: what each frame shows, and letters for Korean."""

from __future__ import annotations

import math
import os
import resource
from dataclasses import replace as changed
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from mobile_vla_inference import lettering
from mobile_vla_inference.action import VelocityCommand
from mobile_vla_inference.control.overlay import draw_command
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.sim import video
from mobile_vla_inference.sim.layout import draw_layout
from mobile_vla_inference.sim.robot import Pose
from mobile_vla_inference.sim.world import World

KOREAN = "박스를 왼쪽으로 돌아서 컵까지 가세요"
COMMAND = VelocityCommand(0.4, 0.1, -0.5)
BLACK = np.zeros((224, 224, 3), np.uint8)


@pytest.fixture
def world() -> World:
    return World(draw_layout("1box_vert_cone_left", 1_000_000))


@pytest.fixture
def old_opencv(monkeypatch):
    """An OpenCV without FontFace and without fonts."""
    monkeypatch.delattr(cv2, "FontFace", raising=False)
    monkeypatch.setattr(lettering, "FONT_FOLDERS", ())


def shown(world: World, instruction: str = "go left", command: VelocityCommand = COMMAND) -> np.ndarray:
    return video.draw(world, BLACK, [(0.0, 0.0), (0.5, 0.0)], instruction, command)


def differs(one: np.ndarray, other: np.ndarray, rows: slice, columns: slice) -> bool:
    return bool((one[rows, columns] != other[rows, columns]).any())


def test_a_frame_shows_instruction_camera_room_and_command(world):
    frame = shown(world)
    assert frame.shape == (video.SIZE_PX[1], video.SIZE_PX[0], 3)
    header, footer, whole = slice(0, 30), slice(-30, None), slice(None)
    assert differs(frame, shown(world, "go right"), header, whole)
    assert not differs(frame, shown(world, "go right"), slice(40, None), whole)
    assert differs(frame, shown(world, command=VelocityCommand(0.1)), footer, whole)


def test_the_command_has_units_and_the_outcome_a_word(world):
    assert video.status_texts(world, COMMAND) == ("0.0 s   linear.x +0.40 m/s   angular.z -0.50 rad/s", "driving")
    sideways = World(world.layout, "omnidirectional")
    assert "linear.y +0.10 m/s" in video.status_texts(sideways, COMMAND)[0]
    world.collided = True
    assert video.status_texts(world, COMMAND)[1] == "collision"


def test_the_robot_heads_where_the_arrow_points(world):
    """The arrow's colour lies ahead of the robot's middle in the view from above: x up, y to the left."""
    x_from, x_to, y_from, y_to = world.layout.room
    middle = Pose((x_from + x_to) / 2, (y_from + y_to) / 2, 0.0)
    heading = np.array(video.HEADING_RGB)
    for yaw_rad, (right, down) in ((0.0, (0, -1)), (math.pi / 2, (-1, 0)), (-math.pi / 2, (1, 0))):
        world.pose = changed(middle, yaw_rad=yaw_rad)
        above = shown(world)[:, video.SIZE_PX[0] // 2 :].astype(int)
        rows, columns = np.nonzero(np.abs(above - heading).sum(axis=2) < 30)
        offset = np.array([columns.mean(), rows.mean()]) - np.array([above.shape[1] / 2, 36 + above.shape[1] / 2])
        assert offset @ (right, down) > 3.0
        assert abs(offset @ (down, right)) < 2.0


def drawn(text: str) -> np.ndarray:
    image = np.zeros((40, 500, 3), np.uint8)
    lettering.draw_text(image, text, (5, 28), (255, 255, 255), 20)
    return image


def test_korean_is_drawn_with_letters_of_its_own():
    if not lettering.can_draw(KOREAN):
        pytest.skip("this OpenCV has neither FontFace nor freetype with a Korean font")
    # Boxes and question marks would be the same for each syllable.
    assert len({drawn(syllable).tobytes() for syllable in "박왼컵가"}) == 4
    assert drawn(KOREAN).any()
    assert lettering.text_width_px(KOREAN, 20) > lettering.text_width_px(KOREAN[:5], 20) > 0


def test_without_letters_nothing_stands_for_them(old_opencv, world):
    assert not lettering.can_draw(KOREAN)
    assert lettering.can_draw("go left")
    assert not drawn("박스").any()
    assert (drawn("컵 a") == drawn(" a")).all()
    assert differs(shown(world, KOREAN), shown(world, ""), slice(0, 30), slice(None))  # a sentence says so


def test_a_font_of_the_system_draws_korean_with_freetype(monkeypatch, tmp_path):
    calls = []
    writer = SimpleNamespace(
        loadFontData=lambda *arguments: calls.append(arguments),
        putText=lambda image, text, *rest: calls.append(text),
        getTextSize=lambda text, size, thickness: ((len(text) * size, size), 0),
    )
    font = tmp_path / "noto" / "NotoSansCJK-Regular.ttc"
    font.parent.mkdir()
    font.touch()
    monkeypatch.delattr(cv2, "FontFace", raising=False)
    monkeypatch.setattr(cv2, "freetype", SimpleNamespace(createFreeType2=lambda: writer), raising=False)
    monkeypatch.setattr(lettering, "FONT_FOLDERS", (str(tmp_path),))
    drawn(KOREAN)
    assert lettering.can_draw(KOREAN)
    assert calls == [(str(font), 0), KOREAN]
    assert lettering.text_width_px(KOREAN, 10) == 10 * len(KOREAN)
    draw_command(BLACK, COMMAND, (1.0, 1.0, 1.0), ("moving", KOREAN))  # the node's debug image
    assert calls[2:] == [KOREAN]


def test_a_long_text_gets_smaller_letters():
    size = lettering.fitting_size_px(KOREAN * 3, 400, 20, 6)
    assert size < 20
    assert lettering.text_width_px(KOREAN * 3, size) <= 400 or size == 6


def test_a_video_that_a_full_disk_cuts_does_not_replace_the_old_one(tmp_path, world):
    path = tmp_path / "drive.mp4"
    path.write_bytes(b"the old one")
    watched = (world, np.random.default_rng(0).integers(0, 255, BLACK.shape, np.uint8), COMMAND)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(MobileVlaError, match=r"drive\.mp4 was not written completely"),
            video.open_video(path, 0.3) as opened,
        ):
            watch = opened.watcher("go left")
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            for _ in range(20):
                watch(*watched)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_video_is_complete(tmp_path, world):
    path = tmp_path / "drive.mp4"
    with video.open_video(path, 0.3) as opened:
        for _ in range(3):
            opened.watcher("go left")(world, BLACK, COMMAND)
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT) == 3 == opened.frames


def test_a_path_that_is_not_utf_8_is_refused(tmp_path):
    with (
        pytest.raises(MobileVlaError, match="not UTF-8"),
        video.open_video(tmp_path / os.fsdecode(b"\xff.mp4"), 0.3),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frames", [0, 1])
def test_a_drive_that_is_interrupted_leaves_no_part_of_a_video(tmp_path, world, frames):
    with pytest.raises(KeyboardInterrupt), video.open_video(tmp_path / "drive.mp4", 0.3) as opened:
        for _ in range(frames):
            opened.watcher("go left")(world, BLACK, COMMAND)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
