"""What a process uses over time: processor time, memory, threads, descriptors, and Fast DDS's shared memory."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mobile_vla_inference.tools.bench.machine import read_memory_mib
from mobile_vla_inference.tools.bench.node_figures import drift

_PERIOD_S = 0.5
#: Segments of Fast DDS that belong to one process each; its ports are shared by all.
_DDS_SEGMENT = re.compile(r"/dev/shm/fast(dds|rtps)_[0-9a-f]{16}(_el)?$")


@dataclass(frozen=True)
class Usage:
    """What a process uses at one time."""

    time_s: float
    resident_mib: float
    shared_mib: float
    threads: int
    descriptors: int


class UsageProbe:
    """Sample CPU time, memory, threads, descriptors and shared memory of a process.

    Attributes:
        pid: the process.
        samples: what it used, in order of time.
        shared_files: segments of Fast DDS that it mapped.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.samples: list[Usage] = []
        self.shared_files: set[Path] = set()
        self._process = psutil.Process(pid)
        self._cpu: list[tuple[float, float]] = []

    def sample(self) -> None:
        """Take a sample; none if the process has ended."""
        now_s = time.monotonic()
        with contextlib.suppress(psutil.Error, OSError, KeyError):
            memory, times = read_memory_mib(self.pid), self._process.cpu_times()
            resident_mib = memory["anonymous"] + memory["file"] + memory["shared"]
            maps = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
            self.shared_files |= {Path(line.split()[-1]) for line in maps if _DDS_SEGMENT.search(line)}
            threads, descriptors = self._process.num_threads(), self._process.num_fds()
            self.samples.append(Usage(now_s, resident_mib, memory["shared"], threads, descriptors))
            self._cpu.append((now_s, times.user + times.system))

    def figures(self, warm_up_s: float) -> dict[str, Any]:
        """Return CPU in percent of a core, the maxima, and the drift of everything after a warm-up."""
        (first_s, first_cpu_s), (last_s, last_cpu_s) = self._cpu[0], self._cpu[-1]
        times_s = [sample.time_s for sample in self.samples]
        names = ("resident_mib", "shared_mib", "threads", "descriptors")
        series = {name: [getattr(sample, name) for sample in self.samples] for name in names}
        return {
            "cpu_percent": 100.0 * (last_cpu_s - first_cpu_s) / max(last_s - first_s, 1e-9),
            **{f"{name}_max": max(values) for name, values in series.items()},
            "drift": {name: drift(times_s, values, warm_up_s) for name, values in series.items()},
        }


@contextlib.contextmanager
def sampling(probes: Collection[UsageProbe]) -> Iterator[None]:
    """Sample processes in a thread, so that messages are received in time meanwhile."""
    ended = threading.Event()

    def sample() -> None:
        while True:
            for probe in probes:
                probe.sample()
            if ended.wait(_PERIOD_S):
                break

    thread = threading.Thread(target=sample, name="usage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
