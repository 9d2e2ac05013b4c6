"""Times of a policy step and of its parts, and the memory bandwidth that sets its floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.units import percentiles

_WARM_UP_STEPS = 10
_WARM_UP_S = 0.3
_PART_RUNS = 20
_RUNS_FROM, _RUNS_S = 3, 2.0  # on a CPU, runs end after so many seconds, but not before so many runs
_COPY_RUNS = 10
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
#: Side of the squares in synthetic frames, in pixels, and how far the view moves from one frame to the next.
_PATCH_PX = 16
_PAN_PX = 2


def synthetic_frames(side_px: int, count: int) -> list[np.ndarray]:
    """Return a pan over coloured patches with pixel noise: uint8 RGB [side, side, 3], each different."""
    generator = np.random.default_rng(0)
    width = side_px + _PAN_PX * count
    shape = (-(-side_px // _PATCH_PX), -(-width // _PATCH_PX), 3)
    scene = generator.integers(0, 256, shape).repeat(_PATCH_PX, axis=0).repeat(_PATCH_PX, axis=1)
    scene = np.clip(scene + generator.normal(0.0, 8.0, scene.shape), 0, 255).astype(np.uint8)
    return [np.ascontiguousarray(scene[:side_px, _PAN_PX * i : _PAN_PX * i + side_px]) for i in range(count)]


def step_times_ms(
    ways: dict[str, Callable[[np.ndarray], object]], frames: Sequence[np.ndarray], steps: int
) -> dict[str, dict[str, float]]:
    """Return p50, p95, p99 and max of each way to make a step, after a warm-up.

    The ways take turns, step by step, so that other load on the machine affects all of them.

    Args:
        ways: name -> a function from a frame to an action.
        frames: used in turn.
        steps: how many of each are timed.
    """
    for way in ways.values():
        _warm_up(way, frames)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in tqdm(range(steps), desc=", ".join(ways), unit="step", delay=1, disable=None):
        frame = frames[index % len(frames)]
        for name, way in ways.items():
            started = time.perf_counter()
            way(frame)
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: _percentiles(values) for name, values in times.items()}


def _warm_up(way: Callable[[np.ndarray], object], frames: Sequence[np.ndarray]) -> None:
    until = time.perf_counter() + _WARM_UP_S
    for index in range(_WARM_UP_STEPS):
        way(frames[index % len(frames)])
        if index > 0 and time.perf_counter() > until:
            return


def _percentiles(values: list[float]) -> dict[str, float]:
    return {**percentiles(values), "max": max(values)}


def instruction_times_ms(policy: VlaPolicy, instructions: dict[str, str]) -> dict[str, float]:
    """Return the time of each change of the instruction, in the order given."""
    times = {}
    for name, instruction in instructions.items():
        started = time.perf_counter()
        policy.set_instruction(instruction)
        times[name] = 1e3 * (time.perf_counter() - started)
    return times


def part_times_ms(parts: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Return the median time of each function; on CUDA each is captured in its own graph and replayed."""
    with torch.inference_mode():
        return {name: float(np.median(list(_runs_ms(part, device)))) for name, part in parts.items()}


def bandwidth_gbps(device: torch.device) -> float:
    """Measure a large copy within the device's memory: bytes read and written by the best time, GB/s."""
    size = _COPY_BYTES[device.type]
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best_ms = min(_runs_ms(lambda: target.copy_(source), device, _COPY_RUNS))
    return 2 * size / best_ms / 1e6


def _runs_ms(function: Callable[[], Any], device: torch.device, runs: int = _PART_RUNS) -> Iterator[float]:
    function()
    if device.type != "cuda":
        until = time.perf_counter() + _RUNS_S
        for run in range(runs):
            if run >= _RUNS_FROM and time.perf_counter() > until:
                return
            started = time.perf_counter()
            function()
            yield 1e3 * (time.perf_counter() - started)
        return
    graph = _captured(function)
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        yield start.elapsed_time(end)


def _captured(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph
