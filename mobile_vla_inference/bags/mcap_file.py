"""Read one mcap file: in the order of time by its index, or in its own order where it has none or breaks off.

Nothing is unpacked or loaded before its size is known and found sane, whatever the file says about itself.
"""

from __future__ import annotations

import heapq
import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import lz4.frame
import numpy as np
import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import Channel, ChunkIndex, Footer, Schema, Statistics

from mobile_vla_inference.bags.source import (
    MAX_MESSAGE_BYTES,
    MAX_TIME_NS,
    BagError,
    BagMessage,
    Tally,
    Topic,
    add_once,
    is_latched,
    note_damage,
    topics_of,
)

MAGIC = b"\x89MCAP0\r\n"

#: Recorders begin a new chunk after about a MiB; a single message may be longer.
MAX_CHUNK_BYTES = 2 * MAX_MESSAGE_BYTES
#: Unpacked chunks that may be open at the same time, because their times overlap.
_MAX_OPEN_BYTES = 2 * MAX_CHUNK_BYTES
#: A larger summary is not loaded: the file is read in its order then.
_MAX_SUMMARY_BYTES = 32 << 20
_MAX_TOPIC_CHARACTERS = 1000

_HEAD = struct.Struct("<BQ")
_MESSAGE = struct.Struct("<HIQQ")
_CHUNK = struct.Struct("<QQQII")
_FOOTER_BYTES = 20

#: What a broken file makes its parsers raise; a record may end anywhere, also inside a compressed chunk.
_BROKEN = (McapError, struct.error, zstandard.ZstdError, UnicodeDecodeError, RuntimeError, ValueError, EOFError)


class _Record(NamedTuple):
    """Where a record's content lies."""

    opcode: int
    at: int
    length: int


class McapFile:
    """An mcap file that is open for reading; a context manager."""

    def __init__(self, file: Path, name: Path, notes: list[str]) -> None:
        """Prepare a file; `name` is what it is called in sentences."""
        self._file = file
        self._name = name
        self._notes = notes
        self._stream: BinaryIO | None = None
        self._size = 0
        self._tally = Tally()
        self._schemas: dict[int, str] = {}
        self._channels: dict[int, Topic] = {}
        self._chunks: list[ChunkIndex] | None = None
        self.topics: list[Topic] = []
        self.start_ns: int | None = None

    def __enter__(self) -> McapFile:
        """Read the summary; without one, the whole file once: channels may be declared in any chunk."""
        self._stream = self._file.open("rb")
        try:
            self._size = os.fstat(self._stream.fileno()).st_size
            counts = self._read_summary()
            if counts is None:
                self._schemas.clear()
                self._channels.clear()
                counts = {}
                for key, time_ns, _ in self._in_file_order(None):
                    counts[key] = counts.get(key, 0) + 1
                    self._tally.add(self._channels[key].type_name, time_ns)
                self.start_ns = self._tally.first_ns
        except BaseException:
            self._stream.close()
            raise
        told = {key: channel for key, channel in self._channels.items() if self._chunks is not None or key in counts}
        self.topics = topics_of(told, counts)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def messages(self, topics: set[str], start_ns: int | None) -> Iterator[BagMessage]:
        """Yield messages in the order of their time, or of the file where it has no index."""
        wanted = {key for key, channel in self._channels.items() if channel.name in topics}
        found = self._in_file_order(wanted) if self._chunks is None else self._in_time_order(wanted, start_ns)
        number = 0
        for key, time_ns, data in found:
            number += 1
            if start_ns is None or time_ns >= start_ns:
                yield BagMessage(self._channels[key].name, time_ns, data)
        told = sum(topic.count for topic in self.topics if topic.name in topics)
        if start_ns is None and self._chunks is not None and number != told:
            sentence = f"{self._name.name} tells of {told} messages on {', '.join(sorted(topics))}, but holds {number}"
            add_once(self._notes, f"{sentence}: all that it holds were read")

    # ---- by the index ------------------------------------------------------------------------------------------------

    def _read_summary(self) -> dict[int, int] | None:
        """Return the messages per channel; None where the file has no summary, or one that can't be trusted."""
        try:
            section = self._summary_section()
            statistics: Statistics | None = None
            chunks: list[ChunkIndex] = []
            for record in _records_in(section) if section is not None else ():
                content = ReadDataStream(BytesIO(section[record.at : record.at + record.length]))
                if record.opcode == Opcode.CHUNK_INDEX:
                    chunks.append(ChunkIndex.read(content))
                elif record.opcode == Opcode.STATISTICS:
                    statistics = Statistics.read(content)
                elif record.opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                    self._learn(record.opcode, content)
        except _BROKEN:
            return None
        if statistics is None or not set(statistics.channel_message_counts) <= set(self._channels):
            return None
        if not self._is_sound(chunks, statistics):
            return None
        self._chunks = sorted(chunks, key=lambda chunk: (chunk.message_start_time, chunk.chunk_start_offset))
        starts = [chunk.message_start_time for chunk in chunks if chunk.message_start_time < MAX_TIME_NS]
        self.start_ns = min(starts, default=None) if statistics.message_count else None
        return dict(statistics.channel_message_counts)

    def _summary_section(self) -> bytes | None:
        """Return the bytes between the data and the footer; None where there are none or too many."""
        footer_at = self._size - len(MAGIC) - _FOOTER_BYTES
        if footer_at - _HEAD.size < len(MAGIC):
            return None
        tail = self._read(footer_at - _HEAD.size, self._size - footer_at + _HEAD.size)
        if _HEAD.unpack_from(tail) != (Opcode.FOOTER, _FOOTER_BYTES) or not tail.endswith(MAGIC):
            return None
        start = Footer.read(ReadDataStream(BytesIO(tail[_HEAD.size :]))).summary_start
        length = footer_at - _HEAD.size - start
        return self._read(start, length) if start and 0 < length <= _MAX_SUMMARY_BYTES else None

    def _is_sound(self, chunks: list[ChunkIndex], statistics: Statistics) -> bool:
        """Whether chunks can be read by the index: each once, each telling its channels, few at a time."""
        for chunk in chunks:
            self._check_chunk_size(chunk.uncompressed_size)
            end = chunk.chunk_start_offset + _HEAD.size
            if end > self._size or (chunk.message_start_time > chunk.message_end_time):
                return False
        if len({chunk.chunk_start_offset for chunk in chunks}) != len(chunks):
            return False
        if not chunks:
            return False
        if not all(chunk.message_index_offsets for chunk in chunks):
            return False
        return _most_open_bytes(chunks) <= _MAX_OPEN_BYTES

    def _in_time_order(self, wanted: set[int], start_ns: int | None) -> Iterator[tuple[int, int, bytes]]:
        chunks = [
            chunk
            for chunk in self._chunks
            if not wanted.isdisjoint(chunk.message_index_offsets)
            and (start_ns is None or chunk.message_end_time >= start_ns)
        ]
        # A chunk is opened when its time has come: its first entry tells that time and no message.
        merged = heapq.merge(*(self._of_chunk(number, chunk, wanted) for number, chunk in enumerate(chunks)))
        try:
            for time_ns, _, _, key, data in merged:
                if data is not None:
                    yield key, time_ns, data
        except _BROKEN as error:
            raise BagError(
                f"{self._name} is damaged ({error}), expected a whole mcap file; copy it again, or rescue what is left "
                "with `mcap recover`"
            ) from error

    def _of_chunk(
        self, number: int, chunk: ChunkIndex, wanted: set[int]
    ) -> Iterator[tuple[int, int, int, int, bytes | None]]:
        """Yield (time, chunk, place, channel, bytes) in the order of the time; the first stands for the chunk."""
        yield chunk.message_start_time, number, -1, 0, None
        opcode, length = _HEAD.unpack(self._read(chunk.chunk_start_offset, _HEAD.size))
        if opcode != Opcode.CHUNK:
            raise ValueError("its index names a place where no chunk is")
        data = self._unpacked(_Record(opcode, chunk.chunk_start_offset + _HEAD.size, length))
        times, places = array("Q"), array("Q")
        for record in _records_in(data):
            if record.opcode == Opcode.MESSAGE:
                key, _, time_ns, _ = _MESSAGE.unpack_from(data, record.at)
                if not chunk.message_start_time <= time_ns <= chunk.message_end_time:
                    raise ValueError("a message lies outside the time that its chunk tells")
                if self._is_wanted(key, time_ns, wanted):
                    times.append(time_ns)
                    places.append(record.at)
        for index in np.argsort(np.frombuffer(times, dtype=np.uint64), kind="stable") if times else ():
            at = places[index]
            _, length = _HEAD.unpack_from(data, at - _HEAD.size)
            key, _, time_ns, _ = _MESSAGE.unpack_from(data, at)
            yield time_ns, number, at, key, data[at + _MESSAGE.size : at + length]

    # ---- in the order of the file ------------------------------------------------------------------------------------

    def _in_file_order(self, wanted: set[int] | None) -> Iterator[tuple[int, int, bytes]]:
        """Yield (channel, time, bytes) up to where the file ends or breaks off; None: all, without their bytes."""
        try:
            for record in self._records():
                if record.opcode == Opcode.CHUNK:
                    data = self._unpacked(record)
                    for inner in _records_in(data):
                        if inner.opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                            content = data[inner.at : inner.at + inner.length]
                            self._learn(inner.opcode, ReadDataStream(BytesIO(content)))
                        elif inner.opcode == Opcode.MESSAGE:
                            key, _, time_ns, _ = _MESSAGE.unpack_from(data, inner.at)
                            if self._is_wanted(key, time_ns, wanted):
                                body = b""
                                if wanted is not None:
                                    body = data[inner.at + _MESSAGE.size : inner.at + inner.length]
                                yield key, time_ns, body
                elif record.opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                    if record.length > MAX_MESSAGE_BYTES:
                        raise ValueError("a schema that is too long")
                    self._learn(record.opcode, ReadDataStream(BytesIO(self._read(record.at, record.length))))
                elif record.opcode == Opcode.MESSAGE:
                    key, _, time_ns, _ = _MESSAGE.unpack(self._read(record.at, _MESSAGE.size))
                    if self._is_wanted(key, time_ns, wanted):
                        body = b""
                        if wanted is not None:
                            body = self._message(key, record)
                        yield key, time_ns, body
        except _BROKEN:
            # Without an index, the first time through counts all that can be read.
            note_damage(self._notes, self._name, self._tally, empty=self._size == 0)

    def _records(self) -> Iterator[_Record]:
        """Yield the records from the file's beginning to its footer; raise EOFError where it ends before."""
        at = len(MAGIC)
        if self._read(0, at) != MAGIC:
            raise ValueError("no mcap file")
        while True:
            opcode, length = _HEAD.unpack(self._read(at, _HEAD.size))
            at += _HEAD.size
            if length > self._size - at:
                raise EOFError("a record that ends after the file")
            if length == 0:  # no record is empty, but a disk that was full leaves zeros without end
                raise EOFError("an empty record")
            if opcode == Opcode.FOOTER:
                if self._read(at + length, len(MAGIC)) != MAGIC:
                    raise EOFError("nothing after the footer")
                return
            yield _Record(opcode, at, length)
            at += length

    def _message(self, key: int, record: _Record) -> bytes:
        if record.length > MAX_MESSAGE_BYTES:
            raise BagError(
                f"{self._name} holds a message of {record.length >> 20} MiB on {self._channels[key].name}, expected at "
                f"most {MAX_MESSAGE_BYTES >> 20} MiB; leave that topic out"
            )
        return self._read(record.at + _MESSAGE.size, record.length - _MESSAGE.size)

    def _is_wanted(self, key: int, time_ns: int, wanted: set[int] | None) -> bool:
        if time_ns >= MAX_TIME_NS:
            add_once(self._notes, f"{self._name.name} holds messages of a time beyond all ROS times: they are left out")
            return False
        return key in (self._channels if wanted is None else wanted)

    # ---- both --------------------------------------------------------------------------------------------------------

    def _learn(self, opcode: int, content: ReadDataStream) -> None:
        """Keep what a schema or a channel says; what it says first stands."""
        if opcode == Opcode.SCHEMA:
            schema = Schema.read(content)
            self._schemas.setdefault(schema.id, schema.name[:_MAX_TOPIC_CHARACTERS])
        else:
            channel = Channel.read(content)
            if len(channel.topic) > _MAX_TOPIC_CHARACTERS:
                raise ValueError("a topic's name that is too long")
            self._channels.setdefault(
                channel.id,
                Topic(
                    channel.topic,
                    self._schemas.get(channel.schema_id, ""),
                    0,
                    channel.message_encoding[:_MAX_TOPIC_CHARACTERS],
                    is_latched(channel.metadata.get("offered_qos_profiles", "")),
                ),
            )

    def _read(self, at: int, length: int) -> bytes:
        self._stream.seek(at)
        data = self._stream.read(length)
        if len(data) < length:
            raise EOFError("a record that ends after the file")
        return data

    def _unpacked(self, record: _Record) -> bytes:
        """Return what a chunk holds; its size is checked before and while it is unpacked."""
        _, _, size, crc, name_length = _CHUNK.unpack(self._read(record.at, _CHUNK.size))
        at = record.at + _CHUNK.size
        end = record.at + record.length
        if name_length > end - at:
            raise EOFError("a chunk that ends in its head")
        compression = self._read(at, name_length)[:_MAX_TOPIC_CHARACTERS].decode()
        at += name_length
        (packed_size,) = struct.unpack("<Q", self._read(at, 8))
        at += 8
        if packed_size > end - at:
            raise EOFError("a chunk that is longer than its record")
        self._check_chunk_size(size)
        # What can't be packed grows a little.
        self._check_chunk_size(packed_size - (packed_size >> 6) - 4096)
        data = self._unpack(compression, self._read(at, packed_size), size)
        if len(data) != size:
            raise ValueError(f"a chunk of another size than the {size} bytes that it tells")
        if crc and zlib.crc32(data) != crc:
            raise ValueError("a chunk whose checksum is wrong")
        return data

    def _unpack(self, compression: str, packed: bytes, size: int) -> bytes:
        """Unpack at most a byte more than `size`."""
        if not compression:
            return packed
        if compression == "zstd":
            return zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True).read(size + 1)
        if compression == "lz4":
            return lz4.frame.LZ4FrameDecompressor().decompress(packed, max_length=size + 1)
        raise BagError(
            f"{self._name} is compressed with {compression!r}, expected zstd or lz4; write it anew with `mcap compress`"
        )

    def _check_chunk_size(self, size: int) -> None:
        if size > MAX_CHUNK_BYTES:
            raise BagError(
                f"{self._name} has a chunk of {size >> 20} MiB, expected at most {MAX_CHUNK_BYTES >> 20} MiB; write it "
                "anew with smaller chunks (`mcap compress --chunk-size`)"
            )


def _records_in(data: bytes) -> Iterator[_Record]:
    """Yield the records of a chunk or a summary; raise EOFError where the last one is cut off."""
    at = 0
    while at < len(data):
        opcode, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if length > len(data) - at:
            raise EOFError("a record that ends after its chunk")
        if opcode == Opcode.MESSAGE and length < _MESSAGE.size:
            raise EOFError("a message without a head")
        yield _Record(opcode, at, length)
        at += length


def _most_open_bytes(chunks: list[ChunkIndex]) -> int:
    """Return how many unpacked bytes are open at most while the chunks are merged by time."""
    changes = [(chunk.message_start_time, 0, chunk.uncompressed_size) for chunk in chunks]
    changes += [(chunk.message_end_time, 1, -chunk.uncompressed_size) for chunk in chunks]
    most = now = 0
    for _, _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most
