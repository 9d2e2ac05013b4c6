"""Nodes as child processes, which end with this process however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from mobile_vla_inference.process_lifetime import kill_on_parent_exit

_TAIL_BYTES = 16384
#: The start of a line of a ROS log: severity, time, logger.
_LOG_PREFIX = re.compile(r"^\[(?P<severity>[A-Z]+)\] \[[\d.]+\] \[[^]]*\]: ")
_ERROR_SEVERITIES = ("ERROR", "FATAL")


class OutputPipe:
    """A pipe whose output a thread writes to a file; `block` leaves the pipe unread.

    A process that writes to a full pipe waits, as it does behind `| less`, a stopped terminal or a log that hangs.
    """

    #: A process writes no NUL bytes, so the bytes that fill the pipe can be removed from its text.
    _FILLING = b"\0"

    def __init__(self, log: Path) -> None:
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reader, False)
        self._log = log.open("wb", buffering=0)
        self._leave = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        self.read()

    def read(self) -> None:
        """Write to the file what arrives from now on."""
        if self._thread is None and not self._log.closed:
            self._thread = threading.Thread(target=self._run, name="output", daemon=True)
            self._thread.start()

    def block(self) -> None:
        """Leave the pipe unread and fill it to the last byte: the next write has to wait."""
        self._end_thread()
        # Opened again: O_NONBLOCK belongs to the open file, and the process's own writes have to block.
        filler = os.open(f"/proc/self/fd/{self._reader}", os.O_WRONLY | os.O_NONBLOCK)
        try:
            for size in (select.PIPE_BUF, 1):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(filler, self._FILLING * size)
        finally:
            os.close(filler)

    def settle(self) -> None:
        """Write to the file all that has arrived."""
        if self._log.closed:
            return
        reading = self._thread is not None
        self._end_thread()
        self._copy()
        if reading:
            self.read()

    def close(self) -> None:
        """Write to the file what has arrived, and end; can be called again."""
        if self._log.closed:
            return
        self._end_thread()
        self._copy()
        self._log.close()
        os.close(self._reader)
        os.close(self._leave)

    def _end_thread(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._leave, 1)
            self._thread.join()
            os.eventfd_read(self._leave)
            self._thread = None

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader, self._leave], [], [])
            if self._leave in ready or not self._copy():
                return

    def _copy(self) -> bool:
        """Write what is in the pipe to the file; return False at its end."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reader, 1 << 16):
                self._log.write(data.replace(self._FILLING, b""))
            return False
        return True


class ChildProcess:
    """A Python process that the kernel kills when this one ends; its output goes to a file."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, *, piped: bool = False) -> None:
        """Start Python.

        Args:
            name: its name in messages.
            arguments: of Python, such as `-m` and a module.
            log: the file for its output.
            piped: pass its output through `pipe`, so that it can be blocked.
        """
        self.name = name
        self.pipe = OutputPipe(log) if piped else None
        self._log = log
        with os.fdopen(self.pipe.writer, "wb") if self.pipe is not None else log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RCUTILS_COLORIZED_OUTPUT": "0", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # a Ctrl-C in the terminal reaches this process only, which ends the others
                preexec_fn=partial(die_with, os.getpid()),
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status of a process that has ended (below 0: ended by that signal), else None."""
        return self._process.poll()

    def fault(self) -> str | None:
        """Return a sentence with the last error in the log if the process has ended, else None."""
        status = self._process.poll()
        if status is None:
            return None
        if self.pipe is not None:
            self.pipe.settle()
        ending = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"{self.name} {ending}: {last_error(self._log)}"

    def stop(self, timeout_s: float) -> None:
        """Ask the process to exit; after `timeout_s`, kill it and its children. Can be called again."""
        if self.pipe is not None:
            self.pipe.read()
        if self._process.poll() is None:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)  # a stopped process exits like any other
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        if self.pipe is not None:
            self.pipe.close()


class NodeProcess(ChildProcess):
    """A node of this package in a process of its own."""

    def __init__(
        self,
        name: str,
        module: str,
        parameters: Mapping[str, str | float],
        log: Path,
        remappings: Mapping[str, str] | None = None,
        *,
        piped: bool = False,
    ) -> None:
        """Start `python -m module` with ROS parameters and remappings (`__ns` sets the namespace)."""
        arguments = [word for key, value in parameters.items() for word in ("-p", f"{key}:={_yaml_text(value)}")]
        arguments += [word for old, new in (remappings or {}).items() for word in ("-r", f"{old}:={new}")]
        super().__init__(name, ["-m", module, "--ros-args", *arguments], log, piped=piped)


def last_error(log: Path) -> str:
    """Return the last line of a log that reports an error, else its last line, without ROS's prefix."""
    try:
        tail = log.read_bytes()[-_TAIL_BYTES:].decode("utf-8", errors="replace")
    except OSError as error:  # why the process ended is reported all the same
        return f"its log can't be read ({error})"
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    errors = [line for line in lines if _is_error(line)]
    line = (errors or lines or ["it printed nothing"])[-1]
    return _LOG_PREFIX.sub("", line)


def _is_error(line: str) -> bool:
    prefix = _LOG_PREFIX.match(line)
    return prefix["severity"] in _ERROR_SEVERITIES if prefix else "rror:" in line


def _yaml_text(value: str | float) -> str:
    """Return a value for `-p name:=value`, which is YAML: strings and numbers of JSON are valid YAML."""
    return json.dumps(value, ensure_ascii=False)


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; call it between fork and exec."""
    if not kill_on_parent_exit(parent_pid):
        os._exit(1)
