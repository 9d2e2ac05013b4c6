"""What the readers of one storage file share: topics, messages, errors and limits that no file can lift."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from mobile_vla_inference.errors import MobileVlaError

CDR = "cdr"

#: The largest message: an image of the largest side that a frame may have, 16 bits per channel, fits.
MAX_MESSAGE_BYTES = 128 << 20

#: Times that a ROS stamp can hold: 32 bits of seconds.
MAX_TIME_NS = (1 << 31) * 1_000_000_000

_IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")

#: More text than the QoS of a topic's publishers takes.
_MAX_QOS_CHARACTERS = 1 << 16


class BagError(MobileVlaError):
    """A bag can't be used."""


@dataclass(frozen=True)
class Topic:
    """A topic of a bag.

    Attributes:
        name: as it was recorded.
        type_name: `sensor_msgs/msg/Image`; empty where the file does not tell.
        count: how many messages the file says that it holds.
        encoding: how the messages are serialised; only `cdr` can be decoded.
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


class Source(Protocol):
    """One storage file that is open for reading; `start_ns` is None where it holds no message."""

    topics: list[Topic]
    start_ns: int | None

    def messages(self, topics: set[str], start_ns: int | None) -> Iterator[BagMessage]:
        """Yield the messages of some topics from a time on."""


def is_latched(profiles: str) -> bool:
    """Whether the recorded QoS (a YAML list in the text that rosbag 2 stores) names a transient local publisher."""
    if len(profiles) > _MAX_QOS_CHARACTERS:
        return False
    values = (line.partition(":") for line in profiles.splitlines())
    # rosbag 2 wrote the number of rmw's enumeration up to Jazzy, and its name since.
    return any(
        key.strip(" -{") == "durability" and value.strip(" ,}'\"") in ("1", "transient_local")
        for key, _, value in values
    )


def topics_of(channels: Mapping[int, Topic], counts: Mapping[int, int]) -> list[Topic]:
    """Return a file's topics, one per name: several publishers may have one channel each."""
    topics: dict[str, Topic] = {}
    for key, channel in channels.items():
        known = topics.get(channel.name)
        count = counts.get(key, 0)
        if known is not None:
            channel = known if known.count or not count else channel  # the type that has messages
            count += known.count
        latched = channel.latched or (known is not None and known.latched)
        topics[channel.name] = Topic(channel.name, channel.type_name, count, channel.encoding, latched)
    return list(topics.values())


def add_once(notes: list[str], sentence: str) -> None:
    """Add a note that is not there yet."""
    if sentence not in notes:
        notes.append(sentence)


@dataclass
class Tally:
    """What was read of a file that turns out to be damaged: messages, images among them, and the time they span."""

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
    """Note once that a file was read as far as it goes, and how far that is where a `tally` of all of it tells."""
    if empty:
        add_once(notes, f"{file} is empty (0 bytes)")
        return
    sentence = f"{file} is cut off or damaged: it was read up to there"
    known = next((index for index, note in enumerate(notes) if note.startswith(sentence)), None)
    if known is None:
        notes.append(sentence if tally is None else f"{sentence} ({tally})")
    elif tally is not None and notes[known] == sentence:
        notes[known] = f"{sentence} ({tally})"
