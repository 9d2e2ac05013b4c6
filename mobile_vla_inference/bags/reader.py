"""Read rosbag 2 recordings, sqlite3 and mcap, one message at a time: memory does not grow with the bag.

Only requested topics are decoded: a topic of an unknown type, or in another encoding, is no error until it is used.
storage.py finds the files of a bag; mcap_file.py and sqlite_file.py read one file each.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mobile_vla_inference.bags.source import (
    CDR,
    MAX_MESSAGE_BYTES,
    ZSTD_MAGIC,
    BagError,
    BagMessage,
    StorageReader,
    Topic,
    topics_of,
)
from mobile_vla_inference.errors import MobileVlaError

try:
    import zstandard
    from rosbags.serde import SerdeError
    from rosbags.typesys import Stores, get_typestore
    from rosbags.typesys.store import Typestore

    from mobile_vla_inference.bags.mcap_file import McapFile
    from mobile_vla_inference.bags.sqlite_file import SqliteFile
    from mobile_vla_inference.bags.storage import MCAP, StorageFile, storage_files
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
CLOCK = "rosgraph_msgs/msg/Clock"

#: What rosbags raises on wrong bytes, besides its own error: it checks little.
_BROKEN = (
    AssertionError,
    EOFError,
    LookupError,
    MemoryError,  # a length that is far too large, as with OverflowError
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class BagReader:
    """A bag that is open for reading; a context manager.

    Attributes:
        path: the bag, a folder or one file.
        topics: name -> Topic.
        notes: sentences about damage that was worked around; can grow while messages are read.
    """

    def __init__(self, path: Path | str) -> None:
        """Open a bag: a folder with storage files, or one `.mcap` or `.db3` file.

        Raises:
            BagError: there is no bag, or nothing in it can be read.
        """
        self.path = Path(path)
        self.notes: list[str] = []
        self._stack = contextlib.ExitStack()
        try:
            files = storage_files(self.path, self.notes, self._stack)
            sources = [self._stack.enter_context(_source(file, self.notes)) for file in files]
        except OSError as error:
            self._stack.close()
            raise BagError(
                f"{self.path} can't be read ({error}); check the path, its permissions and the disk"
            ) from error
        except BaseException:
            self._stack.close()
            raise
        # The files of a split bag follow each other by their times, not by their names.
        self._sources = sorted(sources, key=lambda source: (source.start_ns is None, source.start_ns or 0))
        every = [topic for source in self._sources for topic in source.topics]
        counts = {number: topic.count for number, topic in enumerate(every)}
        self.topics: dict[str, Topic] = {topic.name: topic for topic in topics_of(dict(enumerate(every)), counts)}

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
        """Number of messages in the bag, as far as it can be read."""
        return sum(topic.count for topic in self.topics.values())

    def of_type(self, *type_names: str) -> list[Topic]:
        """Return the topics of some types that can be decoded, sorted by name."""
        found = (topic for topic in self.topics.values() if topic.type_name in type_names and topic.encoding == CDR)
        return sorted(found, key=lambda topic: topic.name)

    def check_not_empty(self) -> None:
        """Raise BagError, with the notes, where the bag holds no message."""
        if self.message_count == 0:
            reasons = f" ({'; '.join(self.notes)})" if self.notes else ""
            raise BagError(
                f"{self.path} contains no messages{reasons}, expected a recorded drive; use another bag, or copy "
                "it again"
            )

    def messages(self, topics: Collection[str] | None = None, start_ns: int | None = None) -> Iterator[BagMessage]:
        """Yield the messages of some topics (None: all) from a time on, in the order of recording.

        Where a file is cut off, its iteration ends there and a note is added.

        Raises:
            BagError: a message can't be read, or a requested topic is in another encoding than ROS 2's.
        """
        for name in topics or ():
            if name in self.topics:
                check_encoding(self.path, self.topics[name])
        wanted = set(self.topics if topics is None else topics)
        for source in self._sources:
            for message in source.messages(wanted, start_ns):
                # CDR begins with a zero byte: a message with this beginning is compressed.
                yield self._unpacked(message) if message.data.startswith(ZSTD_MAGIC) else message

    def _unpacked(self, message: BagMessage) -> BagMessage:
        """Return a message that rosbag 2 compressed in its mode `message`."""
        try:
            reader = zstandard.ZstdDecompressor().stream_reader(message.data, read_across_frames=True)
            data = reader.read(MAX_MESSAGE_BYTES + 1)
        except zstandard.ZstdError as error:
            raise BagError(
                f"{self.path} contains a message on {message.topic} that zstd can't unpack ({error}), expected a whole "
                "one; copy the bag again"
            ) from error
        if len(data) > MAX_MESSAGE_BYTES:
            raise BagError(
                f"{self.path} contains a message on {message.topic} that unpacks to more than "
                f"{MAX_MESSAGE_BYTES >> 20} MiB, expected less; leave that topic out"
            )
        return message._replace(data=data)

    def decode(self, message: BagMessage) -> Any:
        """Return a message as an object with the fields of its type; raise BagError where its bytes don't fit it."""
        type_name = self.topics[message.topic].type_name
        check_encoding(self.path, self.topics[message.topic])
        try:
            return typestore().deserialize_cdr(message.data, type_name)
        except (SerdeError, *_BROKEN) as error:
            raise BagError(
                f"a message on {message.topic} ({len(message.data)} bytes) is not a {type_name}, expected its CDR "
                "bytes; check the publisher of that topic"
            ) from error


@cache
def typestore() -> Typestore:
    """Return the definitions of ROS 2's own messages; those used here are the same in Humble to Lyrical."""
    return get_typestore(Stores.ROS2_HUMBLE)


def check_encoding(bag: Path, topic: Topic) -> None:
    """Raise BagError where a topic is not in ROS 2's encoding."""
    if topic.encoding != CDR:
        raise BagError(
            f"{bag} contains {topic.name} in the encoding {topic.encoding!r}, expected ROS 2's {CDR}; "
            + (
                "convert the .bag of ROS 1 that it was made from with `rosbags-convert`"
                if topic.encoding == "ros1"
                else "record that topic with `ros2 bag record`"
            )
        )


def _source(file: StorageFile, notes: list[str]) -> StorageReader:
    kind = McapFile if file.kind == MCAP else SqliteFile
    return kind(file.path, file.name, notes)
