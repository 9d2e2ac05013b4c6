"""Read one sqlite3 storage file; one that was cut off or not closed is read up to the damage.

The file comes from outside: only real tables are read, sqlite's work is limited by the file's size, and the file and
the files next to it stay unchanged.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

MAGIC = b"SQLite format 3\0"

_COLUMNS = {
    "topics": ("id", "name", "type", "serialization_format"),
    "messages": ("id", "topic_id", "timestamp", "data"),
}
#: A row of `messages` takes more bytes than this in the file.
_ROW_BYTES = 8
#: Most steps of sqlite's virtual machine for one query: per byte of the file, and at least.
_STEPS_PER_BYTE = 5
_MIN_STEPS = 5_000_000
_STEPS_AT_A_TIME = 10_000
#: End of a journal that belongs to a transaction over several databases; the name of a file comes before it.
_JOURNAL_MAGIC = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"


class SqliteFile(StorageReader):
    """A sqlite3 file that is open for reading."""

    def __init__(self, file: Path, name: Path, notes: list[str]) -> None:
        super().__init__(file, name, notes)
        self._stack = contextlib.ExitStack()
        self._connection: sqlite3.Connection | None = None
        self._steps_left = 0
        self._by_time = True

    def __enter__(self) -> SqliteFile:
        try:
            self._open()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self._stack.close()
            raise BagError(
                f"{self._name} can't be read as a bag ({error}), expected a complete sqlite3 file; copy it again"
            ) from error
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        database = self._file
        self._size = database.stat().st_size
        broken_page = _broken_page(database)
        journals = _journals(database)
        if journals:
            self._size += sum(journal.stat().st_size for journal in journals)
            database = self._copy([database, *journals])
            add_once(self._notes, f"{self._name.name} was not closed: what its recorder had committed was read")
            uri = database.absolute().as_uri()
        elif broken_page:
            # sqlite would fill a page that is cut off with zeros, and with it an image.
            database = self._copy([database])
            os.truncate(database, database.stat().st_size - broken_page)
            uri = database.absolute().as_uri()
        else:
            # immutable: sqlite changes neither the file nor its folder.
            uri = f"{database.absolute().as_uri()}?immutable=1"
        self._connection = self._stack.enter_context(contextlib.closing(sqlite3.connect(uri, uri=True)))
        self._connection.set_progress_handler(self._may_go_on, _STEPS_AT_A_TIME)
        self._rows("PRAGMA trusted_schema = OFF")
        self._check_tables()
        self._channels = self._read_channels()
        counts = self._counts()
        if broken_page and not journals:
            note_damage(self._notes, self._name, self._tally)
        self.topics = topics_of(self._channels, counts)

    def _copy(self, parts: list[Path]) -> Path:
        """Copy the file and its journals to a place where sqlite can repair it; return the path of the copy."""
        size = sum(part.stat().st_size for part in parts)
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mobile_vla_bag.")))
        if shutil.disk_usage(folder).free < 1.1 * size:
            raise BagError(
                f"{self._name} was not closed, and {folder.parent} has no space for a copy of {size >> 20} MiB to "
                "recover it, expected more; set TMPDIR to a larger disk"
            )
        for part in parts:
            shutil.copyfile(part, folder / part.name)
        return folder / self._file.name

    def _may_go_on(self) -> int:
        """Return 1, which interrupts sqlite, once a query took more steps than a file of this size can need."""
        self._steps_left -= _STEPS_AT_A_TIME
        return 1 if self._steps_left < 0 else 0

    def _rows(self, query: str) -> sqlite3.Cursor:
        """Begin a query, which is interrupted once it takes more steps than the file can need."""
        self._steps_left = _MIN_STEPS + _STEPS_PER_BYTE * self._size
        return self._connection.execute(query)

    def _check_tables(self) -> None:
        """Raise BagError unless tables and columns are stored ones: computed ones could go on without end."""
        for table, columns in _COLUMNS.items():
            kinds = self._rows(f"SELECT type, rootpage FROM sqlite_master WHERE name = '{table}'").fetchall()
            # A virtual table has no root page; a computed column has `hidden` set.
            found = {row[1] for row in self._rows(f"PRAGMA table_xinfo({table})") if row[6] == 0}
            if kinds and (kinds[0][0] != "table" or not kinds[0][1]):
                kind = "virtual table" if kinds[0][0] == "table" else kinds[0][0]
                raise self._tables_error(f"{table} is not a plain table, but a {kind}")
            if not kinds or not found.issuperset(columns):
                lacking = f"the columns {', '.join(sorted(set(columns) - found))} of {table}" if kinds else table
                raise self._tables_error(f"it lacks {lacking}")

    def _tables_error(self, found: str) -> BagError:
        return BagError(
            f"{self._name} can't be read as a bag ({found}), expected rosbag 2's tables topics and messages; "
            "check the path"
        )

    def _read_channels(self) -> dict[int, Topic]:
        columns = {row[1] for row in self._rows("PRAGMA table_xinfo(topics)") if row[6] == 0}
        qos = "offered_qos_profiles" if "offered_qos_profiles" in columns else "''"
        channels = {}
        for key, name, type_name, encoding, profiles in self._rows(
            f"SELECT id, name, type, serialization_format, {qos} FROM topics"
        ):
            if isinstance(key, int) and all(isinstance(text, str) for text in (name, type_name, encoding)):
                latched = isinstance(profiles, str) and is_latched(profiles)
                channels[key] = Topic(name, type_name, 0, encoding, latched)
            else:
                note_damage(self._notes, self._name)
        return channels

    def _counts(self) -> dict[int, int]:
        """Count the messages per topic; a damaged file is counted up to the damage, and read in its own order."""
        try:
            rows = self._rows("SELECT topic_id, count(*) FROM messages NOT INDEXED GROUP BY topic_id").fetchall()
            self.start_ns, end_ns = self._rows(
                f"SELECT min(timestamp), max(timestamp) FROM messages WHERE typeof(timestamp) = 'integer' "
                f"AND timestamp BETWEEN 0 AND {MAX_TIME_NS - 1}"
            ).fetchone()
            counts = {key: count for key, count in rows if isinstance(key, int)}
            for key, count in counts.items():
                if self.start_ns is not None and key in self._channels:
                    self._tally.add(self._channels[key].type_name, self.start_ns, count)
                    self._tally.last_ns = end_ns
            return counts
        except sqlite3.DatabaseError:
            self._check_steps()
            self._by_time = False
        counts: dict[int, int] = {}
        for key, time_ns, _ in self._messages("length(data)", ""):
            counts[key] = counts.get(key, 0) + 1
            self._tally.add(self._channels[key].type_name, time_ns)
        self.start_ns = self._tally.first_ns
        return counts

    def messages(self, topics: set[str], start_ns: int | None) -> Iterator[BagMessage]:
        """Yield messages in order of time, or in the file's order where it is damaged."""
        keys = [key for key, channel in self._channels.items() if channel.name in topics]
        # Topics that are not wanted are not read from the disk.
        where = f"WHERE topic_id IN ({', '.join(str(key) for key in keys)})"
        if start_ns is not None:
            where += f" AND timestamp >= {start_ns}"
        data = f"CASE WHEN length(data) <= {MAX_MESSAGE_BYTES} THEN data ELSE length(data) END"
        for key, time_ns, body in self._messages(data, where):
            if isinstance(body, bytes):
                yield BagMessage(self._channels[key].name, time_ns, body)
            elif isinstance(body, int) and body > MAX_MESSAGE_BYTES:
                raise self._too_large(body, key)
            else:
                note_damage(self._notes, self._name)

    def _messages(self, data: str, where: str) -> Iterator[tuple[int, int, Any]]:
        # Sorted by the index, one row at a time: with a join, sqlite would sort copies of all images first.
        if self._by_time:
            index = self._time_index()
            using, order = (f"INDEXED BY {index}", "timestamp, id") if index else ("", "id")
        else:
            using, order = "NOT INDEXED", "id"
        number = 0
        try:
            for key, time_ns, body in self._rows(
                f"SELECT topic_id, timestamp, {data} FROM messages {using} {where} ORDER BY {order}"
            ):
                number += 1
                if number > self._size // _ROW_BYTES:
                    raise self._endless_error()
                if key in self._channels and isinstance(time_ns, int) and 0 <= time_ns < MAX_TIME_NS:
                    yield key, time_ns, body
                else:
                    add_once(
                        self._notes, f"{self._name.name} has rows without a topic or a ROS time: they are left out"
                    )
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            self._check_steps()
            note_damage(self._notes, self._name, self._tally)

    def _check_steps(self) -> None:
        if self._steps_left < 0:
            raise self._endless_error()

    def _endless_error(self) -> BagError:
        return BagError(
            f"{self._name} can't be read as a bag (its tables have more rows than its {self._size} bytes can hold), "
            "expected rosbag 2's tables; copy it again"
        )

    def _time_index(self) -> str | None:
        """Return the name of the index over times, which every recorder makes; None where it is missing."""
        # Columns of PRAGMA index_list: number, name, unique, origin, partial.
        names = [row[1] for row in self._rows("PRAGMA index_list(messages)") if not row[4]]
        if "timestamp_idx" not in names:
            return None
        columns = [row[2] for row in self._rows("PRAGMA index_info(timestamp_idx)")]
        return "timestamp_idx" if columns == ["timestamp"] else None


def _journals(database: Path) -> list[Path]:
    """Return the journals next to a database: changes that are not yet in it, or have to be undone."""
    candidates = [database.with_name(database.name + suffix) for suffix in ("-journal", "-wal")]
    journals = [file for file in candidates if file.is_file() and file.stat().st_size > 0]
    for journal in journals:
        with journal.open("rb") as file:
            file.seek(max(0, journal.stat().st_size - len(_JOURNAL_MAGIC)))
            if file.read() == _JOURNAL_MAGIC:
                # A rollback would remove the file that the journal names, anywhere on the disk.
                raise BagError(
                    f"{journal} belongs to a transaction over several databases, expected one of a recorder; remove it "
                    "to read the bag without it"
                )
    return journals


def _broken_page(database: Path) -> int:
    """Return how many bytes follow the last whole page of a sqlite3 file."""
    with database.open("rb") as file:
        header = file.read(100)
    page_size = int.from_bytes(header[16:18], "big")
    page_size = 65536 if page_size == 1 else page_size
    return database.stat().st_size % page_size if page_size >= 512 else 0
