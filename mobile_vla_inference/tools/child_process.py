"""Nodes as child processes that never outlive this one, whatever ends it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

_TAIL_BYTES = 16384
#: How ROS opens a line of its log: severity, time, logger.
_LOG_PREFIX = re.compile(r"^\[(?P<severity>[A-Z]+)\] \[[\d.]+\] \[[^]]*\]: ")
_ERROR_SEVERITIES = ("ERROR", "FATAL")


class NodeProcess:
    """A node of this package in a process of its own, its output in a file."""

    def __init__(
        self,
        name: str,
        module: str,
        parameters: Mapping[str, str | float],
        log: Path,
        remappings: Mapping[str, str] | None = None,
    ) -> None:
        """Start `python -m module` with ROS parameters and remappings (`__ns` moves the node)."""
        self.name = name
        self._log = log
        arguments = [word for key, value in parameters.items() for word in ("-p", f"{key}:={_yaml_text(value)}")]
        arguments += [word for old, new in (remappings or {}).items() for word in ("-r", f"{old}:={new}")]
        command = [sys.executable, "-m", module, "--ros-args", *arguments]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RCUTILS_COLORIZED_OUTPUT": "0", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C in the terminal is ours to pass on, in order
                preexec_fn=partial(die_with, os.getpid()),
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status where it has ended (below 0: ended by that signal), else None."""
        return self._process.poll()

    def fault(self) -> str | None:
        """Return a sentence with the last error that the process told where it has ended, else None."""
        status = self._process.poll()
        if status is None:
            return None
        ending = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"{self.name} {ending}: {last_error(self._log)}"

    def stop(self, timeout_s: float) -> None:
        """Ask the process to end, and kill it and its children after `timeout_s`."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run_tool(arguments: Sequence[str]) -> subprocess.CompletedProcess:
    """Run a subcommand of `mobile_vla` in a process of its own and return its status and output."""
    return subprocess.run(
        [sys.executable, "-m", "mobile_vla_inference", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=partial(die_with, os.getpid()),
    )


def last_error(log: Path) -> str:
    """Return the last line of a log that tells an error, or the last line of all, without ROS's prefix."""
    tail = log.read_bytes()[-_TAIL_BYTES:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    errors = [line for line in lines if _tells_error(line)]
    line = (errors or lines or ["it printed nothing"])[-1]
    return _LOG_PREFIX.sub("", line)


def _tells_error(line: str) -> bool:
    prefix = _LOG_PREFIX.match(line)
    return prefix["severity"] in _ERROR_SEVERITIES if prefix else "rror:" in line


def _yaml_text(value: str | float) -> str:
    """Write a value for `-p name:=value`, which is YAML: JSON's strings and numbers are YAML's too."""
    return json.dumps(value, ensure_ascii=False)


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; runs between fork and exec."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the line above
        os._exit(1)
