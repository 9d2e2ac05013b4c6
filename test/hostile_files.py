"""200 damaged or malicious files of every kind that comes from outside. `cases()` lists them, always the same ones."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import socket
import sqlite3
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hdf5_files
import numpy as np
from archive_files import MEMO_BOMB, Call, zipped
from hdf5_files import ACTIONS, IMAGES

REFUSED = 2


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        kind: which reader it is for, a method of Maker.
        name: what is wrong with it.
        write: writes it to a path; None: what the kind does by itself.
        allowed: exit statuses that are right.
    """

    kind: str
    name: str
    write: Callable[[Path], Any]
    allowed: tuple[int, ...] = (REFUSED,)

    @property
    def id(self) -> str:
        """Return what a test calls it."""
        return f"{self.kind}: {self.name}"


# --- what a path can be -----------------------------------------------------------------------------------------------


def _socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def _sparse(head: bytes, size: int = 1 << 40) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(head)
        os.truncate(path, size)

    return write


_PATHS: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


def _data(content: bytes | str) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


# --- JSON -------------------------------------------------------------------------------------------------------------

_JSON: dict[str, Callable[[Path], Any]] = {
    **_PATHS,
    "a folder": Path.mkdir,
    "empty": _data(b""),
    "1 TB of zeros": _sparse(b"{"),
    "noise": _data(random.Random(0).randbytes(5000)),
    "half of UTF-16": _data('{"settings": {}}'.encode("utf-16")[:-1]),
    "deep lists": _data("[" * 200_000 + "]" * 200_000),
    "deep objects": _data('{"a":' * 200_000),
    "deep in settings": _data('{"settings": {"prompt": {"value": ' + "[" * 5000 + "]" * 5000 + "}}}"),
    "NaN": _data('{"settings": {"step_period_s": {"value": NaN, "confirmed": true}}}'),
    "too large a number": _data('{"settings": {"step_period_s": {"value": 1e999, "confirmed": true}}}'),
    "a number of 1 MB": _data('{"settings": {"step_period_s": {"value": ' + "9" * 1_000_000 + "}}}"),
    "a list": _data("[1, 2]"),
    "a word": _data('"policy"'),
    "half a surrogate pair": _data('{"settings": {"\\ud800": {"value": 1}}}'),
    "cut": _data('{"settings": {"prompt": {"value": "{instr'),
    "two values": _data("{} {}"),
}

_SETTINGS: dict[str, Callable[[Path], Any]] = {
    name: _data(json.dumps({"format": 1, "settings": {key: {"value": value, "confirmed": True}}}))
    for name, key, value in (
        ("a scale of text", "action_scale", ["a", "b"]),
        ("a scale of lists", "action_scale", [[1.0], [1.0]]),
        ("a scale that is no list", "action_scale", 2.0),
        ("a scale of 100000", "action_scale", [1.0] * 100_000),
        ("axes of numbers", "action_axes", [1, 2]),
        ("axes of lists", "action_axes", [["linear.x"], ["angular.z"]]),
        ("an unhashable choice", "kosmos_pooling", {"a": 1}),
        ("heads of text", "attention_heads", {"clip_text": "many"}),
        ("heads in a list", "attention_heads", [4]),
        ("features of numbers", "fusion_features", [1, 2]),
        ("features that are a word", "fusion_features", "clip_text"),
        ("a period of 10^30", "step_period_s", 10**30),
        ("a prompt of 1", "prompt", 1),
        ("an unknown key with a line break", "a\nb", 1),
    )
}

_CONFIG: dict[str, Callable[[Path], Any]] = {
    name: _data(json.dumps(content))
    for name, content in (
        ("nothing but the type", {"model_type": "mobile_vla"}),
        ("an architecture of text", {"model_type": "mobile_vla", "architecture": "hybrid"}),
        (
            "layers of text",
            {"model_type": "mobile_vla", "architecture": {"head": "x"}, "keep_layers": "x", "training": {}},
        ),
    )
}

_INDEX: dict[str, Callable[[Path], Any]] = {
    name: _data(json.dumps(content))
    for name, content in (
        ("shards in a list", {"weight_map": ["model.safetensors"]}),
        ("a shard above the folder", {"weight_map": {"a": "../tiny.pth"}}),
        ("a shard that is missing", {"weight_map": {"a": "missing.safetensors"}}),
        ("a shard of no name", {"weight_map": {"a": None}}),
        ("a shard that is the folder", {"weight_map": {"a": "."}}),
    )
}

# --- HDF5 -------------------------------------------------------------------------------------------------------------


def _h5(change: hdf5_files.Change) -> Callable[[Path], Any]:
    return lambda path: hdf5_files.write_episode(path, change)


def _instead(name: str, make: Callable[[Any], Any]) -> Callable[[Path], Any]:
    return _h5(hdf5_files.replaced(name, make))


def _declared(name: str, shape: tuple[int, ...], *dtype: Any, **options: Any) -> Callable[[Path], Any]:
    return _h5(hdf5_files.declared(name, shape, *dtype, **options))


def _attribute(name: str, value: Any) -> Callable[[Path], Any]:
    return _h5(hdf5_files.attribute(name, value))


def _link_to_a_pipe(path: Path) -> None:
    import h5py

    os.mkfifo(path.with_name("pipe.h5"))
    _instead("images", lambda file: h5py.ExternalLink("pipe.h5", "/images"))(path)


def _another_layout(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file["observations/images/top"], file["action"] = IMAGES, ACTIONS


def _h5_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "e.h5"
        _h5(lambda file: file.create_dataset("action_event_types", data=["a"] * 6))(path)
        return path.read_bytes()


def _damaged_h5(seed: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        chance = random.Random(seed)
        data = bytearray(_h5_bytes())
        for _ in range(1 + seed % 5):
            data[chance.randrange(min(4000, len(data)))] = chance.choice((0, 1, 255))
        path.write_bytes(data)

    return write


def _hdf5_cases() -> Iterator[Case]:
    import h5py

    empty = h5py.Empty("f")
    makers: dict[str, Callable[[Path], Any]] = {
        **_PATHS,
        "empty": _data(b""),
        "JSON": _data("{}"),
        "1 TB behind the signature": _sparse(b"\x89HDF\r\n\x1a\n"),
        "signature alone": _data(b"\x89HDF\r\n\x1a\n"),
        "cut in the middle": lambda path: path.write_bytes(_h5_bytes()[:2500]),
        "without its end": lambda path: path.write_bytes(_h5_bytes()[:-200]),
        "another signature": lambda path: path.write_bytes(b"\x88" + _h5_bytes()[1:]),
        "10^12 images declared": _declared("images", (10**12, 12, 16, 3), np.uint8),
        "10^12 actions declared": _declared("actions", (10**12, 3), np.float32),
        "10^12 of both in chunks": _h5(
            lambda file: [
                file.__delitem__("images"),
                file.__delitem__("actions"),
                file.create_dataset("images", (10**12, 12, 16, 3), np.uint8, chunks=(1, 12, 16, 3)),
                file.create_dataset("actions", (10**12, 3), np.float32, chunks=(1, 3)),
            ]
        ),
        "images that were never written": _declared("images", IMAGES.shape, np.uint8, chunks=(1, 12, 16, 3)),
        "images of 10^5 pixels a side": _declared("images", (6, 10**5, 10**5, 3), np.uint8, chunks=(1, 64, 64, 3)),
        "strings of 1 GB": _declared("actions", (6, 3), f"S{10**9}", chunks=(1, 1)),
        "cameras in a group": _instead(
            "images", lambda file: file.create_dataset("images/front", data=IMAGES) and None
        ),
        "images are an empty group": _instead("images", lambda file: file.create_group("images") and None),
        "actions are a group": _instead("actions", lambda file: file.create_group("actions") and None),
        "images are a type": _instead("images", lambda file: np.dtype("u1")),
        "images are empty": _instead("images", lambda file: empty),
        "images are a number": _instead("images", lambda file: 3),
        "images are floats": _instead("images", lambda file: IMAGES.astype(np.float32)),
        "images of 4 channels": _instead("images", lambda file: np.zeros((6, 12, 16, 4), np.uint8)),
        "images of no height": _instead("images", lambda file: np.zeros((6, 0, 16, 3), np.uint8)),
        "images are references": _instead(
            "images", lambda file: file.create_dataset("images", (6,), dtype=h5py.ref_dtype) and None
        ),
        "actions are text": _instead("actions", lambda file: np.array([[b"w", b"a", b"s"]] * 6)),
        "actions are complex": _instead("actions", lambda file: ACTIONS.astype(np.complex128)),
        "actions are records": _instead("actions", lambda file: np.zeros((6, 3), [("x", "f4")])),
        "actions are infinite": _instead("actions", lambda file: np.full((6, 3), np.inf)),
        "actions of two axes": _instead("actions", lambda file: ACTIONS[:, :2]),
        "link to nothing": _instead("images", lambda file: h5py.SoftLink("/nothing")),
        "link in a circle": _h5(hdf5_files.circle),
        "link to a lost file": _instead("images", lambda file: h5py.ExternalLink("lost.h5", "/images")),
        "link to a pipe": _link_to_a_pipe,
        "values in a lost file": _h5(hdf5_files.virtual),
        "values in /dev/zero": _declared(
            "images", IMAGES.shape, np.uint8, external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)]
        ),
        "a filter that is not here": _h5(hdf5_files.another_filter),
        "a gzip bomb": _h5(hdf5_files.bomb(6, 1024)),
        "a duration of text": _attribute("total_duration", "1.2 s"),
        "a duration of nothing": _attribute("total_duration", empty),
        "a duration of NaN": _attribute("total_duration", np.nan),
        "a duration of two": _attribute("total_duration", [1.0, 2.0]),
        "a name above the folder": _attribute("episode_name", ".."),
        "a name of 5000 letters": _attribute("episode_name", "x" * 5000),
        "a name of numbers": _attribute("episode_name", np.zeros(9)),
        "an instruction of nothing": _attribute("instruction", h5py.Empty("S1")),
        "an instruction of 60 KB": _attribute("instruction", "go " * 20_000),
        "events of too few": _h5(lambda file: file.create_dataset("action_event_types", data=[b"a"] * 5)),
        "events are a group": _h5(lambda file: file.create_group("action_event_types")),
        "an event of 10 MB": _h5(
            lambda file: file.create_dataset(
                "action_event_types", data=["x" * 10_000_000] * 6, dtype=h5py.string_dtype()
            )
        ),
        "groups that are no episodes": lambda path: h5py.File(path, "w").create_group("a/b").file.close(),
        "the layout of another project": _another_layout,
    }
    for name, write in makers.items():
        yield Case("hdf5", name, write)
    for seed in range(10):
        yield Case("hdf5", f"damaged bytes {seed}", _damaged_h5(seed), (0, REFUSED))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _safetensors(header: Any, body: bytes = b"", length: int | None = None) -> Callable[[Path], Any]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _data(struct.pack("<Q", len(text) if length is None else length) + text + body)


def _tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


_SAFETENSORS: dict[str, Callable[[Path], Any]] = {
    **_PATHS,
    "a header of 2^63 bytes": _data(struct.pack("<Q", 1 << 63) + b"{}"),
    "a header of 90 MB of brackets": _safetensors(b"[" * 90_000_000),
    "a deep header": _safetensors(b'{"a":' * 100_000),
    "a header of 1 TB": lambda path: _sparse(struct.pack("<Q", 1 << 39) + b"{")(path),
    "a header that is a list": _safetensors([1, 2]),
    "a tensor that is a list": _safetensors({"a": [1]}),
    "a shape of 10^30": _safetensors(_tensor(shape=[10**30])),
    "a shape of 10^5 sides": _safetensors(_tensor(shape=[1] * 100_000)),
    "a shape of text": _safetensors(_tensor(shape="x")),
    "a negative shape": _safetensors(_tensor(shape=[-2]), bytes(8)),
    "offsets behind the end": _safetensors(_tensor(offsets=[0, 1 << 60])),
    "offsets that overlap": _safetensors({**_tensor(), "b": _tensor()["a"]}, bytes(8)),
    "a type of numbers": _safetensors(_tensor(dtype=3), bytes(8)),
    "metadata of numbers": _safetensors({"__metadata__": 3, **_tensor()}, bytes(8)),
    "a million names": _safetensors(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}
    ),
    "half a surrogate pair": _safetensors(
        b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)
    ),
}


def _pth(description: bytes, **records: bytes) -> Callable[[Path], Any]:
    return _data(zipped({"a/data.pkl": description, "a/byteorder": b"little", **records}))


def _doubling(levels: int) -> bytes:
    """Return a pickle of a list that names the list before it twice, and so on: 2^levels leaves when it is walked."""
    code = b"\x80\x02]q\x00"
    for level in range(levels):
        code += b"]" + b"q" + bytes([level + 1]) + b"(h" + bytes([level]) + b"h" + bytes([level]) + b"e"
    return code + b"."


_PICKLES: dict[str, Callable[[Path], Any]] = {
    **_PATHS,
    "empty": _data(b""),
    "an HTML page": _data("<!DOCTYPE html><html></html>"),
    "1 TB of zeros": _sparse(b"PK\x03\x04"),
    "a zip bomb": _data(zipped({"a/data.pkl": bytes(64 << 20)}, zipfile.ZIP_DEFLATED)),
    "a memo bomb": _pth(MEMO_BOMB),
    "a string of 2^62 bytes": _pth(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x."),
    "deep tuples": _pth(b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b"."),
    "a list that doubles": _pth(_doubling(60)),
    "a list in itself": _pth(b"\x80\x02]q\x00h\x00a."),
    "os.system": _pth(pickle.dumps({"model": Call(os.system, "false")}, 2)),
    "bytearray of 2^40": _pth(pickle.dumps({"model": Call(bytearray, 1 << 40)}, 2)),
    "a bare pickle": _data(pickle.dumps({"a": 1}, 2)),
    "opcodes of noise": _pth(random.Random(3).randbytes(3000)),
    "a number of 1 MB": _pth(b"\x80\x02\x8b" + struct.pack("<I", 1_000_000) + b"\x7f" * 1_000_000 + b"."),
    "a zip of 20000 names": _data(zipped({f"a/data/{i}": b"" for i in range(20_000)})),
    "a zip cut at its end": _data(zipped({"a/data.pkl": pickle.dumps({}, 2)})[:-10]),
}

# --- bags -------------------------------------------------------------------------------------------------------------


def _database(*statements: str, rows: int = 0) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            for statement in statements:
                connection.execute(statement)
            for index in range(rows):
                connection.execute("INSERT INTO messages VALUES (?, 1, ?, ?)", (index, index, b"x"))
            connection.commit()

    return write


_TOPICS = "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT, offered TEXT)"
_MESSAGES = "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, data BLOB)"
_TOPIC = "INSERT INTO topics VALUES (1, '/image_raw', 'sensor_msgs/msg/Image', 'cdr', '')"
_ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i"

_DB3: dict[str, Callable[[Path], Any]] = {
    **_PATHS,
    "empty": _data(b""),
    "noise": _data(random.Random(4).randbytes(9000)),
    "signature alone": _data(b"SQLite format 3\0"),
    "no tables": _database("CREATE TABLE other(a)"),
    "topics that never end": _database(
        _MESSAGES,
        f"CREATE VIEW topics AS {_ENDLESS} AS id, '/a' AS name, 'std_msgs/msg/String' AS type, "
        "'cdr' AS serialization_format, '' AS offered FROM n",
    ),
    "messages that never end": _database(
        _TOPICS,
        _TOPIC,
        f"CREATE VIEW messages AS {_ENDLESS} AS id, 1 AS topic_id, i AS timestamp, x'00' AS data FROM n",
    ),
    "a message of 900 MB": _database(
        _TOPICS,
        _TOPIC,
        "CREATE VIEW messages AS SELECT 1 AS id, 1 AS topic_id, 1 AS timestamp, zeroblob(900000000) AS data",
    ),
    "a topic of numbers": _database(_TOPICS, _MESSAGES, "INSERT INTO topics VALUES (1, 2, 3, 4, 5)", rows=3),
    "a stamp of text": _database(
        _TOPICS,
        _TOPIC,
        "CREATE TABLE messages(id, topic_id, timestamp, data)",
        "INSERT INTO messages VALUES (1, 1, 'x', 'y')",
    ),
    "messages of noise": _database(_TOPICS, _TOPIC, _MESSAGES, rows=20),
}

_MCAP_MAGIC = b"\x89MCAP0\r\n"


def _record(code: int, body: bytes, length: int | None = None) -> bytes:
    return bytes([code]) + struct.pack("<Q", len(body) if length is None else length) + body


def _string(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text


def _chunk(records: bytes, compression: bytes, size: int) -> bytes:
    return struct.pack("<QQQI", 0, 1, size, 0) + _string(compression) + struct.pack("<Q", len(records)) + records


_HEADER = _record(1, _string(b"ros2") + _string(b"x"))


def _zstd_bomb(path: Path) -> None:
    import zstandard

    packer = zstandard.ZstdCompressor(level=1).compressobj()
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(4096)) + packer.flush()
    path.write_bytes(_MCAP_MAGIC + _HEADER + _record(6, _chunk(packed, b"zstd", 4 << 30)) + _MCAP_MAGIC)


_MCAP: dict[str, Callable[[Path], Any]] = {
    **_PATHS,
    "empty": _data(b""),
    "magic alone": _data(_MCAP_MAGIC),
    "another magic": _data(b"\x88MCAP0\r\n" + _HEADER),
    "a record of 2^63 bytes": _data(_MCAP_MAGIC + _HEADER + _record(5, b"x", 1 << 63)),
    "a record of 2^40 bytes": _data(_MCAP_MAGIC + _HEADER + _record(6, b"x", 1 << 40)),
    "1 TB in one record": lambda path: _sparse(_MCAP_MAGIC + _HEADER + _record(5, b"", 1 << 39))(path),
    "a string of 2^32 bytes": _data(_MCAP_MAGIC + _record(1, struct.pack("<I", 0xFFFFFFFF) + b"x") + _MCAP_MAGIC),
    "a zstd bomb": _zstd_bomb,
    "an unknown compression": _data(_MCAP_MAGIC + _HEADER + _record(6, _chunk(b"x", b"brotli", 9)) + _MCAP_MAGIC),
    "a million empty records": _data(_MCAP_MAGIC + _HEADER + _record(0x80, b"") * 300_000),
    "noise": _data(_MCAP_MAGIC + random.Random(5).randbytes(5000)),
}

# --- images, tables, lists --------------------------------------------------------------------------------------------


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """Return a PNG of a size; `body` is its pixels before compression."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(body)) + part(b"IEND", b"")


_IMAGES: dict[str, Callable[[Path], Any]] = {
    **_PATHS,
    "empty": _data(b""),
    "noise": _data(random.Random(6).randbytes(3000)),
    "1 TB of zeros": _sparse(b"\x89PNG\r\n\x1a\n"),
    "60000 x 60000 in the header": _data(png(60_000, 60_000)),
    "20000 x 20000 of zeros": _data(png(20_000, 20_000, bytes(60_001 * 20_000 // 100))),
    "1 x 1000000": _data(png(1, 1_000_000, bytes(4_000_000))),
    "no width": _data(png(0, 10)),
    "a TIFF": _data(b"II*\0" + struct.pack("<I", 8) + bytes(40)),
    "a BMP of 2^31 rows": _data(
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 9, -(2**31), 1, 24, 0, 0, 1, 1, 0, 0)
    ),
    "an SVG": _data("<svg xmlns='http://www.w3.org/2000/svg'/>"),
}

_TABLES: dict[str, Callable[[Path], Any]] = {
    **_PATHS,
    "a folder": Path.mkdir,
    "empty": _data(b""),
    "noise": _data(random.Random(7).randbytes(3000)),
    "1 TB of zeros": _sparse(b"stamp_s,image,steering,throttle\n"),
    "a field of 10 MB": _data("stamp_s,image,steering,throttle\n" + "x" * 10_000_000),
}

_LISTS: dict[str, Callable[[Path], Any]] = {
    **_PATHS,
    "a folder": Path.mkdir,
    "empty": _data(b""),
    "noise": _data(random.Random(8).randbytes(3000)),
    "1 TB of zeros": _sparse(b"0"),
    "names above the folder": _data(f"{'0' * 64}  ../../../etc/passwd\n"),
}

_KINDS: dict[str, dict[str, Callable[[Path], Any]]] = {
    "settings": {**_JSON, **_SETTINGS},
    "config": {**_JSON, **_CONFIG},
    "index": {**_JSON, **_INDEX},
    "instructions": _JSON,
    "tokenizer": {name: _JSON[name] for name in ("pipe", "a folder", "deep objects", "1 TB of zeros", "cut", "a list")},
    "safetensors": _SAFETENSORS,
    "pth": _PICKLES,
    "db3": _DB3,
    "mcap": _MCAP,
    "image": _IMAGES,
    "table": _TABLES,
    "list": _LISTS,
}

#: What is no fault: (kind, name) -> exit statuses that are right.
_ALLOWED = {
    # A config.json of another program is left alone.
    **{("config", name): (0, REFUSED) for name in ("a list", "a word", "NaN")},
}


def cases() -> list[Case]:
    """Return all cases, in an order that never changes."""
    found = list(_hdf5_cases())
    for kind, makers in _KINDS.items():
        found += [Case(kind, name, write, _ALLOWED.get((kind, name), (REFUSED,))) for name, write in makers.items()]
    return found
