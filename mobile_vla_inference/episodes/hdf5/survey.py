"""Try HDF5 files in a process of their own first, with a limit of time and memory.

On some damaged files the HDF5 library never returns, or crashes: for example, on a global heap whose objects have no
size. Neither raises an exception, and only another process can be killed. The child reads every file's metadata and
reports how far it has come.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from mobile_vla_inference.episodes.episode import EpisodeError
from mobile_vla_inference.episodes.hdf5.reader import episodes_in

#: Longest time that one episode's metadata may take, s; and longest time of the child's imports.
EPISODE_LIMIT_S = 6.0
_START_LIMIT_S = 60.0

#: Address space of the child, including its libraries.
_MEMORY_LIMIT_BYTES = 4 << 30

#: What the child writes: it is ready, an episode is good, a file is good, and before the sentence of an error.
_READY, _EPISODE, _FILE, _REFUSED = b"r", b"e", b"f", b"!"


def survey(files: Sequence[Path]) -> None:
    """Raise EpisodeError for the first file that can't be read, takes too long, or crashes the library."""
    command = [sys.executable, "-m", __name__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (
        _file_of_names(files) as names,
        subprocess.Popen(
            command, stdin=names, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as child,
    ):
        try:
            output = _output(child, files)
        finally:
            child.kill()
    progress, _, refusal = output.partition(_REFUSED)
    if refusal:
        raise EpisodeError(refusal.decode("utf-8", errors="replace"))
    # Only a signal means that the library crashed. After any other end, the caller reads the file anyway.
    if child.returncode < 0 and progress.count(_FILE) < len(files):
        raise EpisodeError(
            f"{files[progress.count(_FILE)]} crashes the HDF5 library ({signal.Signals(-child.returncode).name}), "
            f"expected a complete file; copy it again, or leave it out"
        )


def _file_of_names(files: Sequence[Path]) -> BinaryIO:
    """Return an open file that holds the names; a pipe could fill up before the child reads."""
    names = tempfile.TemporaryFile()  # noqa: SIM115
    names.write(b"\0".join(os.fsencode(file) for file in files))
    names.seek(0)
    return names


def _output(child: subprocess.Popen, files: Sequence[Path]) -> bytes:
    """Return what the child wrote until its end; raise EpisodeError where it makes no progress."""
    output, limit_s = b"", _START_LIMIT_S
    while select.select([child.stdout], [], [], limit_s)[0]:
        part = os.read(child.stdout.fileno(), 1 << 16)
        if not part:
            child.wait()
            return output
        output, limit_s = output + part, EPISODE_LIMIT_S
    if not output:
        return output
    raise EpisodeError(
        f"{files[output.count(_FILE)]} blocks the HDF5 library for more than {limit_s:g} s, expected a complete file; "
        f"copy it again, or leave it out"
    )


def _main() -> None:
    def write(what: bytes) -> None:
        os.write(1, what)

    for kind, limit in ((resource.RLIMIT_AS, _MEMORY_LIMIT_BYTES), (resource.RLIMIT_CORE, 0)):
        allowed = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if allowed == resource.RLIM_INFINITY else min(limit, allowed), allowed))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent kills this process
    files = [Path(os.fsdecode(name)) for name in sys.stdin.buffer.read().split(b"\0")]
    write(_READY)
    try:
        for file in files:
            for episode in episodes_in(file):
                episode.simulation()
                write(_EPISODE)
            write(_FILE)
    except EpisodeError as error:
        write(_REFUSED + str(error).encode("utf-8", errors="replace"))


if __name__ == "__main__":
    _main()
