"""Read rosbag 2 recordings, sqlite3 and mcap, one message at a time: memory stays flat whatever the size.

Whole bags are read with `rosbags`. What it refuses or would read wrongly is read here: mcap files without a footer or
index (cut off, or written as a plain stream) with `mcap`'s stream reader, sqlite3 files with a journal through a
recovered private copy, and damaged ones as far as they go.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mobile_vla_inference.border import MobileVlaError

try:
    import zstandard
    from mcap.exceptions import McapError
    from mcap.reader import make_reader
    from mcap.records import Channel, Message, Schema
    from mcap.stream_reader import StreamReader
    from rosbags.rosbag2 import Reader, ReaderError
    from rosbags.serde import SerdeError
    from rosbags.typesys import Stores, get_typestore
    from rosbags.typesys.store import Typestore
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
except ImportError as missing:
    raise MobileVlaError(
        f"bags can't be read without rosbags and mcap ({missing}), expected what requirements/workbench.txt names; "
        "run `pip install -r requirements/workbench.txt`"
    ) from missing

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
STRING = "std_msgs/msg/String"
TWIST = "geometry_msgs/msg/Twist"
TWIST_STAMPED = "geometry_msgs/msg/TwistStamped"

METADATA = "metadata.yaml"
_SUFFIXES = (".mcap", ".db3")

# What a broken file makes the readers raise; a record may end anywhere, also inside a compressed chunk.
_BROKEN_MCAP = (McapError, struct.error, zstandard.ZstdError, UnicodeDecodeError, RuntimeError, ValueError, EOFError)
#: rosbags checks little of its own: wrong bytes surface as any of these.
_BROKEN = (
    AssertionError,
    EOFError,
    LookupError,
    MemoryError,  # a length that is beyond all reason, as are those that overflow
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class BagError(MobileVlaError):
    """A bag can't be used."""


@dataclass(frozen=True)
class Topic:
    """A topic of a bag: its name, its type (`sensor_msgs/msg/Image`) and how many messages it holds."""

    name: str
    type_name: str
    count: int


class BagMessage(NamedTuple):
    """One message as it was recorded: topic, time of the recording in nanoseconds, CDR bytes."""

    topic: str
    time_ns: int
    data: bytes


class BagReader:
    """A bag that is open for reading; a context manager.

    Attributes:
        path: the bag, a folder or one file.
        topics: name -> Topic.
        notes: sentences about what was wrong with the bag and could be helped; may grow while messages are read.
    """

    def __init__(self, path: Path | str) -> None:
        """Open a bag: a folder with storage files, or one `.mcap` or `.db3` file.

        Raises:
            BagError: there is no bag, or nothing of it can be read.
        """
        self.path = Path(path)
        self.notes: list[str] = []
        self._stack = contextlib.ExitStack()
        try:
            self._sources = [self._stack.enter_context(source) for source in _sources(self.path, self.notes)]
        except OSError as error:
            self._stack.close()
            raise BagError(
                f"{self.path} can't be read ({error}); check the path, its permissions and the disk"
            ) from error
        except BaseException:
            self._stack.close()
            raise
        self.topics: dict[str, Topic] = {}
        for source in self._sources:
            for topic in source.topics:
                known = self.topics.get(topic.name)
                count = topic.count + (known.count if known is not None else 0)
                self.topics[topic.name] = Topic(topic.name, topic.type_name, count)

    def __enter__(self) -> BagReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    @property
    def start_ns(self) -> int | None:
        """Time of the first message, nanoseconds; None in an empty bag."""
        return min((source.start_ns for source in self._sources if source.start_ns is not None), default=None)

    @property
    def message_count(self) -> int:
        """How many messages the bag holds, as far as it can be read."""
        return sum(topic.count for topic in self.topics.values())

    def of_type(self, *type_names: str) -> list[Topic]:
        """Return the topics of some types, in name order."""
        return sorted((t for t in self.topics.values() if t.type_name in type_names), key=lambda topic: topic.name)

    def messages(self, topics: Collection[str] | None = None, start_ns: int | None = None) -> Iterator[BagMessage]:
        """Yield the messages of some topics (None: all) from a time on, in the order of recording.

        Where a file breaks off, the iteration ends there and a note is added.
        """
        wanted = set(self.topics if topics is None else topics)
        for source in self._sources:
            yield from source.messages(wanted, start_ns)

    def decode(self, message: BagMessage) -> Any:
        """Return a message as an object with the fields of its type; raise BagError where its bytes don't fit it."""
        type_name = self.topics[message.topic].type_name
        try:
            return typestore().deserialize_cdr(message.data, type_name)
        except (SerdeError, *_BROKEN) as error:
            raise BagError(
                f"a message on {message.topic} ({len(message.data)} bytes) is no {type_name}, expected its CDR bytes; "
                "record the bag again"
            ) from error


def typestore() -> Typestore:
    """Return the definitions of ROS 2's own messages, made once; those used here are the same in Humble to Lyrical."""
    global _TYPESTORE
    if _TYPESTORE is None:
        _TYPESTORE = get_typestore(Stores.ROS2_HUMBLE)
    return _TYPESTORE


_TYPESTORE: Typestore | None = None


# ---- files of a bag --------------------------------------------------------------------------------------------------


def _sources(path: Path, notes: list[str]) -> list[_RosbagsSource | _McapStream | _Sqlite]:
    """Return what reads the bag: rosbags for all of it, or one source per file where a file needs care."""
    if not path.exists():
        raise BagError(f"{path} does not exist, expected a bag: a folder, a .mcap or a .db3 file; check the path")
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise BagError(f"{path} is no bag, expected a folder, a .mcap or a .db3 file; check the path")
        return [_source(path, notes)]
    metadata = _metadata(path, notes)
    if str(metadata.get("compression_mode", "")).lower() in ("file", "message"):
        return [_RosbagsSource(path)]
    named = [path / Path(str(name)).name for name in metadata.get("relative_file_paths") or ()]
    files = [file for file in named if file.exists()]
    if missing := [file.name for file in named if not file.exists()]:
        notes.append(f"{path} lacks {', '.join(missing)}, which its {METADATA} names: the rest was read")
    if not named:
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if not files:
        raise BagError(f"{path} holds no .mcap or .db3 file, expected a bag's; check the path")
    return [_source(file, notes) for file in files]


def _metadata(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Return a bag's metadata; empty, with a note, where it is missing or broken."""
    file = folder / METADATA
    try:
        content = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
        return dict(content["rosbag2_bagfile_information"])
    except FileNotFoundError:
        notes.append(f"{folder} has no {METADATA} (the recorder was not closed): its files were read without")
    except (OSError, YAMLError, KeyError, TypeError, ValueError):
        notes.append(f"{file} is broken: the bag's files were read without it")
    return {}


def _source(file: Path, notes: list[str]) -> _RosbagsSource | _McapStream | _Sqlite:
    if file.suffix == ".db3":
        return _Sqlite(file, notes)
    return _RosbagsSource(file) if _has_message_index(file) else _McapStream(file, notes)


def _has_message_index(file: Path) -> bool:
    """Whether an mcap file is whole and every chunk tells which channels it holds."""
    try:
        with file.open("rb") as stream:
            summary = make_reader(stream).get_summary()
    except (OSError, *_BROKEN_MCAP):  # mcap seeks before the beginning of a short file
        return False
    return (
        summary is not None
        and summary.statistics is not None
        and bool(summary.chunk_indexes)
        and all(chunk.message_index_offsets for chunk in summary.chunk_indexes)
    )


class _RosbagsSource:
    """A whole bag, or one whole file of it, read with rosbags."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = Reader(path)
        self.topics: list[Topic] = []
        self.start_ns: int | None = None

    def __enter__(self) -> _RosbagsSource:
        try:
            self._reader.open()
        except (ReaderError, *_BROKEN) as error:
            raise BagError(f"{self._path} can't be read as a bag ({error}); record it again") from error
        self.topics = [Topic(c.topic, c.msgtype, c.msgcount) for c in self._reader.connections]
        if self._reader.message_count:
            self.start_ns = self._reader.start_time
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.close()

    def messages(self, topics: set[str], start_ns: int | None) -> Iterator[BagMessage]:
        """Yield messages in the order of their time."""
        connections = [connection for connection in self._reader.connections if connection.topic in topics]
        if not connections:
            return
        try:
            for connection, time_ns, data in self._reader.messages(connections, start=start_ns):
                yield BagMessage(connection.topic, time_ns, data)
        except (ReaderError, *_BROKEN) as error:
            raise BagError(f"{self._path} is damaged ({error}), expected a whole bag; copy it again") from error


class _McapStream:
    """An mcap file without a footer or an index, read from its beginning to where it ends or breaks off."""

    def __init__(self, file: Path, notes: list[str]) -> None:
        self._file = file
        self._notes = notes
        self.topics: list[Topic] = []
        self.start_ns: int | None = None

    def __enter__(self) -> _McapStream:
        """Read the whole file once: channels may be declared in any chunk."""
        types: dict[str, str] = {}
        counts: dict[str, int] = {}
        for topic, type_name, message in self._read():
            types[topic] = type_name
            counts[topic] = counts.get(topic, 0) + 1
            self.start_ns = message.log_time if self.start_ns is None else min(self.start_ns, message.log_time)
        self.topics = [Topic(topic, type_name, counts[topic]) for topic, type_name in types.items()]
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing stays open between two readings."""

    def messages(self, topics: set[str], start_ns: int | None) -> Iterator[BagMessage]:
        """Yield messages in the order of the file, which is that of the recording."""
        for topic, _, message in self._read():
            if topic in topics and (start_ns is None or message.log_time >= start_ns):
                yield BagMessage(topic, message.log_time, message.data)

    def _read(self) -> Iterator[tuple[str, str, Message]]:
        schemas: dict[int, Schema] = {}
        channels: dict[int, Channel] = {}
        with self._file.open("rb") as stream:
            try:
                # A longer record than the file is damage, not something to make room for.
                for record in StreamReader(stream, record_size_limit=self._file.stat().st_size).records:
                    if isinstance(record, Schema):
                        schemas[record.id] = record
                    elif isinstance(record, Channel):
                        _check_encoding(self._file, record)
                        channels[record.id] = record
                    elif isinstance(record, Message) and record.channel_id in channels:
                        channel = channels[record.channel_id]
                        schema = schemas.get(channel.schema_id)
                        yield channel.topic, schema.name if schema is not None else "", record
            except _BROKEN_MCAP:
                _add_once(self._notes, f"{self._file.name} is cut off or damaged: it was read up to there")


class _Sqlite:
    """A sqlite3 storage file; one that was cut off is read as far as it goes."""

    def __init__(self, file: Path, notes: list[str]) -> None:
        self._file = file
        self._notes = notes
        self._stack = contextlib.ExitStack()
        self._connection: sqlite3.Connection | None = None
        self._names: dict[int, str] = {}
        self._by_time = True
        self.topics: list[Topic] = []
        self.start_ns: int | None = None

    def __enter__(self) -> _Sqlite:
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._stack.close()
            raise BagError(
                f"{self._file} can't be read as a bag ({error}), expected a whole sqlite3 file; copy it again"
            ) from error
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        database = self._file
        broken_page = _broken_page(database)
        if _journals(database):
            database = self._copy([database, *_journals(database)])
            _add_once(self._notes, f"{self._file.name} was not closed: what its recorder had committed was read")
            uri = database.absolute().as_uri()
        elif broken_page:
            # sqlite would fill up a page that is cut off with zeros, and an image with it.
            database = self._copy([database])
            os.truncate(database, database.stat().st_size - broken_page)
            _add_once(self._notes, f"{self._file.name} is cut off or damaged: it was read up to there")
            uri = database.absolute().as_uri()
        else:
            # Whatever happens, the file and its folder stay as they are.
            uri = f"{database.absolute().as_uri()}?immutable=1"
        self._connection = self._stack.enter_context(contextlib.closing(sqlite3.connect(uri, uri=True)))
        rows = self._connection.execute("SELECT id, name, type, serialization_format FROM topics").fetchall()
        for _, name, _, encoding in rows:
            if encoding != "cdr":
                raise _encoding_error(self._file, name, encoding)
        self._names = {key: name for key, name, _, _ in rows}
        counts = self._counts()
        self.topics = [Topic(name, type_name, counts.get(key, 0)) for key, name, type_name, _ in rows]

    def _copy(self, parts: list[Path]) -> Path:
        """Copy the file, and what belongs to it, where sqlite may put it in order, and return the copy's path."""
        size = sum(part.stat().st_size for part in parts)
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mobile_vla_bag.")))
        if shutil.disk_usage(folder).free < 1.1 * size:
            raise BagError(
                f"{self._file} was not closed and {folder.parent} has no room for a copy of {size >> 20} MiB to "
                "recover it in, expected more; set TMPDIR to a larger disk"
            )
        for part in parts:
            shutil.copyfile(part, folder / part.name)
        return folder / self._file.name

    def _counts(self) -> dict[int, int]:
        """Count the messages per topic; a damaged file is counted as far as it can be read, and read in its order."""
        try:
            rows = self._connection.execute("SELECT topic_id, count(*) FROM messages GROUP BY topic_id").fetchall()
            (self.start_ns,) = self._connection.execute("SELECT min(timestamp) FROM messages").fetchone()
            return dict(rows)
        except sqlite3.DatabaseError:
            self._by_time = False
        counts: dict[int, int] = {}
        for key, time_ns, _ in self._rows(""):
            counts[key] = counts.get(key, 0) + 1
            self.start_ns = time_ns if self.start_ns is None else min(self.start_ns, time_ns)
        return counts

    def messages(self, topics: set[str], start_ns: int | None) -> Iterator[BagMessage]:
        """Yield messages in the order of their time, of the file where it is damaged."""
        keys = [key for key, name in self._names.items() if name in topics]
        # Images that nobody asked for are not even read from the disk.
        where = f"WHERE topic_id IN ({', '.join(str(key) for key in keys)})"
        if start_ns is not None:
            where += f" AND timestamp >= {start_ns}"
        for key, time_ns, data in self._rows(where):
            yield BagMessage(self._names[key], time_ns, data)

    def _rows(self, where: str) -> Iterator[tuple[int, int, bytes]]:
        # Sorted by the index alone, one row at a time: a join would have sqlite sort copies of all images first.
        if self._by_time:
            index = self._time_index()
            using, order = (f"INDEXED BY {index}", "timestamp, id") if index else ("", "id")
        else:
            using, order = "NOT INDEXED", "id"
        query = f"SELECT topic_id, timestamp, data FROM messages {using} {where} ORDER BY {order}"
        try:
            yield from self._connection.execute(query)
        except sqlite3.DatabaseError:
            _add_once(self._notes, f"{self._file.name} is cut off or damaged: it was read up to there")

    def _time_index(self) -> str | None:
        """Return the index over the messages' times, which every recorder makes; None: rows are taken as recorded."""
        names = [row[1] for row in self._connection.execute("PRAGMA index_list(messages)")]
        return "timestamp_idx" if "timestamp_idx" in names else None


def _journals(database: Path) -> list[Path]:
    """Return the files beside a database that hold what belongs into it or out of it."""
    beside = [database.with_name(database.name + suffix) for suffix in ("-journal", "-wal")]
    return [file for file in beside if file.exists() and file.stat().st_size > 0]


def _broken_page(database: Path) -> int:
    """Return how many bytes follow the last whole page of a sqlite3 file."""
    with database.open("rb") as file:
        header = file.read(100)
    page_size = int.from_bytes(header[16:18], "big")
    page_size = 65536 if page_size == 1 else page_size
    return database.stat().st_size % page_size if page_size >= 512 else 0


def _check_encoding(file: Path, channel: Channel) -> None:
    if channel.message_encoding != "cdr":
        raise _encoding_error(file, channel.topic, channel.message_encoding)


def _encoding_error(file: Path, topic: str, encoding: str) -> BagError:
    return BagError(
        f"{file} holds {topic} in the encoding {encoding!r}, expected ROS 2's cdr; convert the bag with "
        "`ros2 bag convert`"
    )


def _add_once(notes: list[str], sentence: str) -> None:
    if sentence not in notes:
        notes.append(sentence)
