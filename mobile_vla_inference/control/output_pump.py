"""OutputPump: standard output and standard error that never block the process.

A write to a full pipe, or to a terminal that was stopped with Ctrl-S, blocks. rclpy's logging holds the interpreter's
lock meanwhile, so every thread would block and a stop would not be received. Here both descriptors become own pipes
that never block. One thread reads them into bounded queues; one thread for each sink (the former output and error, a
log file) writes from its queue. Output that a sink does not accept in time is dropped and counted.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import selectors
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

#: How much a sink may lag behind before output is dropped.
_QUEUE_BYTES = 1 << 20
_READ_BYTES = 1 << 16
#: The largest pipe that Linux gives an unprivileged process.
_PIPE_BYTES = 1 << 20
_LAST_STANDARD_DESCRIPTOR = 2


class _Sink:
    """One destination of the output, with a thread that may block on it."""

    def __init__(self, name: str, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._changed = threading.Condition()
        self._chunks: deque[tuple[bytes, bytes]] = deque()  # each with a notice about what was dropped before it
        self._queued_bytes = 0
        self._busy = False
        self._unannounced_lines = 0
        self.dropped_lines = 0
        threading.Thread(target=self._run, name=f"output_{name}", daemon=True).start()

    def put(self, chunk: bytes) -> None:
        """Queue a chunk, or drop it if too much waits already; never blocks."""
        with self._changed:
            if self._queued_bytes + len(chunk) > _QUEUE_BYTES:
                self._count_dropped(chunk)
                return
            notice = b""
            if self._unannounced_lines:
                notice = b"[%d lines of output were dropped: nobody read them in time]\n" % self._unannounced_lines
                self._unannounced_lines = 0
            self._chunks.append((notice, chunk))
            self._queued_bytes += len(chunk)
            self._changed.notify_all()

    def _count_dropped(self, chunk: bytes) -> None:
        lines = chunk.count(b"\n")
        self.dropped_lines += lines
        self._unannounced_lines += lines

    def drain(self, deadline_s: float) -> None:
        """Wait until everything is written, or until `deadline_s` (time.monotonic)."""
        with self._changed:
            while self._chunks or self._busy:
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0.0:
                    return
                self._changed.wait(remaining_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._chunks:
                    self._changed.wait()
                (notice, chunk), self._busy = self._chunks.popleft(), True
            try:
                self._write(notice + chunk)
            except OSError:  # a closed pipe, a full disk: counted, because no other output is left for an error
                self._count_dropped(chunk)
            with self._changed:
                self._queued_bytes -= len(chunk)
                self._busy = False
                self._changed.notify_all()


class OutputPump:
    """Decouple this process's standard output and error from their readers, from `start` to the end of the process."""

    def __init__(self) -> None:
        self._selector: selectors.BaseSelector | None = None
        # Held while a chunk is read and queued: if the pipes are empty under this lock, everything is queued.
        self._moving = threading.Lock()
        self._sinks: list[_Sink] = []
        self._file_sinks: list[_Sink] = []

    @property
    def dropped_lines(self) -> int:
        """How many lines of output were dropped so far, over all sinks."""
        return sum(sink.dropped_lines for sink in (*self._sinks, *self._file_sinks))

    def start(self) -> None:
        """Redirect descriptors 1 and 2; children that are started later inherit them."""
        _flush_streams()
        _open_closed_descriptors()
        self._selector = selectors.DefaultSelector()
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            self._redirect(name, descriptor)
        threading.Thread(target=self._run, name="output_pump", daemon=True).start()

    def _redirect(self, name: str, descriptor: int) -> None:
        original_fd = os.dup(descriptor)
        read_fd, write_fd = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        # Non-blocking although a thread reads it: a writer that holds the interpreter's lock stops that thread, too.
        os.set_blocking(write_fd, False)
        os.dup2(write_fd, descriptor)
        os.close(write_fd)
        if descriptor == 2:  # during a crash no thread runs that could copy the traceback
            faulthandler.enable(file=original_fd)
        sink = _Sink(name, lambda chunk: _write_all(original_fd, chunk))
        self._sinks.append(sink)
        self._selector.register(read_fd, selectors.EVENT_READ, sink)

    def add_file(self, path: Path) -> None:
        """Also write both to a file from now on; raise OSError if it can't be opened."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._file_sinks.append(_Sink("file", lambda chunk: _write_all(descriptor, chunk)))

    def close(self, timeout_s: float) -> None:
        """Wait until the sinks have written what waits, for `timeout_s` at most.

        The descriptors stay redirected, because the former ones can block.
        """
        deadline_s = time.monotonic() + timeout_s
        _flush_streams()
        while time.monotonic() < deadline_s and self._something_waits():
            time.sleep(0.002)
        for sink in (*self._sinks, *self._file_sinks):
            sink.drain(deadline_s)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                with self._moving:
                    chunk = os.read(key.fd, _READ_BYTES)
                    for sink in (key.data, *self._file_sinks):
                        sink.put(chunk)

    def _something_waits(self) -> bool:
        with self._moving:
            return any(map(_waiting_bytes, self._selector.get_map()))


def _open_closed_descriptors() -> None:
    """Open /dev/null for each closed standard descriptor: otherwise the next file would get its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD_DESCRIPTOR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _waiting_bytes(descriptor: int) -> int:
    """Return how many bytes wait in a pipe."""
    waiting = bytearray(4)
    fcntl.ioctl(descriptor, termios.FIONREAD, waiting)
    return int.from_bytes(waiting, sys.byteorder)
