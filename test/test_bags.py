"""Reading and writing bags: both storages, whole, empty, cut off, damaged, and written by others."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from bag_files import PERIOD_NS, START_NS, picture, raw, stamps, storage_file, write_drive
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter

from mobile_vla_inference.bags.frames_folder import read_frames_folder
from mobile_vla_inference.bags.reader import (
    COMPRESSED_IMAGE,
    IMAGE,
    STRING,
    TWIST,
    BagError,
    BagReader,
    typestore,
)
from mobile_vla_inference.bags.writer import STORAGES, BagWriter
from mobile_vla_inference.border import FrameError
from mobile_vla_inference.ros.conversions import compressed_to_rgb, image_to_rgb
from mobile_vla_inference.tools import cli


def read_all(path: Path) -> tuple[list[tuple[str, int, bytes]], list[str]]:
    with BagReader(path) as bag:
        return [tuple(message) for message in bag.messages()], bag.notes


def images(path: Path) -> list[np.ndarray]:
    with BagReader(path) as bag:
        return [image_to_rgb(bag.decode(message)) for message in bag.messages(("/image_raw",))]


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_written_is_read(tmp_path, storage):
    path = write_drive(tmp_path / "drive", storage=storage)
    with BagReader(path) as bag:
        assert {name: (t.type_name, t.count) for name, t in bag.topics.items()} == {
            "/image_raw": (IMAGE, 20),
            "/cmd_vel": (TWIST, 20),
            "/instruction": (STRING, 1),
        }
        assert bag.start_ns == START_NS
        assert bag.message_count == 41
        times = [message.time_ns for message in bag.messages()]
        assert times == sorted(times)
        first = next(iter(bag.messages(("/image_raw",))))
        assert np.array_equal(image_to_rgb(bag.decode(first)), picture(0))
        late = [message.time_ns for message in bag.messages(("/image_raw",), START_NS + 15 * PERIOD_NS)]
        assert late == stamps(20)[15:]
        assert bag.notes == []


@pytest.mark.parametrize("storage", STORAGES)
def test_the_storage_file_alone_is_a_bag(tmp_path, storage):
    path = write_drive(tmp_path / "drive", storage=storage)
    assert read_all(storage_file(path)) == read_all(path)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_bag_without_metadata_is_read(tmp_path, storage):
    path = write_drive(tmp_path / "drive", storage=storage)
    whole, _ = read_all(path)
    (path / "metadata.yaml").unlink()
    messages, notes = read_all(path)
    assert messages == whole
    assert "no metadata.yaml" in notes[0]


@pytest.mark.parametrize("text", ["", "{", "a: 1", "- 1", "rosbag2_bagfile_information: 3"])
def test_a_bag_with_broken_metadata_is_read(tmp_path, text):
    path = write_drive(tmp_path / "drive")
    (path / "metadata.yaml").write_text(text)
    messages, notes = read_all(path)
    assert len(messages) == 41
    assert "is broken" in notes[0]


@pytest.mark.parametrize("storage", STORAGES)
def test_an_empty_bag_holds_nothing(tmp_path, storage):
    with BagWriter(tmp_path / "empty", storage):
        pass
    with BagReader(tmp_path / "empty") as bag:
        assert (bag.topics, bag.message_count, bag.start_ns, list(bag.messages())) == ({}, 0, None, [])


@pytest.mark.parametrize("suffix", [".mcap", ".db3"])
@pytest.mark.parametrize("content", [b"", b"this is no bag" * 100])
def test_a_file_that_is_no_bag_is_one_sentence_or_empty(tmp_path, suffix, content):
    file = tmp_path / f"file{suffix}"
    file.write_bytes(content)
    try:
        with BagReader(file) as bag:
            assert (bag.message_count, len(bag.notes)) == (0, 1)
    except BagError as error:
        assert "can't be read as a bag" in str(error)


def test_paths_that_are_no_bags_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no bag")
    (tmp_path / "folder").mkdir()
    for name, sentence in (
        ("missing", "does not exist"),
        ("notes.txt", "can.t be read as a bag"),
        ("folder", "holds no .mcap or .db3 file"),
    ):
        with pytest.raises(BagError, match=sentence):
            BagReader(tmp_path / name)


# ---- cut off, damaged ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.0, 0.999))
def test_an_mcap_file_cut_anywhere_is_read_up_to_there(tmp_path_factory, share):
    path = write_drive(tmp_path_factory.mktemp("cut") / "drive", stamps(150))
    whole, _ = read_all(path)
    file = storage_file(path)
    os.truncate(file, int(file.stat().st_size * share))
    messages, notes = read_all(path)
    assert messages == whole[: len(messages)]
    assert len(notes) == 1
    assert "cut off or damaged" in notes[0]
    if share > 0.9:
        assert len(messages) > 100
    shutil.rmtree(path)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.0, 0.999))
def test_a_sqlite_file_cut_anywhere_is_read_or_refused_in_a_sentence(tmp_path_factory, share):
    path = write_drive(tmp_path_factory.mktemp("cut") / "drive", storage="sqlite3")
    whole, _ = read_all(path)
    file = storage_file(path)
    os.truncate(file, int(file.stat().st_size * share))
    try:
        messages, notes = read_all(path)
    except BagError as error:
        assert "can't be read as a bag" in str(error)
    else:
        assert set(messages) <= set(whole)
        assert "cut off or damaged" in notes[-1] or messages == whole
    shutil.rmtree(path)


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0.0, 1.0), value=st.binary(min_size=1, max_size=40), storage=st.sampled_from(STORAGES))
@example(place=0.05452757963475198, value=bytes(14), storage="mcap")  # lengths beyond a machine word
@example(place=0.05452757963475198, value=bytes(13) + b"d\xd3", storage="mcap")
def test_a_damaged_file_never_ends_in_a_traceback(tmp_path_factory, place, value, storage):
    path = write_drive(tmp_path_factory.mktemp("damaged") / "drive", storage=storage)
    file = storage_file(path)
    content = bytearray(file.read_bytes())
    at = int(place * (len(content) - len(value)))
    content[at : at + len(value)] = value
    file.write_bytes(content)
    try:
        with BagReader(path) as bag:
            for message in bag.messages():
                try:
                    bag.decode(message)
                except BagError:
                    continue
    except BagError:
        pass
    shutil.rmtree(path)


def test_a_sqlite_file_with_a_journal_is_read_up_to_its_last_commit_and_left_alone(tmp_path):
    """A recorder that is killed leaves its last transaction half written, and a journal to roll it back with."""
    path = write_drive(tmp_path / "drive", storage="sqlite3")
    file = storage_file(path)
    code = (
        "import os, signal, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1])\n"
        "connection.execute('PRAGMA cache_size = 5')\n"  # pages go to the file before the commit
        "for index in range(300):\n"
        "    connection.execute('UPDATE messages SET data = ? WHERE id = ?', (os.urandom(9000), index % 41 + 1))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    whole, _ = read_all(path)
    assert subprocess.run([sys.executable, "-c", code, str(file)]).returncode == -signal.SIGKILL
    journal = file.with_name(f"{file.name}-journal")
    assert journal.stat().st_size > 0
    before = (file.read_bytes(), journal.read_bytes())
    messages, notes = read_all(path)
    assert messages == whole
    assert "was not closed" in notes[0]
    assert (file.read_bytes(), journal.read_bytes()) == before


def test_a_sqlite_file_with_a_write_ahead_log_is_read_with_it(tmp_path):
    path = write_drive(tmp_path / "drive", storage="sqlite3")
    file = storage_file(path)
    code = (
        "import os, signal, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1])\n"
        "connection.execute('PRAGMA journal_mode = WAL')\n"
        "connection.execute('INSERT INTO messages SELECT NULL, topic_id, timestamp + 999, data FROM messages')\n"
        "connection.commit()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(file)]).returncode == -signal.SIGKILL
    messages, notes = read_all(path)
    assert len(messages) == 82
    assert "was not closed" in notes[0]


# ---- by others -------------------------------------------------------------------------------------------------------


def write_with_mcap(file: Path, count: int = 12, finish: bool = True, **options) -> Path:
    """Write images as `mcap`'s own library does for ROS 2."""
    definition, _ = typestore().generate_msgdef(IMAGE, ros_version=2)
    with file.open("wb") as stream:
        writer = McapWriter(stream, **options)
        writer.start(profile="ros2", library="other")
        schema = writer.register_schema(IMAGE, "ros2msg", definition.encode())
        channel = writer.register_channel("/image_raw", "cdr", schema)
        for index, time_ns in enumerate(stamps(count)):
            data = bytes(typestore().serialize_cdr(raw(picture(index), time_ns), IMAGE))
            writer.add_message(channel, time_ns, data, time_ns)
        if finish:
            writer.finish()
    return file


@pytest.mark.parametrize(
    "options",
    [
        {"compression": CompressionType.NONE},
        {"compression": CompressionType.LZ4},
        {"compression": CompressionType.ZSTD, "chunk_size": 20_000},
        {"use_chunking": False},
        {"use_summary_offsets": False, "repeat_channels": False, "repeat_schemas": False},
        {"use_statistics": False},
    ],
    ids=["none", "lz4", "zstd, many chunks", "no chunks", "no summary of channels", "no statistics"],
)
def test_what_the_mcap_library_wrote_is_read(tmp_path, options):
    file = write_with_mcap(tmp_path / "other.mcap", **options)
    found = images(file)
    assert len(found) == 12
    assert all(np.array_equal(image, picture(index)) for index, image in enumerate(found))


def test_an_mcap_file_that_was_never_finished_is_read_as_far_as_it_was_written(tmp_path):
    file = write_with_mcap(tmp_path / "other.mcap", finish=False, chunk_size=20_000, compression=CompressionType.NONE)
    assert 10 <= len(images(file)) <= 12


def test_an_mcap_file_in_another_encoding_is_refused(tmp_path):
    with (tmp_path / "json.mcap").open("wb") as stream:
        writer = McapWriter(stream, use_chunking=False)
        writer.start()
        channel = writer.register_channel("/image_raw", "json", writer.register_schema("x", "jsonschema", b"{}"))
        writer.add_message(channel, 1, b"{}", 1)
        writer.finish()
    with pytest.raises(BagError, match="'json', expected ROS 2's cdr"):
        BagReader(tmp_path / "json.mcap")


def test_a_message_of_another_type_is_one_sentence(tmp_path):
    with BagWriter(tmp_path / "drive") as bag:
        bag.add_topic("/image_raw", IMAGE)
        bag.write("/image_raw", START_NS, b"\x00\x01\x00\x00\x05")
    with BagReader(tmp_path / "drive") as bag, pytest.raises(BagError, match="is no sensor_msgs/msg/Image"):
        bag.decode(next(iter(bag.messages())))


def test_without_the_libraries_there_is_one_sentence():
    code = (
        "import sys\n"
        "sys.modules['rosbags.interfaces'] = sys.modules['rosbags.rosbag2'] = None\n"
        "from mobile_vla_inference.tools.cli import main\n"
        "sys.exit(main(['play', 'drive']))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install -r requirements/workbench.txt" in result.stderr
    assert "Traceback" not in result.stderr


# ---- memory, atomic writing ------------------------------------------------------------------------------------------

MEMORY = """
import sys
from pathlib import Path
from mobile_vla_inference.bags.reader import BagReader

def anonymous_mib():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

with BagReader(sys.argv[1]) as bag:
    samples = []
    for number, message in enumerate(bag.messages()):
        if number % 10 == 0:
            samples.append(anonymous_mib())
print(len(samples), max(samples[len(samples) // 4:]) - samples[len(samples) // 4])
"""


@pytest.mark.parametrize(("storage", "whole"), [("mcap", True), ("mcap", False), ("sqlite3", True)])
def test_memory_stays_flat(tmp_path, storage, whole):
    """A bag of 180 MiB grows the reader by less than a few of its images."""
    path = tmp_path / "large"
    data = bytes(typestore().serialize_cdr(raw(picture(0, 640, 480), START_NS), IMAGE))
    with BagWriter(path, storage) as bag:
        bag.add_topic("/image_raw", IMAGE)
        for time_ns in stamps(200):
            bag.write("/image_raw", time_ns, data)
    if not whole:
        os.truncate(storage_file(path), storage_file(path).stat().st_size - 100)
    result = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    samples, growth_mib = result.stdout.split()
    assert int(samples) >= 19
    assert float(growth_mib) < 8.0


@pytest.mark.parametrize("storage", STORAGES)
def test_a_bag_that_is_not_finished_leaves_nothing(tmp_path, storage):
    with pytest.raises(KeyboardInterrupt), BagWriter(tmp_path / "drive", storage) as bag:
        bag.add_topic("/instruction", STRING)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_bag_is_never_written_over(tmp_path):
    write_drive(tmp_path / "drive", stamps(1))
    with pytest.raises(BagError, match="exists already"):
        BagWriter(tmp_path / "drive")
    with pytest.raises(BagError, match="is not a folder"):
        BagWriter(tmp_path / "missing/drive")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_live_bag_survives_a_kill(tmp_path, storage):
    code = (
        "import os, signal, sys\n"
        "from mobile_vla_inference.bags.reader import STRING, typestore\n"
        "from mobile_vla_inference.bags.writer import BagWriter\n"
        "with BagWriter(sys.argv[1], sys.argv[2], live=True) as bag:\n"
        "    bag.add_topic('/instruction', STRING)\n"
        "    for number in range(3000):\n"
        "        bag.write_message('/instruction', number, typestore().types[STRING](data='x' * 1000))\n"
        "    bag.commit()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "live"
    assert subprocess.run([sys.executable, "-c", code, str(path), storage]).returncode == -signal.SIGKILL
    messages, notes = read_all(path)
    # mcap holds back its last chunk of 1 MiB.
    assert len(messages) >= (3000 if storage == "sqlite3" else 2000)
    assert notes


def test_the_tables_are_those_of_ros(tmp_path):
    path = write_drive(tmp_path / "drive", storage="sqlite3")
    connection = sqlite3.connect(storage_file(path))
    columns = [row[1] for row in connection.execute("PRAGMA table_info(messages)")]
    assert columns == ["id", "topic_id", "timestamp", "data"]
    connection.close()


# ---- make-bag --------------------------------------------------------------------------------------------------------


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
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no actions.csv"),
        ("", "lacks the column"),
        ("frame,stamp_s,image\n0,0,images/0000.jpg\n", "lacks the column steering, throttle"),
        ("frame,stamp_s,image,steering,throttle\n", "holds no frame"),
        ("frame,stamp_s,image,steering,throttle\n0,0,images/0000.jpg,left,0\n", "line 2 has steering 'left'"),
        ("frame,stamp_s,image,steering,throttle\n0,0,images/0000.jpg,nan,0\n", "line 2 has steering 'nan'"),
        ("frame,stamp_s,image,steering,throttle\n0,0,images/0000.jpg\n", "line 2 has steering None"),
        ("frame,stamp_s,image,steering,throttle\n0,-1,images/0000.jpg,0,0\n", "stamp_s -1"),
        ("frame,stamp_s,image,steering,throttle\n0,0,images/none.jpg,0,0\n", "names 'images/none.jpg'"),
        (
            "frame,stamp_s,image,steering,throttle\n0,1,images/0000.jpg,0,0\n1,1,images/0001.jpg,0,0\n",
            "line 3 is stamped 1 s after 1 s",
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
