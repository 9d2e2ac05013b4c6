"""Frames in folders, tables and texts as people save them, and paths with a ~."""

from __future__ import annotations

import codecs
import itertools
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_vla_inference.episodes.frames_folder import read_frames_folder
from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.frames import frame_order, list_frames, read_image
from mobile_vla_inference.outside_files import read_text
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.storage.settings_file import load_settings, save_settings
from mobile_vla_inference.replay.summary import read_steps
from mobile_vla_inference.tools import cli


def write_images(folder, *names):
    for name in names:
        (folder / name).write_bytes(cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes())


@pytest.mark.parametrize(
    "names",
    [
        [f"frame_{number}.png" for number in range(1, 12)],
        ["1.png", "2.jpg", "9.png", "10.jpg", "100.png"],
        ["run2_frame9.png", "run2_frame10.png", "run10_frame1.png"],
        ["1700000000.05.png", "1700000000.5.png", "1700000000.75.png", "1700000001.png"],  # stamps in seconds
        ["a.png", "a2.png", "a10.png", "b1.png"],
        ["frame_0008.png", "frame_0009.png", "frame_0010.png"],
        ["2024-05-01 10:59:59.png", "2024-05-01 11:00:00.png", "2024-10-01 01:00:00.png"],
    ],
)
def test_frames_come_in_the_order_of_their_numbers(tmp_path, names):
    write_images(tmp_path, *reversed(names))
    assert [path.name for path in list_frames(tmp_path)] == names


def test_names_of_equal_numbers_have_one_order(tmp_path):
    names = ["01.png", "1.jpg", "1.png", "\u0661.png"]
    for order in itertools.permutations(names):
        folder = tmp_path / "-".join(order)
        folder.mkdir()
        write_images(folder, *order)
        assert [path.name for path in list_frames(folder)] == names


@given(st.lists(st.text(st.sampled_from("ab019._- \u0661"), min_size=1, max_size=12), min_size=3, max_size=8))
def test_any_names_can_be_sorted(names):
    paths = [Path(f"{name}.png") for name in names]
    in_order = sorted(paths, key=frame_order)
    paths.reverse()
    assert sorted(paths, key=frame_order) == in_order


def test_files_that_are_left_out_are_counted(tmp_path, caplog):
    write_images(tmp_path, "1.png", "._1.png", ".DS_Store", "2.HEIC", "3.heic", "4.tiff", "README")
    (tmp_path / "folder.png").mkdir()
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in list_frames(tmp_path)] == ["1.png"]
    (record,) = caplog.records
    assert "read 1 images, left out other files: 2 .heic, 1 .tiff, 1 without a suffix" in record.getMessage()
    (tmp_path / "1.png").unlink()
    with pytest.raises(FrameError, match=r"contains no image files \(but 2 \.heic, 1 \.tiff, 1 without a suffix\)"):
        list_frames(tmp_path)


def test_a_folder_of_images_alone_says_nothing(tmp_path, caplog):
    write_images(tmp_path, "1.png", "2.PNG")
    assert len(list_frames(tmp_path)) == 2
    assert not caplog.records


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_a_photo_that_is_too_large_is_named(tmp_path, suffix):
    path = tmp_path / f"holiday{suffix}"
    cv2.imwrite(str(path), np.zeros((8, 6000, 3), np.uint8))
    with pytest.raises(FrameError, match=rf"holiday\{suffix} is 6000 x 8 pixels, expected 1 to 4608 per side"):
        read_image(path)


def test_a_file_that_lost_bytes_is_named(tmp_path):
    data = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))[1].tobytes()
    (tmp_path / "a.jpg").write_bytes(data[:2000] + data[4000:])
    with pytest.raises(FrameError, match=r"a\.jpg is cut off or corrupt"):
        read_image(tmp_path / "a.jpg")


TABLE = "frame,stamp_s,image,steering,throttle\n0,0.0,images/0.png,-0.5,0.25\n1,0.1,images/1.png,0,0.2\n"
GERMAN = TABLE.replace(",", ";").replace(".0;", ",0;").replace("0.", "0,").replace("0,png", "0.png")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", "0.png", "1.png")
    return tmp_path


@pytest.mark.parametrize(
    "data",
    [
        TABLE.encode(),
        codecs.BOM_UTF8 + TABLE.encode(),
        TABLE.encode("utf-16"),
        codecs.BOM_UTF16_BE + TABLE.encode("utf-16-be"),
        TABLE.replace(",", "\t").encode("utf-16"),  # "Unicode text"
        codecs.BOM_UTF8 + TABLE.replace("\n", "\r\n").encode(),
        TABLE.replace("\n", "\r").encode(),
        GERMAN.encode(),
        codecs.BOM_UTF8 + b"sep=;\r\n" + GERMAN.replace("\n", "\r\n").encode(),
        TABLE.replace(",", ", ").encode(),
        TABLE.replace("\n", ",,\n").encode() + b",,,,,,\n\n",  # empty columns and lines of a sheet
        "\n".join(f'"{line.replace(",", chr(34) + "," + chr(34))}"' for line in TABLE.splitlines()).encode(),
    ],
)
def test_a_table_as_spreadsheets_save_it_is_read(folder, data):
    (folder / "actions.csv").write_bytes(data)
    first, second = read_frames_folder(folder)
    assert (first.stamp_s, first.steering, first.throttle) == (0.0, -0.5, 0.25)
    assert (second.stamp_s, second.steering, second.throttle) == (0.1, 0.0, 0.2)
    assert second.image.name == "1.png"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (TABLE.replace("-0.5", "-0,5").encode(), "line 2 has 6 cells, expected 5 as in the first line"),
        (TABLE.replace("throttle", "steering").encode(), "lacks the column throttle"),
        (TABLE.replace("\n", ",0\n").replace("throttle,0", "throttle,steering").encode(), "column steering twice"),
        ("프레임,stamp_s\n".encode("cp949"), "is not UTF-8 text"),
        (b"sep=;\n" + TABLE.splitlines()[0].encode(), "contains no frame"),
        (
            b"sep=;\n" + TABLE.replace("0.1", "0.0").encode(),
            "line 4 has stamp_s 0 after 0, expected stamps that increase",
        ),
        (TABLE.encode("utf-16-le"), "lacks the column|is not CSV"),  # no mark tells that it is UTF-16
    ],
)
def test_a_table_that_is_wrong_is_one_sentence(folder, data, sentence):
    (folder / "actions.csv").write_bytes(data)
    with pytest.raises(FrameError, match=sentence):
        read_frames_folder(folder)


AS_EDITORS_SAVE = [
    lambda text: codecs.BOM_UTF8 + text.encode(),
    lambda text: text.encode("utf-16"),
    lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    lambda text: text.replace("\n", "\r\n").encode(),
]


@pytest.mark.parametrize("save", AS_EDITORS_SAVE)
def test_json_as_editors_save_it_is_read(tmp_path, tiny_checkpoint, save):
    checkpoint = tmp_path / tiny_checkpoint.name
    checkpoint.symlink_to(tiny_checkpoint)
    settings = PolicySettings(prompt="<grounding> 컵 {instruction}")
    path = save_settings(checkpoint, settings)
    path.write_bytes(save(path.read_text(encoding="utf-8")))
    assert load_settings(checkpoint).settings.prompt == settings.prompt
    steps = tmp_path / "steps.json"
    steps.write_bytes(save('{"steps": [{"stamp_s": 1, "reset": true, "instruction": "컵까지"}]}'))
    assert read_steps(steps)[0].instruction == "컵까지"


def test_a_text_keeps_its_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"a\r\nb\rc\n")
    assert read_text(tmp_path / "a.txt", "a text", 100, error=FrameError) == "a\r\nb\rc\n"


def test_a_home_folder_in_a_path_is_found(tmp_path, monkeypatch):
    """In a path that no shell has expanded, as after --json= or in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["make-checkpoint", "~/made.pth", "--size", "tiny"]) == 0
    assert cli.main(["inspect", str(tmp_path / "made.pth"), "--json=~/out.json"]) == 0
    assert (tmp_path / "out.json").exists()
    assert not (tmp_path / "~").exists()


def test_the_home_of_nobody_is_told(capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(["bench", "step", "--json=~nobody_of_this_name/out.json"])
    assert exited.value.code == 2
    assert "~nobody_of_this_name/out.json begins with a home folder that does not exist" in capsys.readouterr().err


def test_the_tools_take_an_instruction_in_its_one_form(capsys):
    assert cli.main(["infer", "--checkpoint", "x", "--frames", "y", "--instruction", "go \u202e left"]) == 2
    assert "mobile_vla: error: instruction contains U+202E" in capsys.readouterr().err


def test_a_home_folder_in_the_nodes_parameters_is_found(monkeypatch):
    """No shell expands checkpoint:=~/policy.pth; names of topics and frames are no paths."""
    pytest.importorskip("rclpy")
    import rclpy
    from rclpy.context import Context

    from mobile_vla_inference.ros.parameter_declarations import declare_parameters
    from mobile_vla_inference.ros.parameters import NodeParameters

    given = {"checkpoint": "~/policy.pth", "processors": "~/processors", "base_frame_id": "~/base"}
    monkeypatch.setenv("HOME", "/home/robot")
    context = Context()
    context.init(["test", "--ros-args", *(word for pair in given.items() for word in ("-p", ":=".join(pair)))])
    try:
        parameters = declare_parameters(rclpy.create_node("vla_node", context=context), NodeParameters)
    finally:
        context.try_shutdown()
    assert parameters.checkpoint == "/home/robot/policy.pth"
    assert parameters.processors == "/home/robot/processors"
    assert parameters.base_frame_id == "~/base"
