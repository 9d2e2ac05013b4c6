"""ReplayResult: what a replay found, frame by frame and in all, for the JSON file, the terminal and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobile_vla_inference.control.memory import MemorySample
from mobile_vla_inference.policy_facts import PolicyFacts

Velocity = tuple[float, float, float]


@dataclass(frozen=True)
class ReplayFrame:
    """One image of the bag.

    Attributes:
        index: position among the images of the topic, from 0.
        stamp_s: capture time by the image's header, seconds.
        stepped: whether the policy stepped on it.
        drop: why it was not stepped (`not_due`, `unreadable`, `no_stamp`, `repeated_stamp`, `no_instruction`,
            `step_failed`); empty where it was.
        reset: why the LSTM state was reset before this step, a value of ResetCause; empty where it was kept.
        action: the policy's action, normalised, one float per action axis; None where it was not stepped.
        command: the same in command units (m/s, m/s, rad/s), unlimited; None where it was not stepped.
        gated: what the gate would have published (limited in speed and acceleration); None: nothing.
        reason: the gate's reason (`moving`, `no_step`, ...).
        recorded: the command in force in the bag at this image (m/s, m/s, rad/s); None where there was none, or one
            with NaN or infinity.
        instruction: the text in force.
        latency_s: seconds that the policy took for this step; None where it was not stepped.
    """

    index: int
    stamp_s: float
    stepped: bool
    drop: str
    reset: str
    action: tuple[float, ...] | None
    command: Velocity | None
    gated: Velocity | None
    reason: str
    recorded: Velocity | None
    instruction: str
    latency_s: float | None


@dataclass(frozen=True)
class ReplayTiming:
    """Everything that differs from one run to the next.

    Attributes:
        wall_s: the whole replay, loading of the policy not included.
        latency_ms: p50, p95, p99, max and mean of the policy's steps; empty without any.
        overhead_ms: p50, p95, p99, max and mean of the rest of a frame's time (reading, decoding, gate, records).
        frames_per_s: frames of the bag per second of wall time.
        memory: samples over the replay, at most a few hundred.
    """

    wall_s: float
    latency_ms: dict[str, float]
    overhead_ms: dict[str, float]
    frames_per_s: float
    memory: tuple[MemorySample, ...]


@dataclass(frozen=True)
class ReplayResult:
    """One replay of a bag through one checkpoint.

    Attributes:
        bag: path of the bag.
        image_topic: the topic whose images were replayed.
        command_topic: the topic of the recorded commands; None where the bag holds none.
        policy: the facts of the policy.
        pace: `every-frame`, `due`, `steps-file` or `node`.
        command_line: the command that made it.
        versions: name -> version of the package, Python, torch, transformers, numpy, OpenCV, rosbags.
        instructions: the texts that were in force, in order of first use.
        frames: one entry per image.
        comparison: prediction against recorded command (comparison.compare); None without recorded commands.
        resets: cause -> count.
        drops: cause -> count.
        reasons: the gate's reason -> number of frames.
        gate: what its limits changed: `moving` and `changed` (frames), `by` (limit -> frames, gate_model.LIMITS),
            `limits` (name -> value), and `frames`, per frame the limits, or None where it didn't move.
        notes: sentences that a reader should know (a bag cut off, settings assumed, ...).
        timing: what differs from run to run.
        open_frames: see frames_jpeg.
    """

    bag: Path
    image_topic: str
    command_topic: str | None
    policy: PolicyFacts
    pace: str
    command_line: str
    versions: dict[str, str]
    instructions: tuple[str, ...]
    frames: tuple[ReplayFrame, ...]
    comparison: dict[str, Any] | None
    resets: dict[str, int]
    drops: dict[str, int]
    reasons: dict[str, int]
    gate: dict[str, Any]
    notes: tuple[str, ...]
    timing: ReplayTiming
    open_frames: Callable[[Iterable[int] | None, int], Iterator[tuple[int, bytes]]] = field(repr=False, compare=False)

    def frames_jpeg(self, max_width: int, indices: Iterable[int] | None = None) -> Iterator[tuple[int, bytes]]:
        """Read the bag again and yield (frame index, JPEG bytes) in order, one image in memory at a time.

        Args:
            max_width: wider images are made smaller, pixels.
            indices: the frames wanted; None: all. Unreadable images are left out.
        """
        return self.open_frames(indices, max_width)
