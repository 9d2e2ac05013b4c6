"""Whether an engine computes the same as the fp32 modules, over a sequence of frames carrying the LSTM state on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from mobile_vla_inference.policy.vla_policy import VlaPolicy

#: Largest error of an action that passes, as a fraction of the axis' standard deviation over the frames.
ERROR_LIMITS = {"float32": 0.001, "float16": 0.02, "bfloat16": 0.02, "int8": 0.10}
#: Smallest cosine that passes, between the features of int8 and of fp32.
INT8_COSINE_LIMIT = 0.999
_SOAK_EPISODE_STEPS = 100


@dataclass(frozen=True)
class Trace:
    """What a policy computed over a sequence of frames after a reset.

    Attributes:
        actions: [frames, axes].
        features: inputs of the recurrent cell, [frames, width].
    """

    actions: np.ndarray
    features: np.ndarray


def trace(policy: VlaPolicy, frames: Sequence[np.ndarray], instruction: str, title: str) -> Trace:
    """Run a policy over frames of its own size, carrying the LSTM state on."""
    policy.set_instruction(instruction)
    policy.reset()
    features, actions = [], []
    for frame in tqdm(frames, desc=title, unit="step", delay=1, disable=None):
        features.append(policy.engine.features(frame))
        actions.append(policy.step(frame).values)
    return Trace(np.array(actions), np.array(features))


def compare(own: Trace, reference: Trace, precision: str) -> dict[str, Any]:
    """Return the errors of each axis as fractions of the reference's standard deviation, the least cosine, the verdict.

    Args:
        own: of the engine.
        reference: of the fp32 modules over the same frames.
        precision: a key of ERROR_LIMITS.
    """
    spread = reference.actions.std(axis=0)
    errors = np.abs(own.actions - reference.actions)
    largest = _parts(errors.max(axis=0), spread)
    lengths = np.linalg.norm(own.features, axis=1) * np.linalg.norm(reference.features, axis=1)
    cosine = float(((own.features * reference.features).sum(axis=1) / lengths).min())
    limit = ERROR_LIMITS[precision]
    passed = all(error <= limit for error in largest) and (precision != "int8" or cosine >= INT8_COSINE_LIMIT)
    return {
        "frames": len(errors),
        "largest_error": largest,
        "rms_error": _parts(np.sqrt((errors**2).mean(axis=0)), spread),
        "least_feature_cosine": cosine,
        "error_limit": limit,
        "passed": bool(passed),
    }


def soak(policy: VlaPolicy, frames: Sequence[np.ndarray], instructions: Sequence[str], steps: int) -> dict[str, Any]:
    """Run episodes over the same frames, each after a reset and with the next instruction.

    Returns:
        How many `episodes` and `steps` were run, and the `largest_change` of an action from the first episode of the
        same instruction: 0 without drift.
    """
    sequence = [frames[index % len(frames)] for index in range(_SOAK_EPISODE_STEPS)]
    first: dict[str, np.ndarray] = {}
    largest, done = 0.0, 0
    with tqdm(total=steps, desc="soak", unit="step", delay=1, disable=None) as bar:
        while done < steps:
            instruction = instructions[done // _SOAK_EPISODE_STEPS % len(instructions)]
            policy.set_instruction(instruction)
            policy.reset()
            episode = sequence[: steps - done]
            actions = np.array([policy.step(frame).values for frame in episode])
            expected = first.setdefault(instruction, actions)
            largest = max(largest, float(np.abs(actions - expected[: len(actions)]).max()))
            done += len(episode)
            bar.update(len(episode))
    return {"steps": done, "episodes": -(-done // _SOAK_EPISODE_STEPS), "largest_change": largest}


def _parts(values: np.ndarray, spread: np.ndarray) -> list[float]:
    """Divide each axis; on an axis that never moves, any value but 0 is infinitely wrong."""
    return [float(v / s) if s > 0.0 else (0.0 if v == 0.0 else float("inf")) for v, s in zip(values, spread)]
