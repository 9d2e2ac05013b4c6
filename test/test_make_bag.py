"""`mobile_vla make-bag`: a folder with images/ and actions.csv as a bag."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from bag_files import picture

from mobile_vla_inference.bags.reader import (
    COMPRESSED_IMAGE,
    IMAGE,
    BagReader,
)
from mobile_vla_inference.bags.writer import STORAGES
from mobile_vla_inference.episodes.frames_folder import read_frames_folder
from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.ros.conversions import compressed_to_rgb, image_to_rgb
from mobile_vla_inference.tools import cli


@pytest.fixture
def frames_dir(tmp_path) -> Path:
    folder = tmp_path / "frames"
    (folder / "images").mkdir(parents=True)
    lines = ["frame,stamp_s,image,steering,throttle"]
    for index in range(30):
        assert cv2.imwrite(str(folder / f"images/{index:04}.jpg"), picture(index)[..., ::-1])
        lines.append(f"{index},{0.05 * index:.3f},images/{index:04}.jpg,{index / 30:.6f},0.5")
    (folder / "actions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", [IMAGE, COMPRESSED_IMAGE])
def test_make_bag_writes_images_instruction_and_commands(tmp_path, frames_dir, storage, kind):
    out = tmp_path / "drive"
    options = ["--compressed"] if kind == COMPRESSED_IMAGE else []
    arguments = [str(frames_dir), str(out), "--storage", storage, "--instruction", "박스를 왼쪽으로", *options]
    assert cli.main(["make-bag", *arguments, "--max-linear-mps", "2"]) == 0
    with BagReader(out) as bag:
        (topic,) = bag.of_type(IMAGE, COMPRESSED_IMAGE)
        assert (topic.type_name, topic.count) == (kind, 30)
        messages = {name: [bag.decode(m) for m in bag.messages((name,))] for name in bag.topics}
    assert {message.data for message in messages["/instruction"]} == {"박스를 왼쪽으로"}
    assert len(messages["/instruction"]) == 2
    twist = messages["/cmd_vel"][15]
    assert twist.linear.x == 1.0
    assert twist.angular.z == pytest.approx(-0.5)  # steering to the right turns clockwise
    image = messages[topic.name][7]
    convert = image_to_rgb if kind == IMAGE else compressed_to_rgb
    expected = cv2.imread(str(frames_dir / "images/0007.jpg"))[..., ::-1]
    assert np.array_equal(convert(image), expected)
    assert image.header.stamp.sec + image.header.stamp.nanosec * 1e-9 == 1_700_000_000.35


def test_make_bag_refuses_what_is_there_already(tmp_path, frames_dir, capsys):
    assert cli.main(["make-bag", str(frames_dir), str(frames_dir)]) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no actions.csv"),
        ("", "lacks the column"),
        ("frame,stamp_s,image\n0,0,images/0000.jpg\n", "lacks the columns steering, throttle"),
        ("frame,stamp_s,image,steering,throttle\n", "contains no frame"),
        ("frame,stamp_s,image,steering,throttle\n0,0,,0,0\n", "line 2 names no image, expected a path relative"),
        (
            "frame,stamp_s,image,steering,throttle\n0,0,0000.jpg,0,0\n",
            r"names '0000.jpg', which is not in \S+ \(images/0000.jpg is\).*; write images/0000.jpg",
        ),
        (
            "frame,stamp_s,image,steering,throttle\n0,0,images/0000.jpg,0,1.5\n",
            r"line 2 has throttle 1.5, expected -1 to 1, a share of full throttle; .*--max-linear-mps .*m/s",
        ),
        (
            "frame,stamp_s,image,steering,throttle\n0,0,images/0000.jpg,-30,0\n",
            r"line 2 has steering -30, expected -1 to 1, .*--max-angular-radps .*rad/s",
        ),
        ("frame,stamp_s,image,steering,throttle\n0,0,images/0000.jpg,left,0\n", "line 2 has steering 'left'"),
        ("frame,stamp_s,image,steering,throttle\n0,0,images/0000.jpg,nan,0\n", "line 2 has steering 'nan'"),
        ("frame,stamp_s,image,steering,throttle\n0,0,images/0000.jpg\n", "line 2 has steering None"),
        ("frame,stamp_s,image,steering,throttle\n0,-1,images/0000.jpg,0,0\n", "stamp_s -1"),
        ("frame,stamp_s,image,steering,throttle\n0,0,images/none.jpg,0,0\n", "names 'images/none.jpg'"),
        (
            "frame,stamp_s,image,steering,throttle\n0,1,images/0000.jpg,0,0\n1,1,images/0001.jpg,0,0\n",
            "line 3 has stamp_s 1 after 1, expected stamps that increase",
        ),
    ],
)
def test_a_frames_folder_that_is_wrong_is_one_sentence(frames_dir, content, sentence):
    table = frames_dir / "actions.csv"
    table.unlink()
    if content is not None:
        table.write_text(content)
    with pytest.raises(FrameError, match=sentence):
        read_frames_folder(frames_dir)


def test_a_broken_image_leaves_no_bag(tmp_path, frames_dir, capsys):
    (frames_dir / "images/0005.jpg").write_bytes(b"no image")
    for options in ([], ["--compressed"]):
        assert cli.main(["make-bag", str(frames_dir), str(tmp_path / "drive"), *options]) == 2
        assert "0005.jpg" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames"]
