"""What the readers of storage files share: the base class, topics, messages, errors, and limits for any file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mobile_vla_inference.errors import MobileVlaError

CDR = "cdr"

#: How a zstd frame begins.
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

#: The largest message: enough for an image of the largest side of a frame, with 16 bits per channel.
MAX_MESSAGE_BYTES = 128 << 20

#: Times that a ROS stamp can hold: 32 bits of seconds.
MAX_TIME_NS = (1 << 31) * 1_000_000_000

_IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")

#: Longest QoS text that is parsed: more than a topic's publishers need.
_MAX_QOS_CHARACTERS = 1 << 16


class BagError(MobileVlaError):
    """A bag can't be used."""


@dataclass(frozen=True)
class Topic:
    """A topic of a bag.

    Attributes:
        name: as recorded.
        type_name: such as `sensor_msgs/msg/Image`; empty where the file gives none.
        count: number of messages, according to the file.
        encoding: of the messages; only `cdr` can be decoded.
        latched: whether a publisher kept its last messages for late subscribers (transient local).
    """

    name: str
    type_name: str
    count: int
    encoding: str = CDR
    latched: bool = False


class BagMessage(NamedTuple):
    """One message as it was recorded: topic, time of the recording in nanoseconds, CDR bytes."""

    topic: str
    time_ns: int
    data: bytes


def is_latched(profiles: str) -> bool:
    """Return whether the QoS text of rosbag 2 (a YAML list) contains a transient local publisher."""
    if len(profiles) > _MAX_QOS_CHARACTERS:
        return False
    values = (line.partition(":") for line in profiles.splitlines())
    # rosbag 2 wrote the number of rmw's enumerator up to Jazzy, and writes its name since.
    return any(
        key.strip(" -{") == "durability" and value.strip(" ,}'\"") in ("1", "transient_local")
        for key, _, value in values
    )


def topics_of(channels: Mapping[int, Topic], counts: Mapping[int, int]) -> list[Topic]:
    """Return a file's topics, one per name: a topic has several channels where it has several publishers."""
    topics: dict[str, Topic] = {}
    for key, channel in channels.items():
        known = topics.get(channel.name)
        count = counts.get(key, 0)
        if known is not None:
            channel = known if known.count or not count else channel  # the channel that has messages
            count += known.count
        latched = channel.latched or (known is not None and known.latched)
        topics[channel.name] = Topic(channel.name, channel.type_name, count, channel.encoding, latched)
    return list(topics.values())


def add_once(notes: list[str], sentence: str) -> None:
    """Add a note, unless it is there already."""
    if sentence not in notes:
        notes.append(sentence)


@dataclass
class Tally:
    """What was read from a damaged file: numbers of messages and images, and the time between first and last."""

    messages: int = 0
    images: int = 0
    first_ns: int | None = None
    last_ns: int | None = None

    def add(self, type_name: str, time_ns: int, count: int = 1) -> None:
        """Count messages of a type, and the time of one of them."""
        self.messages += count
        self.images += count * (type_name in _IMAGE_TYPES)
        self.first_ns = time_ns if self.first_ns is None else min(self.first_ns, time_ns)
        self.last_ns = time_ns if self.last_ns is None else max(self.last_ns, time_ns)

    def __str__(self) -> str:
        seconds = 0.0 if self.first_ns is None else (self.last_ns - self.first_ns) / 1e9
        counts = ((self.messages, "message"), (self.images, "image"))
        return ", ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts) + f", {seconds:.1f} s"


def note_damage(notes: list[str], file: Path, tally: Tally | None = None, empty: bool = False) -> None:
    """Note once that a file was read up to its damage; with a `tally` of the whole file, also how much that is."""
    if empty:
        add_once(notes, f"{file} is empty (0 bytes)")
        return
    sentence = f"{file} is cut off or damaged: it was read up to there"
    known = next((index for index, note in enumerate(notes) if note.startswith(sentence)), None)
    if known is None:
        notes.append(sentence if tally is None else f"{sentence} ({tally})")
    elif tally is not None and notes[known] == sentence:
        notes[known] = f"{sentence} ({tally})"


class StorageReader(ABC):
    """One storage file that is open for reading; a context manager.

    Attributes:
        topics: of the file, known once it is open.
        start_ns: time of the first message, nanoseconds; None where the file holds none.
    """

    def __init__(self, file: Path, name: Path, notes: list[str]) -> None:
        """Prepare a file; messages and notes call it `name`, because `file` can be an unpacked copy."""
        self._file = file
        self._name = name
        self._notes = notes
        self._size = 0
        self._channels: dict[int, Topic] = {}
        self._tally = Tally()
        self.topics: list[Topic] = []
        self.start_ns: int | None = None

    @abstractmethod
    def __enter__(self) -> StorageReader:
        """Open the file; raise BagError where it can't be read."""

    @abstractmethod
    def __exit__(self, *exception: object) -> None:
        """Close the file."""

    @abstractmethod
    def messages(self, topics: set[str], start_ns: int | None) -> Iterator[BagMessage]:
        """Yield the messages of some topics, from a time on, in the order of time or else of the file."""

    def _too_large(self, size: int, channel: int) -> BagError:
        return BagError(
            f"{self._name} contains a message of {size >> 20} MiB on {self._channels[channel].name}, expected at most "
            f"{MAX_MESSAGE_BYTES >> 20} MiB; leave that topic out"
        )
