"""Short names of replays for headings and legends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mobile_vla_inference.replay.result import ReplayResult


def labels(results: Sequence[ReplayResult]) -> list[str]:
    """Return a name for each replay: its checkpoint's, with folder or type and engine where two have the same."""
    paths = [result.policy.checkpoint for result in results]
    short = [Path(path).name or path for path in paths]
    if len(set(short)) == len(short):
        return short
    if len(set(paths)) == len(paths):
        return paths
    settings = [f"{result.policy.dtype}, {result.policy.engine}" for result in results]
    return [f"{name} ({setting})" for name, setting in zip(short, settings)]
