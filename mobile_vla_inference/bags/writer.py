"""Write rosbag 2 recordings, sqlite3 or mcap, for Humble to Lyrical."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from rosbags.interfaces import (
    Connection,
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import StoragePlugin, Writer

from mobile_vla_inference.atomic import remove_folder
from mobile_vla_inference.bags.reader import BagError, typestore

STORAGES = ("mcap", "sqlite3")

#: Every distribution from Humble on reads this version. Version 9 has a form of QoS that Humble refuses.
_BAG_VERSION = 8

#: rmw's value for infinite time.
_FOREVER = QosTime(9223372036, 854775807)
_LATCHED = Qos(
    history=QosHistory.KEEP_LAST,
    depth=1,
    reliability=QosReliability.RELIABLE,
    durability=QosDurability.TRANSIENT_LOCAL,
    deadline=_FOREVER,
    lifespan=_FOREVER,
    liveliness=QosLiveliness.AUTOMATIC,
    liveliness_lease_duration=_FOREVER,
    avoid_ros_namespace_conventions=False,
)


class BagWriter:
    """A bag that is being written; a context manager.

    It is written under a hidden name and renamed at the end, so that no partial bag appears. With `live` it is written
    in place: a recording that is cut off is still useful.
    """

    def __init__(self, path: Path | str, storage: str = "mcap", live: bool = False) -> None:
        """Prepare a bag at `path`, which must not exist yet.

        Raises:
            BagError: the path exists, or can't be written.
        """
        self.path = Path(path)
        self._live = live
        self._storage = storage
        self._connections: dict[str, Connection] = {}
        self._writer: Writer | None = None
        self._work: Path | None = None
        check_new_bag(self.path)

    def __enter__(self) -> BagWriter:
        try:
            self._open()
        except OSError as error:
            self._remove_work()
            raise BagError(f"{self.path} can't be written ({error.strerror}); choose another place") from error
        return self

    def _open(self) -> None:
        target = self.path
        if not self._live:
            self._work = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}."))
            target = self._work / self.path.name  # rosbags names the storage file after its folder
        plugin = StoragePlugin.MCAP if self._storage == "mcap" else StoragePlugin.SQLITE3
        writer = Writer(target, version=_BAG_VERSION, storage_plugin=plugin)
        writer.open()
        self._writer = writer

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        writer, self._writer = self._writer, None
        try:
            if kind is not None and not self._live:
                with contextlib.suppress(Exception):  # the first exception is the one to report
                    writer.abort()
                return
            writer.close()
            if self._work is not None:
                (self._work / self.path.name).rename(self.path)
        finally:
            self._remove_work()

    def _remove_work(self) -> None:
        if self._work is not None:
            remove_folder(self._work)

    def add_topic(self, topic: str, type_name: str, *, latched: bool = False) -> None:
        """Declare a topic of a standard ROS 2 message type; raise BagError for any other type.

        `latched`: its publishers keep their last messages for late subscribers (transient local).
        """
        if type_name not in typestore().fielddefs:
            raise BagError(f"{topic} is of type {type_name}, expected a standard ROS 2 message type; leave it out")
        self._connections[topic] = self._writer.add_connection(
            topic, type_name, typestore=typestore(), offered_qos_profiles=(_LATCHED,) if latched else ()
        )

    def write(self, topic: str, time_ns: int, data: bytes) -> None:
        """Write the CDR bytes of a message on a declared topic, recorded at `time_ns`."""
        self._writer.write(self._connections[topic], time_ns, data)

    def write_message(self, topic: str, time_ns: int, message: Any) -> None:
        """Write a message object of rosbags' typestore on a declared topic."""
        self.write(topic, time_ns, bytes(typestore().serialize_cdr(message, self._connections[topic].msgtype)))

    def commit(self) -> None:
        """Flush everything written so far to the file, so that it survives the end of this process."""
        storage = self._writer.storage
        if self._storage == "mcap":
            storage.bio.flush()
        else:
            storage.conn.commit()


def check_new_bag(path: Path) -> None:
    """Raise BagError where `path` exists, or has no parent folder."""
    if path.exists():
        raise BagError(f"{path} already exists, expected a new folder for the bag; choose another name or remove it")
    if not path.absolute().parent.is_dir():
        raise BagError(f"{path.parent} is not a folder, expected one to create {path.name} in; create it")
