"""Reading and writing bags: both storages, whole, empty, cut off, damaged, and written by others."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import lz4.frame
import numpy as np
import pytest
import zstandard
from bag_files import PERIOD_NS, START_NS, picture, raw, stamps, storage_file, write_drive
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin
from rosbags.rosbag2 import Writer as RosbagsWriter

from mobile_vla_inference.bags.reader import (
    IMAGE,
    STRING,
    TWIST,
    BagError,
    BagReader,
    typestore,
)
from mobile_vla_inference.bags.topics import choose_topics
from mobile_vla_inference.bags.writer import STORAGES, BagWriter
from mobile_vla_inference.ros.conversions import image_to_rgb


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
    assert "is damaged" in notes[0]


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
        assert ("can't be read as a bag" if content else f"{file} is empty (0 bytes), expected a bag") in str(error)


def test_paths_that_are_no_bags_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no bag")
    (tmp_path / "folder").mkdir()
    for name, sentence in (
        ("missing", "does not exist"),
        ("notes.txt", "can.t be read as a bag"),
        ("folder", "is an empty folder, expected a bag"),
    ):
        with pytest.raises(BagError, match=sentence):
            BagReader(tmp_path / name)


# ---- cut off, damaged ------------------------------------------------------------------------------------------------


def damaged(file: Path, messages: list[tuple]) -> str:
    """Return the sentence about a file that was read up to where it breaks off: its path, and how far that is."""
    times_ns = [time_ns for _, time_ns, _ in messages]
    seconds = (max(times_ns) - min(times_ns)) / 1e9 if times_ns else 0.0
    images = sum(topic == "/image_raw" for topic, _, _ in messages)
    counts = ", ".join(
        f"{count} {what}{'s' * (count != 1)}" for count, what in ((len(messages), "message"), (images, "image"))
    )
    return f"{file} is cut off or damaged: it was read up to there ({counts}, {seconds:.1f} s)"


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.0, 0.999))
def test_an_mcap_file_cut_anywhere_is_read_up_to_there(tmp_path_factory, share):
    path = write_drive(tmp_path_factory.mktemp("cut") / "drive", stamps(150))
    whole, _ = read_all(path)
    file = storage_file(path)
    os.truncate(file, int(file.stat().st_size * share))
    messages, notes = read_all(path)
    assert messages == whole[: len(messages)]
    size = file.stat().st_size
    assert notes == [damaged(file, messages) if size else f"{file} is empty (0 bytes)"]
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
        assert re.search(r"can't be read as a bag|is empty \(0 bytes\)", str(error))
    else:
        assert set(messages) <= set(whole)
        assert notes == [damaged(file, messages)] or messages == whole
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


def write_topics(file: Path, topics: dict[str, tuple[str, str, str]], **start) -> Path:
    """Write an mcap file with a message on every topic: name -> type, encoding of the schema, encoding."""
    with file.open("wb") as stream:
        writer = McapWriter(stream)
        writer.start(**start)
        for topic, (type_name, schema_encoding, encoding) in topics.items():
            schema = writer.register_schema(type_name, schema_encoding, b"{}") if type_name else 0
            channel = writer.register_channel(topic, encoding, schema, {"offered_qos_profiles": "- [no: profile"})
            data = bytes(typestore().serialize_cdr(raw(picture(0), START_NS), IMAGE)) if type_name == IMAGE else b"{}"
            writer.add_message(channel, START_NS, data, START_NS)
        writer.finish()
    return file


@pytest.mark.parametrize("start", [{"profile": "ros2"}, {"profile": ""}, {"profile": "x-robot"}], ids=str)
def test_only_topics_that_are_used_need_to_be_understood(tmp_path, start):
    others = {
        "/json": ("x", "jsonschema", "json"),
        "/proto": ("foxglove.CompressedVideo", "protobuf", "protobuf"),
        "/none": ("", "", ""),
        "/custom": ("my_robot/msg/Wheels", "ros2msg", "cdr"),
    }
    file = write_topics(tmp_path / "mixed.mcap", {**others, "/image_raw": (IMAGE, "ros2msg", "cdr")}, **start)
    assert np.array_equal(images(file)[0], picture(0))
    with BagReader(file) as bag:
        assert choose_topics(bag, None, None, instruction_wanted=False).image.name == "/image_raw"
        assert len(list(bag.messages())) == 5
        with pytest.raises(BagError, match="contains /json in the encoding 'json', expected ROS 2's cdr"):
            list(bag.messages(("/json",)))
        with pytest.raises(BagError, match="is not a my_robot/msg/Wheels"):
            bag.decode(next(iter(bag.messages(("/custom",)))))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (("sensor_msgs/Image", "ros1msg", "ros1"), "'ros1', expected .*rosbags-convert"),
        ((IMAGE, "jsonschema", "json"), "'json', expected ROS 2's cdr; record that topic with `ros2 bag record`"),
    ],
)
def test_images_in_another_encoding_are_refused_by_name(tmp_path, kind, sentence):
    file = write_topics(tmp_path / "other.mcap", {"/image_raw": kind})
    with BagReader(file) as bag:
        for wanted in (None, "/image_raw"):
            with pytest.raises(BagError, match=sentence):
                choose_topics(bag, wanted, None, instruction_wanted=False)


# ---- of another kind, or under another name --------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["monday", "monday.mcap", "monday.db3"])
def test_a_storage_file_under_another_name_is_read_and_named(tmp_path, storage, name):
    path = write_drive(tmp_path / "drive", storage=storage)
    whole, _ = read_all(path)
    former = storage_file(path)
    if storage == "sqlite3" and name == "monday":
        name = "monday.bag.db3"  # any sqlite3 file may lie about; a bag's has one of the two endings
    former.rename(path / name)
    messages, notes = read_all(path)
    assert messages == whole
    assert notes == [f"{path} lacks {former.name}, which its metadata.yaml names: {name} was read instead"]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("mode", [CompressionMode.FILE, CompressionMode.MESSAGE])
@pytest.mark.parametrize("metadata", ["whole", "missing", "unpacked"])
def test_a_compressed_bag_is_read_with_metadata_and_without(tmp_path, storage, mode, metadata):
    plain = write_drive(tmp_path / "plain", storage=storage)
    plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
    writer = RosbagsWriter(tmp_path / "packed", version=8, storage_plugin=plugin)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    with BagReader(plain) as bag, writer:
        ids = {t.name: writer.add_connection(t.name, t.type_name, typestore=typestore()) for t in bag.topics.values()}
        for message in bag.messages():
            writer.write(ids[message.topic], message.time_ns, message.data)
    path = tmp_path / "packed"
    if metadata == "missing":
        (path / "metadata.yaml").unlink()
    elif metadata == "unpacked" and mode == CompressionMode.FILE:
        (packed,) = path.glob("*.zstd")
        with packed.open("rb") as source, packed.with_suffix("").open("wb") as target:
            zstandard.ZstdDecompressor().copy_stream(source, target)
        packed.unlink()
    assert read_all(path)[0] == read_all(plain)[0]
    if mode == CompressionMode.FILE and metadata != "unpacked":
        (packed,) = path.glob("*.zstd")
        assert read_all(packed)[0] == read_all(plain)[0]


def test_a_compressed_file_that_was_cut_off_is_read_up_to_there(tmp_path):
    path = write_drive(tmp_path / "drive", stamps(300))
    whole, _ = read_all(path)
    packed = zstandard.ZstdCompressor().compress(storage_file(path).read_bytes())
    (tmp_path / "cut.mcap.zstd").write_bytes(packed[: len(packed) * 2 // 3])
    messages, notes = read_all(tmp_path / "cut.mcap.zstd")
    assert 20 < len(messages) < len(whole)
    assert messages == whole[: len(messages)]
    assert notes == [damaged(tmp_path / "cut.mcap.zstd", messages)]


def test_a_split_bag_without_metadata_goes_on_in_the_file_that_begins_next(tmp_path):
    path = tmp_path / "split"
    path.mkdir()
    for number in range(12):  # by their names, 10 comes before 2
        part = write_drive(tmp_path / f"part{number}", stamps(2))
        with BagWriter(tmp_path / f"late{number}") as late, BagReader(part) as bag:
            late.add_topic("/image_raw", IMAGE)
            for message in bag.messages(("/image_raw",)):
                late.write("/image_raw", message.time_ns + number * 1_000_000_000, message.data)
        storage_file(tmp_path / f"late{number}").rename(path / f"split_{number}.mcap")
    times = [time_ns for _, time_ns, _ in read_all(path)[0]]
    assert len(times) == 24
    assert times == sorted(times)


FOREIGN = {
    "noetic.bag": (b"#ROSBAG V2.0\n" + bytes(4096), "is a bag of ROS 1, .*`rosbags-convert --src .*noetic.bag --dst "),
    "ros1.db3": (b"#ROSBAG V2.0\n" + bytes(4096), "is a bag of ROS 1"),
    "pointer.mcap": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS.*`git lfs pull`"),
    "pointer.db3": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
    "drive.mcap.gz": (gzip.compress(b"x"), "is compressed with gzip.*`gunzip`"),
    "drive.tar.gz": (gzip.compress(b"x"), "tar -xzf"),
    "drive.db3.lz4": (lz4.frame.compress(b"x"), "is compressed with lz4.*`lz4 -d`"),
    "drive.tar": (bytes(257) + b"ustar\0" + bytes(300), "is a tar archive.*`tar -xf`"),
    "drive.zip": (b"PK\3\4" + bytes(30), "is a zip archive"),
    "login.mcap": (b"<!doctype html><title>Sign in", "is a web page, .*download the file itself"),
    "episode.h5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "is an HDF5 file.*episodes-to-bag"),
    "garbage.mcap": (b"this is no bag" * 100, "begins with b'this is no bagth'"),
    "empty.db3": (b"", r"empty.db3 is empty \(0 bytes\)"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, name, in_folder):
    content, sentence = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BagError, match=sentence) as raised:
        BagReader(tmp_path if in_folder else tmp_path / name)
    assert "record" not in str(raised.value).replace("recording", "")


def test_a_folder_without_a_bag_is_reported_with_its_content(tmp_path):
    (tmp_path / "drives").mkdir()
    write_drive(tmp_path / "drives/monday", stamps(1))
    with pytest.raises(BagError, match=r"contains no .mcap or .db3 file, only monday, .*such as .*drives/monday"):
        BagReader(tmp_path / "drives")
    with pytest.raises(BagError, match=r"is only the metadata of a bag, expected the folder; give .*monday"):
        BagReader(tmp_path / "drives/monday/metadata.yaml")
    storage_file(tmp_path / "drives/monday").unlink()
    with pytest.raises(BagError, match=r"lacks monday.mcap, which its metadata.yaml names, and contains nothing"):
        BagReader(tmp_path / "drives/monday")


def test_a_folder_of_frames_is_named(tmp_path):
    (tmp_path / "actions.csv").write_text("frame,stamp_s,image,steering,throttle\n")
    with pytest.raises(BagError, match=r"is a folder with actions.csv, .*`mobile_vla make-bag .* BAG`"):
        BagReader(tmp_path)


def test_an_empty_file_in_a_bags_folder_is_named(tmp_path):
    path = write_drive(tmp_path / "drive", stamps(2))
    os.truncate(storage_file(path), 0)
    with BagReader(path) as bag, pytest.raises(BagError, match=r"contains no messages \(.*mcap is empty \(0 bytes\)\)"):
        bag.check_not_empty()


def test_a_message_of_another_type_is_one_sentence(tmp_path):
    with BagWriter(tmp_path / "drive") as bag:
        bag.add_topic("/image_raw", IMAGE)
        bag.write("/image_raw", START_NS, b"\x00\x01\x00\x00\x05")
    with BagReader(tmp_path / "drive") as bag, pytest.raises(BagError, match="is not a sensor_msgs/msg/Image"):
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
    with pytest.raises(BagError, match="already exists"):
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
