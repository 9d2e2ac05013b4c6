"""A memory cgroup (version 1 or 2) for one child process: its limit counts file pages, which the kernel reclaims."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mobile_vla_inference.errors import MobileVlaError

_ROOT = Path("/sys/fs/cgroup")

# Limit, limit with swap, and where the kernel counts its kills, by version.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control"),
    2: ("memory.max", "memory.swap.max", "memory.events"),
}


class MemoryCgroup:
    """A group with a limit, below the one of this process, so that its limits stay in force.

    Attributes:
        folder: of the group, while it exists.
    """

    def __init__(self, folder: Path, version: int) -> None:
        self.folder = folder
        self._oom_file = folder / _FILES[version][2]

    def join(self) -> None:
        """Move the calling process into the group; for a child between fork and exec."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def oom_kills(self) -> int:
        """How many processes of the group the kernel has killed."""
        lines = self._oom_file.read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """Make a group with a memory limit and no swap; remove it at the end, when its processes must have ended.

    Raises:
        MobileVlaError: this process is not permitted to make one.
    """
    parent, version = _parent_folder()
    folder = parent / f"mobile_vla_bench.{os.getpid()}"
    limit_file, swap_file, _ = _FILES[version]
    try:
        folder.mkdir()
    except OSError as error:
        raise _refusal(folder, error) from error
    try:
        try:
            (folder / limit_file).write_text(str(limit_bytes))
            if (folder / swap_file).exists():
                (folder / swap_file).write_text(str(limit_bytes if version == 1 else 0))
        except OSError as error:
            raise _refusal(folder, error) from error
        yield MemoryCgroup(folder, version)
    finally:
        folder.rmdir()


def _refusal(folder: Path, error: OSError) -> MobileVlaError:
    return MobileVlaError(
        f"the memory cgroup {folder} can't be created ({error.strerror}), expected permission to; run it as root "
        f"outside a container, or give the limit from outside: systemd-run --user --scope -p MemoryMax=..."
    )


def _parent_folder() -> tuple[Path, int]:
    """Return the folder below which a group can have a memory limit, and the version of cgroups."""
    with contextlib.suppress(OSError):  # no Linux, no cgroups
        groups = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
        for controllers, group in groups:
            if "memory" in controllers.split(","):
                return _ROOT / "memory" / group.lstrip("/"), 1
        for controllers, group in groups:
            own = _ROOT / group.lstrip("/")
            # Version 2 allows limits only below a group that holds no process itself and passes the controller on.
            for folder in (own, *own.parents):
                passed_on = folder / "cgroup.subtree_control"
                if not controllers and passed_on.exists() and "memory" in passed_on.read_text().split():
                    return folder, 2
    raise MobileVlaError(
        "this process is in no memory cgroup, expected Linux with the memory controller mounted below "
        f"{_ROOT}; leave --memory-limit-mib out, or run it outside the container"
    )
