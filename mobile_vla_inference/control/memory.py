"""MemoryProbe: how much memory the node, the worker, the machine and the GPU use.

On a Jetson the CPU and the GPU share one memory, so `MemAvailable` is the figure to watch: CUDA's own query
counts the page cache as used, although the kernel frees it at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from mobile_vla_inference.units import MIB


@dataclass(frozen=True)
class MemoryReading:
    """One reading, all in MiB; the worker's and the GPU's figures are 0 if there is none."""

    node_rss_mib: float
    worker_rss_mib: float
    system_available_mib: float
    gpu_allocated_mib: float
    gpu_reserved_mib: float


@dataclass(frozen=True)
class MemorySample:
    """Memory of the process that ran the policy at one moment.

    Attributes:
        elapsed_s: seconds since the replay began.
        frame: index of the frame that was being replayed.
        rss_mib: resident memory of the process.
        gpu_allocated_mib: memory that torch holds on the GPU; 0 without one.
    """

    elapsed_s: float
    frame: int
    rss_mib: float
    gpu_allocated_mib: float


class MemoryProbe:
    """Read the memory of this process, of the worker process and of the machine."""

    def __init__(self) -> None:
        self._node = psutil.Process()
        self._worker: psutil.Process | None = None

    def read(
        self, worker_pid: int | None, gpu_allocated_mib: float = 0.0, gpu_reserved_mib: float = 0.0
    ) -> MemoryReading:
        """Return a reading; `worker_pid` None means that no worker runs. GPU figures come from the worker."""
        return MemoryReading(
            node_rss_mib=self._node.memory_info().rss / MIB,
            worker_rss_mib=self._worker_rss_mib(worker_pid),
            system_available_mib=psutil.virtual_memory().available / MIB,
            gpu_allocated_mib=gpu_allocated_mib,
            gpu_reserved_mib=gpu_reserved_mib,
        )

    def _worker_rss_mib(self, pid: int | None) -> float:
        if pid is None:
            return 0.0
        try:
            if self._worker is None or self._worker.pid != pid:
                self._worker = psutil.Process(pid)
            return self._worker.memory_info().rss / MIB
        except psutil.Error:  # it ended between the two calls
            self._worker = None
            return 0.0
