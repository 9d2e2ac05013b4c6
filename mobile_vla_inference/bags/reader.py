"""Read rosbag 2 recordings, sqlite3 and mcap, one message at a time: memory stays flat whatever the size.

Only what is asked for is understood: a topic of an unknown type, or in another encoding, disturbs nobody who does not
use it. Which files a bag consists of is told by storage.py; mcap_file.py and sqlite_file.py read one each.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mobile_vla_inference.bags.source import CDR, MAX_MESSAGE_BYTES, BagError, BagMessage, Source, Topic, topics_of
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
#: How a message begins that was compressed by itself; CDR begins with a zero.
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


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
        # A bag that was split goes on in the file that begins next, whatever the files are called.
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
        """How many messages the bag holds, as far as it can be read."""
        return sum(topic.count for topic in self.topics.values())

    def of_type(self, *type_names: str) -> list[Topic]:
        """Return the topics of some types that can be decoded, in name order."""
        found = (topic for topic in self.topics.values() if topic.type_name in type_names and topic.encoding == CDR)
        return sorted(found, key=lambda topic: topic.name)

    def check_not_empty(self) -> None:
        """Raise BagError where the bag holds no message, with what was wrong with it."""
        if self.message_count == 0:
            reasons = f" ({'; '.join(self.notes)})" if self.notes else ""
            raise BagError(
                f"{self.path} holds no messages{reasons}, expected a recorded drive; give another bag, or copy it again"
            )

    def messages(self, topics: Collection[str] | None = None, start_ns: int | None = None) -> Iterator[BagMessage]:
        """Yield the messages of some topics (None: all) from a time on, in the order of recording.

        Where a file breaks off, the iteration ends there and a note is added.

        Raises:
            BagError: a message can't be read, or a topic that is named is in another encoding than ROS 2's.
        """
        for name in topics or ():
            if name in self.topics:
                check_encoding(self.path, self.topics[name])
        wanted = set(self.topics if topics is None else topics)
        for source in self._sources:
            for message in source.messages(wanted, start_ns):
                yield self._unpacked(message) if message.data.startswith(_ZSTD_MAGIC) else message

    def _unpacked(self, message: BagMessage) -> BagMessage:
        """Return a message that was compressed by itself, as rosbag 2 does in its mode `message`."""
        try:
            reader = zstandard.ZstdDecompressor().stream_reader(message.data, read_across_frames=True)
            data = reader.read(MAX_MESSAGE_BYTES + 1)
        except zstandard.ZstdError as error:
            raise BagError(
                f"{self.path} holds a message on {message.topic} that zstd can't unpack ({error}), expected a whole "
                "one; copy the bag again"
            ) from error
        if len(data) > MAX_MESSAGE_BYTES:
            raise BagError(
                f"{self.path} holds a message on {message.topic} that unpacks to more than "
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
                f"a message on {message.topic} ({len(message.data)} bytes) is no {type_name}, expected its CDR bytes; "
                "see what published there"
            ) from error


def typestore() -> Typestore:
    """Return the definitions of ROS 2's own messages, made once; those used here are the same in Humble to Lyrical."""
    global _TYPESTORE
    if _TYPESTORE is None:
        _TYPESTORE = get_typestore(Stores.ROS2_HUMBLE)
    return _TYPESTORE


_TYPESTORE: Typestore | None = None


def check_encoding(bag: Path, topic: Topic) -> None:
    """Raise BagError where a topic is not in ROS 2's encoding."""
    if topic.encoding != CDR:
        raise BagError(
            f"{bag} holds {topic.name} in the encoding {topic.encoding!r}, expected ROS 2's {CDR}; "
            + (
                "convert the .bag of ROS 1 that it was made from with `rosbags-convert`"
                if topic.encoding == "ros1"
                else "record that topic with `ros2 bag record`"
            )
        )


def _source(file: StorageFile, notes: list[str]) -> Source:
    kind = McapFile if file.kind == MCAP else SqliteFile
    return kind(file.path, file.name, notes)
