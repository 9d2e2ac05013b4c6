"""Bags from outside: files that would take too much time, memory or disk are refused, or read within bounds."""

from __future__ import annotations

import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import lz4.frame
import pytest
import zstandard
from bag_files import START_NS, stamps, storage_file, write_drive
from mcap.writer import Writer as McapWriter

from mobile_vla_inference.bags.reader import (
    IMAGE,
)
from mobile_vla_inference.bags.writer import BagWriter

#: Open a bag and read all of it, as every subcommand does, within 10 s and 1 GB.
READ = """
import resource, sys
from mobile_vla_inference.bags.reader import BagReader
from mobile_vla_inference.errors import MobileVlaError

try:
    with BagReader(sys.argv[1]) as bag:
        number = sum(1 for _ in bag.messages())
        print("read", number, *bag.notes, sep="|")
except MobileVlaError as error:
    print("refused", error, sep="|")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def read_bounded(path: Path) -> str:
    """Read a bag in a process of its own; return one line. Fail where that takes too much time or memory."""
    command = [sys.executable, "-c", READ, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    assert result.returncode == 0, result.stderr
    line, peak_kib = result.stdout.splitlines()
    assert int(peak_kib) < 1_000_000
    return line


def mcap_record(opcode: int, content: bytes) -> bytes:
    return struct.pack("<BQ", opcode, len(content)) + content


def mcap_text(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


def mcap_channel() -> bytes:
    schema = struct.pack("<H", 1) + mcap_text(IMAGE) + mcap_text("ros2msg") + mcap_text("")
    channel = struct.pack("<HH", 1, 1) + mcap_text("/image_raw") + mcap_text("cdr") + mcap_text("")
    return mcap_record(3, schema) + mcap_record(4, channel)


def mcap_with_chunks(
    file: Path, compression: str, packed: bytes, declared: int, *, indexed: bool, count: int = 1, times: int = 1
) -> Path:
    """Write an mcap file with a chunk; the index contains it several times, with a given number of messages."""
    body = b"\x89MCAP0\r\n" + mcap_record(1, mcap_text("ros2") + mcap_text("hostile")) + mcap_channel()
    chunk_at = len(body)
    head = struct.pack("<QQQI", 0, 1, declared, 0) + mcap_text(compression) + struct.pack("<Q", len(packed))
    body += mcap_record(6, head + packed)
    chunk_end = len(body)
    body += mcap_record(15, bytes(4))
    summary_at = len(body)
    if indexed:
        index = struct.pack("<QQQQ", 0, 1, chunk_at, chunk_end - chunk_at)
        index += struct.pack("<IHQQ", 10, 1, chunk_end, 0) + mcap_text(compression)
        index += struct.pack("<QQ", len(packed), declared)
        body += mcap_channel() + mcap_record(8, index) * times
        statistics = struct.pack("<QHIIIIQQ", count, 1, 1, 0, 0, times, 0, 1) + struct.pack("<IHQ", 10, 1, count)
        body += mcap_record(11, statistics)
    footer = struct.pack("<QQI", summary_at if indexed else 0, 0, 0)
    file.write_bytes(body + mcap_record(2, footer) + b"\x89MCAP0\r\n")
    return file


def packed_zeros(compression: str, mebibytes: int) -> bytes:
    """Return zeros, packed as a stream without its size."""
    if compression == "zstd":
        compressor = zstandard.ZstdCompressor().compressobj()
        return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(mebibytes)) + compressor.flush()
    compressor = lz4.frame.LZ4FrameCompressor()
    start = compressor.begin()
    return start + b"".join(compressor.compress(bytes(1 << 20)) for _ in range(mebibytes)) + compressor.flush()


@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "stream"])
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("honest", [True, False], ids=["its size declared", "another size declared"])
def test_a_chunk_that_unpacks_to_gigabytes_is_refused(tmp_path, compression, indexed, honest):
    packed = packed_zeros(compression, 1500)
    file = mcap_with_chunks(
        tmp_path / "bomb.mcap", compression, packed, 1500 << 20 if honest else 1000, indexed=indexed
    )
    line = read_bounded(file)
    if honest:
        assert "has a chunk of 1500 MiB, expected at most 256 MiB" in line
    else:
        assert "damaged" in line


def test_an_index_with_one_chunk_many_times_is_not_used(tmp_path):
    data = mcap_record(5, struct.pack("<HIQQ", 1, 0, 1, 1) + b"\0\1\0\0") + mcap_record(99, bytes(8 << 20))
    packed = zstandard.ZstdCompressor().compress(data)
    path = mcap_with_chunks(tmp_path / "many.mcap", "zstd", packed, len(data), indexed=True, times=20_000)
    assert read_bounded(path) == "read|1"


def test_chunks_that_all_overlap_are_read_one_after_the_other(tmp_path):
    """Sorted by time they would all be open at once."""
    file = tmp_path / "overlap.mcap"
    data = bytes(32 << 20)
    with file.open("wb") as stream:
        writer = McapWriter(stream, chunk_size=1 << 20)
        writer.start(profile="ros2")
        schema = writer.register_schema("a/msg/B", "ros2msg", b"")
        channel = writer.register_channel("/b", "cdr", schema)
        for _ in range(18):
            writer.add_message(channel, 0, b"", 0)
            writer.add_message(channel, 10**9, data, 10**9)
        writer.finish()
    assert read_bounded(file).startswith("read|36")


def test_a_count_of_a_million_million_messages_is_only_reported(tmp_path):
    data = mcap_record(5, struct.pack("<HIQQ", 1, 0, 1, 1) + b"\0\1\0\0")
    file = mcap_with_chunks(tmp_path / "count.mcap", "", data, len(data), indexed=True, count=10**12)
    line = read_bounded(file)
    assert line == f"read|1|count.mcap declares {10**12} messages on /image_raw, but contains 1: all of them were read"


@pytest.mark.parametrize("opcode", [9, 3, 5, 200], ids=["attachment", "schema", "message", "unknown"])
def test_a_huge_record_is_not_loaded(tmp_path, opcode):
    file = tmp_path / "huge.mcap"
    start = b"\x89MCAP0\r\n" + mcap_record(1, mcap_text("ros2") + mcap_text("x")) + mcap_channel()
    with file.open("wb") as stream:  # a hole in the file: it takes no space on the disk
        stream.write(start + struct.pack("<BQ", opcode, 2 << 30) + struct.pack("<HIQQ", 1, 0, 1, 1))
        stream.seek(len(start) + 9 + (2 << 30))
        stream.write(mcap_record(2, bytes(20)) + b"\x89MCAP0\r\n")
    line = read_bounded(file)
    if opcode == 5:
        assert "contains a message of 2048 MiB on /image_raw, expected at most 128 MiB" in line
    else:
        assert line.startswith("read|0")


def test_messages_that_unpack_to_gigabytes_are_refused(tmp_path):
    with BagWriter(tmp_path / "drive") as bag:
        bag.add_topic("/image_raw", IMAGE)
        bag.write("/image_raw", START_NS, packed_zeros("zstd", 1500))
    assert "unpacks to more than 128 MiB" in read_bounded(tmp_path / "drive")


def test_a_compressed_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    (tmp_path / "bomb.mcap.zstd").write_bytes(packed_zeros("zstd", 1500))
    assert "unpacks to more than 1024 MiB" in read_bounded(tmp_path / "bomb.mcap.zstd")


def hostile_database(file: Path, script: str) -> Path:
    connection = sqlite3.connect(file)
    topics = "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT);"
    row = f"INSERT INTO topics VALUES(1, '/image_raw', '{IMAGE}', 'cdr');"
    connection.executescript((topics + row if "topics" not in script else "") + script)
    connection.close()
    return file


ENDLESS = "WITH RECURSIVE c(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM c) SELECT"
PLAIN = "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, data BLOB);"


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            f"CREATE VIEW messages AS {ENDLESS} id, 1 AS topic_id, id AS timestamp, x'00' AS data FROM c;",
            "messages is not a plain table, but a view",
        ),
        (
            f"{PLAIN} CREATE VIEW topics AS "
            f"{ENDLESS} id, '/t' AS name, 'x' AS type, 'cdr' AS serialization_format FROM c;",
            "topics is not a plain table, but a view",
        ),
        (
            "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, "
            "data BLOB AS (zeroblob(900000000))); INSERT INTO messages VALUES(1, 1, 1);",
            "it lacks the columns data of messages",
        ),
        (
            "CREATE VIRTUAL TABLE messages USING fts5(id, topic_id, timestamp, data);",
            "messages is not a plain table, but a virtual table",
        ),
        ("CREATE TABLE other(id);", "it lacks messages"),
    ],
    ids=["endless view", "endless topics", "computed column", "virtual table", "no bag"],
)
def test_tables_that_are_not_stored_are_refused(tmp_path, script, sentence):
    assert sentence in read_bounded(hostile_database(tmp_path / "hostile.db3", script))


def test_a_tree_of_pages_that_leads_to_one_page_again_and_again_has_an_end(tmp_path):
    """Six levels of pages, each of which names the next one a hundred times: a small file with endless rows."""
    file = hostile_database(tmp_path / "loop.db3", PLAIN)
    connection = sqlite3.connect(file)
    connection.executemany("INSERT INTO messages VALUES(NULL, 1, ?, x'00010000')", ((i,) for i in range(30_000)))
    connection.commit()
    (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'messages'").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    content = bytearray(file.read_bytes())
    page = content[(root - 1) * size : root * size]
    cells = int.from_bytes(page[3:5], "big")
    places = [8, *(int.from_bytes(page[12 + 2 * i : 14 + 2 * i], "big") for i in range(cells))]
    leaves = [int.from_bytes(page[place : place + 4], "big") for place in places]
    assert cells > 50
    for number, child in zip((root, *leaves), leaves[:6]):
        for place in places:
            page[place : place + 4] = child.to_bytes(4, "big")
        content[(number - 1) * size : number * size] = page
    file.write_bytes(content)
    assert "more rows than its" in read_bounded(file)


def test_rows_of_other_kinds_are_left_out_with_a_note(tmp_path):
    rows = "(1, 1, 5, x'00010000'), (2, 1, 'soon', x'00'), (3, 1, 6, 'text'), (4, 9, 7, x'00'), (5, 1, -1, x'00'), "
    rows += f"(6, 1, {2**62}, x'00')"
    line = read_bounded(hostile_database(tmp_path / "rows.db3", f"{PLAIN} INSERT INTO messages VALUES {rows};"))
    assert line.startswith("read|1|")
    assert "has rows without a topic or a ROS time: they are left out" in line


def test_a_journal_can_not_have_another_file_removed(tmp_path):
    """Sqlite removes the file that a journal of several databases names, once it has rolled back."""
    path = write_drive(tmp_path / "drive", storage="sqlite3")
    precious = tmp_path / "precious.txt"
    precious.write_text("keep me")
    name = str(precious).encode()
    page = 4096
    header = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + struct.pack(">IIIII", 0, 7, 1, 512, page)
    locked = struct.pack(">I", (1 << 30) // page + 1)
    checksum = sum(struct.unpack(f"{len(name)}b", name)) & 0xFFFFFFFF
    ending = locked + name + struct.pack(">II", len(name), checksum) + header[:8]
    storage_file(path).with_name(f"{storage_file(path).name}-journal").write_bytes(header.ljust(512, b"\0") + ending)
    assert "belongs to a transaction over several databases" in read_bounded(path)
    assert precious.read_text() == "keep me"


def metadata_with(path: Path, text: str) -> Path:
    (write_drive(path) / "metadata.yaml").write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("a: &a [x]\nb: &b [*a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b]\nd: {<<: *c}\n", "is damaged"),
        ("[" * 500_000, "is damaged"),
        ("{a: " * 200_000, "is damaged"),
        ("- " * 400_000, "is damaged"),
        ("x: " + "y" * (3 << 20), "is larger than"),
        ("rosbag2_bagfile_information:\n  relative_file_paths: {a: b}\n", "is damaged"),
    ],
    ids=["aliases", "deep lists", "deep mappings", "deep blocks", "large", "no list"],
)
def test_metadata_that_is_made_to_hurt_is_left_alone(tmp_path, text, note):
    line = read_bounded(metadata_with(tmp_path / "drive", text))
    assert line.startswith("read|41|")
    assert note in line


def test_a_file_outside_the_folder_is_not_read(tmp_path):
    secret = write_drive(tmp_path / "elsewhere", stamps(3))
    names = [f"../elsewhere/{storage_file(secret).name}", str(storage_file(secret)), "..", ".", "", "drive.mcap"]
    text = f"rosbag2_bagfile_information:\n  relative_file_paths: {names!r}\n"
    line = read_bounded(metadata_with(tmp_path / "drive", text))
    assert line.startswith("read|41|")
    assert "lacks elsewhere.mcap" in line


@pytest.mark.parametrize("name", ["metadata.yaml", "drive.mcap", "drive.db3", "other.mcap"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, name):
    path = write_drive(tmp_path / "drive")
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    line = read_bounded(path)
    assert line.startswith("refused|" if name == "drive.mcap" else "read|41")
    os.mkfifo(tmp_path / "pipe.mcap")
    assert "pipe.mcap is a named pipe" in read_bounded(tmp_path / "pipe.mcap")
