"""The summary of a replay: comparison, counts, versions; as JSON and back."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mobile_vla_inference import __version__
from mobile_vla_inference.action import AXES, AXIS_UNITS
from mobile_vla_inference.bags.images import frames_jpeg
from mobile_vla_inference.bags.reader import BagError
from mobile_vla_inference.bags.step_period import StepPeriod
from mobile_vla_inference.bags.topics import BagTopics
from mobile_vla_inference.control.gate import GateLimits
from mobile_vla_inference.episodes.comparison import compare
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.outside_files import read_json
from mobile_vla_inference.policy_facts import PolicyFacts
from mobile_vla_inference.replay.gate_model import LIMITS, frames_limited_by
from mobile_vla_inference.replay.result import ReplayFrame, ReplayResult, ReplayTiming

#: Of a replay's JSON file; one of 100,000 frames has a tenth.
_MAX_STEPS_BYTES = 1 << 29


@dataclass(frozen=True)
class Step:
    """A step of the node: the stamp of its frame, whether the LSTM state was empty before, the instruction in force."""

    stamp_s: float
    reset: bool
    instruction: str


def make_result(
    path: Path,
    topics: BagTopics,
    policy: PolicyFacts,
    pace: str,
    command_line: str,
    frames: Sequence[ReplayFrame],
    notes: Sequence[str],
    timing: ReplayTiming,
    limits: GateLimits,
) -> ReplayResult:
    """Sum up the frames of a replay, whose gate had these limits."""
    return ReplayResult(
        bag=path,
        image_topic=topics.image.name,
        command_topic=None if topics.command is None else topics.command.name,
        policy=policy,
        pace=pace,
        command_line=command_line,
        versions=versions(),
        instructions=tuple(dict.fromkeys(frame.instruction for frame in frames if frame.instruction)),
        frames=tuple(frames),
        comparison=_comparison(frames, policy),
        resets=_counted(frame.reset for frame in frames),
        drops=_counted(frame.drop for frame in frames),
        reasons=_counted(frame.reason for frame in frames),
        gate=_gate(frames, limits),
        notes=(*notes, *_pace_notes(frames, policy)),
        timing=timing,
        open_frames=lambda indices, max_width: frames_jpeg(path, topics.image.name, indices, max_width),
    )


def _counted(causes: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(cause for cause in causes if cause).items()))


def _gate(frames: Sequence[ReplayFrame], limits: GateLimits) -> dict[str, Any]:
    """Count the frames whose command the limits of the gate changed."""
    limited = frames_limited_by(frames, limits)
    counts = Counter(name for names in limited for name in names or ())
    return {
        "moving": sum(names is not None for names in limited),
        "changed": sum(bool(names) for names in limited),
        "by": {name: counts[name] for name in LIMITS if counts[name]},
        "limits": asdict(limits),
        "frames": [None if names is None else list(names) for names in limited],
    }


def limits_sentence(gate: dict[str, Any]) -> str:
    """Return in words how many frames the limits changed, and which limit how many."""
    changed, moving = gate["changed"], gate["moving"]
    if not moving:
        return "nothing moved"
    by = ", ".join(f"{name} {count}" for name, count in gate["by"].items())
    return f"changed {changed} of {moving} moving frames ({changed / moving:.1%})" + (f": {by}" if by else "")


def _pace_notes(frames: Sequence[ReplayFrame], policy: PolicyFacts) -> list[str]:
    """Return a note if the steps were not as far apart as in training."""
    times = np.diff([frame.stamp_s for frame in frames if frame.stepped])
    times = times[times > 0.0]
    period_s = policy.step_period_s
    if len(times) == 0 or StepPeriod("", float(period_s), 0).agrees(float(np.median(times))):
        return []
    stepped_s = float(np.median(times))
    advice = "; --due steps as the node does" if stepped_s < period_s else ""
    return [
        f"the policy was stepped every {stepped_s:.3g} s, but its step period is {period_s:g} s: its LSTM ran "
        f"{period_s / stepped_s:.2g} times as fast as in training{advice}"
    ]


def _comparison(frames: Sequence[ReplayFrame], policy: PolicyFacts) -> dict[str, Any] | None:
    """Compare the stepped frames that have a recorded command, over the axes that the policy drives."""
    pairs = [frame for frame in frames if frame.command is not None and frame.recorded is not None]
    if not pairs:
        return None
    axes = policy.action_axes
    columns = [AXES.index(axis) for axis in axes]
    return {
        "units": {axis: AXIS_UNITS[column] for axis, column in zip(axes, columns)},
        **compare(
            [frame.stamp_s for frame in pairs],
            np.array([frame.command for frame in pairs])[:, columns],
            np.array([frame.recorded for frame in pairs])[:, columns],
            axes,
            policy.action_scale,
            policy.action_offset,
        ),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a replay's figures, of those that are installed."""
    found = {"mobile_vla_inference": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "rosbags", "mcap"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "opencv": cv2.__version__}


def result_json(result: ReplayResult, against: ReplayResult | None = None) -> str:
    """Return a result as JSON: the same bytes for the same bag, checkpoint and options, except for the key `timing`.

    With `against`, that replay's content is under the key `against`, its timing under `timing`.
    """
    content, timing = _content(result), _timing(result)
    if against is not None:
        content["against"] = {**_content(against), "difference": difference(result, against)}
        timing["against"] = _timing(against)
    return json.dumps({**content, "timing": timing}, ensure_ascii=False, indent=1) + "\n"


def _content(result: ReplayResult) -> dict[str, Any]:
    frames = result.frames
    return {
        "bag": str(result.bag),
        "image_topic": result.image_topic,
        "command_topic": result.command_topic,
        "pace": result.pace,
        "policy": result.policy.to_json(),
        "versions": result.versions,
        "instructions": list(result.instructions),
        "notes": list(result.notes),
        "units": {"actions": "normalised", "commands": list(AXIS_UNITS), "recorded": list(AXIS_UNITS)},
        "comparison": result.comparison,
        "resets": result.resets,
        "drops": result.drops,
        "reasons": result.reasons,
        "gate": {name: value for name, value in result.gate.items() if name != "frames"},
        "stamps_s": [frame.stamp_s for frame in frames],
        "actions": [frame.action for frame in frames],
        "commands": [frame.command for frame in frames],
        "gated": [frame.gated for frame in frames],
        "recorded": [frame.recorded for frame in frames],
        "frame_reasons": [frame.reason for frame in frames],
        "frame_limits": result.gate["frames"],
        "frame_resets": [frame.reset for frame in frames],
        "frame_drops": [frame.drop for frame in frames],
        "steps": [
            {"stamp_s": frame.stamp_s, "reset": bool(frame.reset), "instruction": frame.instruction}
            for frame in frames
            if frame.stepped
        ],
    }


def _timing(result: ReplayResult) -> dict[str, Any]:
    timing = result.timing
    return {
        "command_line": result.command_line,
        "wall_s": timing.wall_s,
        "frames_per_s": timing.frames_per_s,
        "latency_ms": timing.latency_ms,
        "overhead_ms": timing.overhead_ms,
        "latencies_s": [frame.latency_s for frame in result.frames],
        "memory": [vars(sample) for sample in timing.memory],
    }


def difference(result: ReplayResult, against: ReplayResult) -> dict[str, Any] | None:
    """Return how far two replays of a bag are apart, in command units, over the frames that both stepped.

    None where there is no such frame.
    """
    pairs = [
        (mine.command, other.command)
        for mine, other in zip(result.frames, against.frames)
        if mine.command is not None and other.command is not None
    ]
    if not pairs:
        return None
    apart = np.abs(np.array([mine for mine, _ in pairs]) - np.array([other for _, other in pairs]))
    return {
        "frames": len(pairs),
        "mae": dict(zip(AXES, apart.mean(axis=0).tolist())),
        "max": dict(zip(AXES, apart.max(axis=0).tolist())),
    }


def read_steps(path: Path | str) -> tuple[Step, ...]:
    """Read the steps in a replay's JSON file; raise BagError if it contains none."""
    try:
        content = read_json(path, "the JSON file of a replay", _MAX_STEPS_BYTES, error=BagError)
        steps = tuple(
            Step(float(step["stamp_s"]), bool(step["reset"]), check_instruction(step["instruction"]))
            for step in content["steps"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BagError(
            f"{path} contains no steps, expected a JSON file of `mobile_vla replay --json` with the key `steps`; "
            "check the path"
        ) from error
    if not steps:
        raise BagError(f"{path} contains an empty list of steps, expected at least one; replay again")
    return steps
