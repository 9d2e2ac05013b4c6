"""Replace a folder as a whole: readers see the old one or the new one, never a mix, even if the writer is killed.

The new content is written to a hidden sibling (`.NAME.new-XXXX`) on the same file system, synchronised to the disk, and
then gets the name by one rename. If the name is used, `renameat2(RENAME_EXCHANGE)` swaps the two folders in one
step of the kernel. File systems without it (some network ones, FAT) need two renames: after a kill between them, the
old folder has the name `.NAME.old-XXXX`, and the next run renames it back.

A run holds a lock (flock) on its sibling. The sibling of a killed run has no lock, and the next run removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from mobile_vla_inference.atomic import remove_folder
from mobile_vla_inference.errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class StagedFolder:
    """A new folder that replaces `target` when it is published, and is removed otherwise.

    Use it as a context manager; the value is the folder to write to.

    Raises:
        CheckpointError: on entry, if another run writes the same target, or folders can't be locked there.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._parent = target.parent
        self._new = self._parent / f".{target.name}.new-{secrets.token_hex(4)}"
        self._lock = -1

    def __enter__(self) -> StagedFolder:
        with _locked(self._parent, wait=True) as parent_lock:
            if parent_lock is None:
                raise CheckpointError(
                    f"{self._parent} is on a file system that can't lock folders, expected a local disk; "
                    f"convert there, and copy the folder afterwards"
                )
            self._clean_up_after_killed_runs()
            try:
                self._new.mkdir()
                self._lock = os.open(self._new, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            remove_folder(self._new)  # half-written, or the folder that was replaced
        finally:
            if self._lock >= 0:
                os.close(self._lock)

    @property
    def path(self) -> Path:
        """The folder to write to."""
        return self._new

    def publish(self) -> None:
        """Synchronise every file to the disk and give the folder the target's name; replace what has that name."""
        for folder, _, names in os.walk(self._new, topdown=False):
            for name in (*names, ""):
                _sync(Path(folder) / name)
        if not self._target.exists():
            self._new.rename(self._target)
        elif not _exchange(self._new, self._target):
            self._replace_by_two_renames()
        _sync(self._parent)

    def _replace_by_two_renames(self) -> None:
        old = self._parent / f".{self._target.name}.old-{secrets.token_hex(4)}"
        try:
            self._target.rename(old)
            self._new.rename(self._target)
        finally:
            if self._target.exists():
                remove_folder(old)
            else:
                old.rename(self._target)

    def _clean_up_after_killed_runs(self) -> None:
        """Remove the folders of killed runs; raise CheckpointError if a run is alive. Needs the parent's lock."""
        for leftover in self._siblings("new"):
            with _locked(leftover, wait=False) as lock:
                if lock is None:
                    raise CheckpointError(
                        f"{self._target} is being written by another run, expected one at a time; wait until it ends"
                    )
                remove_folder(leftover)
        for old in self._siblings("old"):
            if self._target.exists():
                remove_folder(old)
            else:
                old.rename(self._target)

    def _siblings(self, kind: str) -> list[Path]:
        beginning = f".{self._target.name}.{kind}-"
        return [path for path in self._parent.iterdir() if path.name.startswith(beginning) and path.is_dir()]


def _sync(path: Path) -> None:
    """Synchronise a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[int | None]:
    """Hold a folder's lock; the value is None if another process has it, or there are no locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield None
        else:
            yield handle
    finally:
        os.close(handle)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; return False if the system or the file system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False  # a C library without it
    names = (os.fsencode(first), os.fsencode(second))
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))
