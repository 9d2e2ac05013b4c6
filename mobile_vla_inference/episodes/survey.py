"""Read what HDF5 files declare in a process of its own first, with a limit of time and memory.

The HDF5 library runs for ever, or crashes, on some damaged files (a global heap whose objects have no size, for one),
and no exception tells of it: only another process can be ended. The child says nothing but how far it has come.
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

from mobile_vla_inference.episodes.hdf5 import EpisodeError

#: Longest time that one episode's metadata may take, s; and what the child's imports may take.
EPISODE_LIMIT_S = 6.0
_START_LIMIT_S = 60.0

#: Address space of the child, its libraries included.
_MEMORY_LIMIT_BYTES = 4 << 30

#: What the child writes: it can begin, an episode is good, a file is good, and before the sentence of a refusal.
_READY, _EPISODE, _FILE, _REFUSED = b"r", b"e", b"f", b"!"


def survey(files: Sequence[Path]) -> None:
    """Raise EpisodeError for the first file that is no good, that takes too long, or that the library crashes on."""
    command = [sys.executable, "-m", __name__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (
        _names(files) as names,
        subprocess.Popen(
            command, stdin=names, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as child,
    ):
        try:
            said = _listen(child, files)
        finally:
            child.kill()
    done, _, refused = said.partition(_REFUSED)
    if refused:
        raise EpisodeError(refused.decode("utf-8", errors="replace"))
    # Any other end than by a signal is no fault of the file: the caller reads it anyway.
    if child.returncode < 0 and done.count(_FILE) < len(files):
        raise EpisodeError(
            f"{files[done.count(_FILE)]} makes the HDF5 library crash ({signal.Signals(-child.returncode).name}), "
            f"expected a whole file; copy it again, or leave it out"
        )


def _names(files: Sequence[Path]) -> BinaryIO:
    """Return an open file that holds the names; a pipe could fill up while nobody reads."""
    names = tempfile.TemporaryFile()  # noqa: SIM115
    names.write(b"\0".join(os.fsencode(file) for file in files))
    names.seek(0)
    return names


def _listen(child: subprocess.Popen, files: Sequence[Path]) -> bytes:
    """Return what the child wrote until its end; raise EpisodeError where it comes no further."""
    said, limit_s = b"", _START_LIMIT_S
    while select.select([child.stdout], [], [], limit_s)[0]:
        part = os.read(child.stdout.fileno(), 1 << 16)
        if not part:
            child.wait()
            return said
        said, limit_s = said + part, EPISODE_LIMIT_S
    if not said:
        return said
    raise EpisodeError(
        f"{files[said.count(_FILE)]} makes HDF5 hang for more than {limit_s:g} s, expected a whole file; "
        f"copy it again, or leave it out"
    )


def _main() -> None:
    from mobile_vla_inference.episodes.files import episodes_in, read_world

    def say(what: bytes) -> None:
        os.write(1, what)

    for kind, limit in ((resource.RLIMIT_AS, _MEMORY_LIMIT_BYTES), (resource.RLIMIT_CORE, 0)):
        allowed = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if allowed == resource.RLIM_INFINITY else min(limit, allowed), allowed))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    files = [Path(os.fsdecode(name)) for name in sys.stdin.buffer.read().split(b"\0")]
    say(_READY)
    try:
        for file in files:
            for episode in episodes_in(file):
                read_world(episode)
                say(_EPISODE)
            say(_FILE)
    except EpisodeError as error:
        say(_REFUSED + str(error).encode("utf-8", errors="replace"))


if __name__ == "__main__":
    _main()
