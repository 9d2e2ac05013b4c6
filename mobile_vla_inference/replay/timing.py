"""What differs from one replay to the next: time of the steps, time of the rest of a frame, and memory."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from mobile_vla_inference.control.memory import MemoryProbe, MemorySample
from mobile_vla_inference.gpu_memory import gpu_memory_mib
from mobile_vla_inference.replay.result import ReplayTiming
from mobile_vla_inference.units import percentiles

_MEMORY_PERIOD_S = 0.5
_MEMORY_SAMPLES = 400


class Stopwatch:
    """Measure the steps, the rest of each frame's time, and memory over a replay."""

    def __init__(self) -> None:
        self._probe = MemoryProbe()
        self._started_s = self._lap_s = time.perf_counter()
        self._latency_s: list[float] = []
        self._overhead_s: list[float] = []
        self._memory: list[MemorySample] = []
        self._period_s = _MEMORY_PERIOD_S
        self._sampled_s = -np.inf

    def lap(self, frame: int, latency_s: float | None) -> None:
        """Note that a frame is done, and the time of its step where there was one."""
        now_s = time.perf_counter()
        self._overhead_s.append(now_s - self._lap_s - (latency_s or 0.0))
        if latency_s is not None:
            self._latency_s.append(latency_s)
        if now_s - self._sampled_s >= self._period_s:
            self._sample(frame, now_s)
            now_s = time.perf_counter()
        self._lap_s = now_s

    def _sample(self, frame: int, now_s: float) -> None:
        self._sampled_s = now_s
        reading = self._probe.read(None, **(gpu_memory_mib() or {}))
        elapsed_s = now_s - self._started_s
        self._memory.append(MemorySample(elapsed_s, frame, reading.node_rss_mib, reading.gpu_allocated_mib))
        if len(self._memory) >= _MEMORY_SAMPLES:  # long replays are sampled more thinly, over their whole length
            self._memory = self._memory[::2]
            self._period_s *= 2.0

    def timing(self, frames: int) -> ReplayTiming:
        """Return the figures."""
        wall_s = time.perf_counter() - self._started_s
        return ReplayTiming(
            wall_s=wall_s,
            latency_ms=percentiles_ms(self._latency_s),
            overhead_ms=percentiles_ms(self._overhead_s),
            frames_per_s=frames / wall_s if wall_s > 0.0 else 0.0,
            memory=tuple(self._memory),
        )


def percentiles_ms(samples_s: Sequence[float]) -> dict[str, float]:
    """Return p50, p95, p99, max and mean in milliseconds; empty without samples."""
    if not samples_s:
        return {}
    samples_ms = np.array(samples_s) * 1000.0
    return {**percentiles(samples_ms), "max": float(samples_ms.max()), "mean": float(samples_ms.mean())}
