"""Read one mcap file: in order of time by its index, or in the file's order where it has no index or is cut off.

Nothing is unpacked or loaded before its size is checked, whatever the file declares.
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
    StorageReader,
    Topic,
    add_once,
    is_latched,
    note_damage,
    topics_of,
)

MAGIC = b"\x89MCAP0\r\n"

#: Recorders begin a new chunk after about a MiB, but a single message can be longer.
MAX_CHUNK_BYTES = 2 * MAX_MESSAGE_BYTES
#: Most bytes of unpacked chunks that are open at the same time, because their times overlap.
_MAX_OPEN_BYTES = 2 * MAX_CHUNK_BYTES
#: A larger summary is not loaded; then the file is read in its own order.
_MAX_SUMMARY_BYTES = 32 << 20
_MAX_TOPIC_CHARACTERS = 1000

_HEAD = struct.Struct("<BQ")
_MESSAGE = struct.Struct("<HIQQ")
_CHUNK = struct.Struct("<QQQII")
_FOOTER_BYTES = 20

#: What the parsers raise on a broken file: a record can end anywhere, also inside a compressed chunk.
_BROKEN = (McapError, struct.error, zstandard.ZstdError, UnicodeDecodeError, RuntimeError, ValueError, EOFError)


class _Record(NamedTuple):
    """Place of a record's content in the file."""

    opcode: int
    at: int
    length: int


class McapFile(StorageReader):
    """An mcap file that is open for reading."""

    def __init__(self, file: Path, name: Path, notes: list[str]) -> None:
        super().__init__(file, name, notes)
        self._stream: BinaryIO | None = None
        self._schemas: dict[int, str] = {}
        self._chunks: list[ChunkIndex] | None = None

    def __enter__(self) -> McapFile:
        """Read the summary. Without one, read the whole file once: any chunk can declare channels."""
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
        channels = {key: each for key, each in self._channels.items() if self._chunks is not None or key in counts}
        self.topics = topics_of(channels, counts)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def messages(self, topics: set[str], start_ns: int | None) -> Iterator[BagMessage]:
        """Yield messages in order of time, or in the file's order where it has no index."""
        wanted = {key for key, channel in self._channels.items() if channel.name in topics}
        found = self._in_file_order(wanted) if self._chunks is None else self._in_time_order(wanted, start_ns)
        number = 0
        for key, time_ns, data in found:
            number += 1
            if start_ns is None or time_ns >= start_ns:
                yield BagMessage(self._channels[key].name, time_ns, data)
        declared = sum(topic.count for topic in self.topics if topic.name in topics)
        if start_ns is None and self._chunks is not None and number != declared:
            names = ", ".join(sorted(topics))
            add_once(
                self._notes,
                f"{self._name.name} declares {declared} messages on {names}, but contains {number}: all of them "
                "were read",
            )

    # ---- by the index ------------------------------------------------------------------------------------------------

    def _read_summary(self) -> dict[int, int] | None:
        """Return the messages per channel; None where the file has no summary, or an unsound one."""
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
        if not self._is_sound(chunks):
            return None
        self._chunks = sorted(chunks, key=lambda chunk: (chunk.message_start_time, chunk.chunk_start_offset))
        starts = [chunk.message_start_time for chunk in chunks if chunk.message_start_time < MAX_TIME_NS]
        self.start_ns = min(starts, default=None) if statistics.message_count else None
        return dict(statistics.channel_message_counts)

    def _summary_section(self) -> bytes | None:
        """Return the bytes between data and footer; None where there are none or too many."""
        footer_at = self._size - len(MAGIC) - _FOOTER_BYTES
        if footer_at - _HEAD.size < len(MAGIC):
            return None
        tail = self._read(footer_at - _HEAD.size, self._size - footer_at + _HEAD.size)
        if _HEAD.unpack_from(tail) != (Opcode.FOOTER, _FOOTER_BYTES) or not tail.endswith(MAGIC):
            return None
        start = Footer.read(ReadDataStream(BytesIO(tail[_HEAD.size :]))).summary_start
        length = footer_at - _HEAD.size - start
        return self._read(start, length) if start and 0 < length <= _MAX_SUMMARY_BYTES else None

    def _is_sound(self, chunks: list[ChunkIndex]) -> bool:
        """Return whether the index is usable: it has each chunk once, with its channels, and few overlap in time."""
        for chunk in chunks:
            self._check_chunk_size(chunk.uncompressed_size)
            end = chunk.chunk_start_offset + _HEAD.size
            if end > self._size or (chunk.message_start_time > chunk.message_end_time):
                return False
        if len({chunk.chunk_start_offset for chunk in chunks}) != len(chunks):
            return False
        if not chunks or not all(chunk.message_index_offsets for chunk in chunks):
            return False
        return _most_open_bytes(chunks) <= _MAX_OPEN_BYTES

    def _in_time_order(self, wanted: set[int], start_ns: int | None) -> Iterator[tuple[int, int, bytes]]:
        chunks = [
            chunk
            for chunk in self._chunks
            if not wanted.isdisjoint(chunk.message_index_offsets)
            and (start_ns is None or chunk.message_end_time >= start_ns)
        ]
        # A chunk's first entry has only its start time: the merge opens the chunk when that time comes.
        merged = heapq.merge(*(self._of_chunk(number, chunk, wanted) for number, chunk in enumerate(chunks)))
        try:
            for time_ns, _, _, key, data in merged:
                if data is not None:
                    yield key, time_ns, data
        except _BROKEN as error:
            raise BagError(
                f"{self._name} is damaged ({error}), expected a complete mcap file; copy it again, or recover the rest "
                "with `mcap recover`"
            ) from error

    def _of_chunk(
        self, number: int, chunk: ChunkIndex, wanted: set[int]
    ) -> Iterator[tuple[int, int, int, int, bytes | None]]:
        """Yield (time, chunk, place, channel, bytes) in order of time; the first has the chunk's start and no bytes."""
        yield chunk.message_start_time, number, -1, 0, None
        opcode, length = _HEAD.unpack(self._read(chunk.chunk_start_offset, _HEAD.size))
        if opcode != Opcode.CHUNK:
            raise ValueError("its index points to a place without a chunk")
        data = self._unpacked(_Record(opcode, chunk.chunk_start_offset + _HEAD.size, length))
        times, places = array("Q"), array("Q")
        for record in _records_in(data):
            if record.opcode == Opcode.MESSAGE:
                key, _, time_ns, _ = _MESSAGE.unpack_from(data, record.at)
                if not chunk.message_start_time <= time_ns <= chunk.message_end_time:
                    raise ValueError("a message is outside the time range of its chunk")
                if self._is_wanted(key, time_ns, wanted):
                    times.append(time_ns)
                    places.append(record.at)
        for index in np.argsort(np.frombuffer(times, dtype=np.uint64), kind="stable") if times else ():
            at = places[index]
            _, length = _HEAD.unpack_from(data, at - _HEAD.size)
            key, _, time_ns, _ = _MESSAGE.unpack_from(data, at)
            yield time_ns, number, at, key, data[at + _MESSAGE.size : at + length]

    # ---- in the file's order -----------------------------------------------------------------------------------------

    def _in_file_order(self, wanted: set[int] | None) -> Iterator[tuple[int, int, bytes]]:
        """Yield (channel, time, bytes) up to the end or the damage; for None, of all channels, without the bytes."""
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
            # Without an index, the first pass counts everything that can be read.
            note_damage(self._notes, self._name, self._tally, empty=self._size == 0)

    def _records(self) -> Iterator[_Record]:
        """Yield the records from the file's beginning to its footer; raise EOFError where the file ends before it."""
        at = len(MAGIC)
        if self._read(0, at) != MAGIC:
            raise ValueError("not an mcap file")
        while True:
            opcode, length = _HEAD.unpack(self._read(at, _HEAD.size))
            at += _HEAD.size
            if length > self._size - at:
                raise EOFError("a record that ends after the file")
            if length == 0:  # no record is empty, but a full disk leaves long runs of zeros
                raise EOFError("an empty record")
            if opcode == Opcode.FOOTER:
                if self._read(at + length, len(MAGIC)) != MAGIC:
                    raise EOFError("nothing after the footer")
                return
            yield _Record(opcode, at, length)
            at += length

    def _message(self, key: int, record: _Record) -> bytes:
        if record.length > MAX_MESSAGE_BYTES:
            raise self._too_large(record.length, key)
        return self._read(record.at + _MESSAGE.size, record.length - _MESSAGE.size)

    def _is_wanted(self, key: int, time_ns: int, wanted: set[int] | None) -> bool:
        if time_ns >= MAX_TIME_NS:
            add_once(
                self._notes,
                f"{self._name.name} contains messages with times that no ROS stamp can hold: they are left out",
            )
            return False
        return key in (self._channels if wanted is None else wanted)

    # ---- both orders -------------------------------------------------------------------------------------------------

    def _learn(self, opcode: int, content: ReadDataStream) -> None:
        """Keep a schema or a channel; of several with the same id, the first."""
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
        """Return a chunk's content; its size is checked before and during unpacking."""
        _, _, size, crc, name_length = _CHUNK.unpack(self._read(record.at, _CHUNK.size))
        at = record.at + _CHUNK.size
        end = record.at + record.length
        if name_length > end - at:
            raise EOFError("a chunk that ends in its header")
        compression = self._read(at, name_length)[:_MAX_TOPIC_CHARACTERS].decode()
        at += name_length
        (packed_size,) = struct.unpack("<Q", self._read(at, 8))
        at += 8
        if packed_size > end - at:
            raise EOFError("a chunk that is longer than its record")
        self._check_chunk_size(size)
        # Data that don't compress grow a little.
        self._check_chunk_size(packed_size - (packed_size >> 6) - 4096)
        data = self._unpack(compression, self._read(at, packed_size), size)
        if len(data) != size:
            raise ValueError(f"a chunk of another size than the {size} bytes that it declares")
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
            f"{self._name} is compressed with {compression!r}, expected zstd or lz4; rewrite it with `mcap compress`"
        )

    def _check_chunk_size(self, size: int) -> None:
        if size > MAX_CHUNK_BYTES:
            raise BagError(
                f"{self._name} has a chunk of {size >> 20} MiB, expected at most {MAX_CHUNK_BYTES >> 20} MiB; "
                "rewrite it with smaller chunks (`mcap compress --chunk-size`)"
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
            raise EOFError("a message without a header")
        yield _Record(opcode, at, length)
        at += length


def _most_open_bytes(chunks: list[ChunkIndex]) -> int:
    """Return the most unpacked bytes that are open at once while the chunks are merged by time."""
    changes = [(chunk.message_start_time, 0, chunk.uncompressed_size) for chunk in chunks]
    changes += [(chunk.message_end_time, 1, -chunk.uncompressed_size) for chunk in chunks]
    most = now = 0
    for _, _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most
