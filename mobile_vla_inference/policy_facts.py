"""What the node and its policy worker agree on: the facts of a loaded policy, the options of a load, the message limit.

No torch and no rclpy: the node imports this without the first, the worker without the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mobile_vla_inference.action import ActionMapping
from mobile_vla_inference.errors import MobileVlaError

#: Longest message between the node and its worker, in bytes; neither side sends a longer one.
MAX_MESSAGE_BYTES = 1 << 17

DEVICES = ("auto", "cpu", "cuda")

#: Types that weights can have while a step runs; `auto` is float16 on a GPU and float32 on a CPU.
FLOAT_DTYPES = ("float32", "float16", "bfloat16")
DTYPES = ("auto", *FLOAT_DTYPES)

#: The engines, that is, the ways to run a step, and the devices that each runs on:
#: `graph` (one captured CUDA graph), `compiled` (a graph of what torch.compile makes, which takes minutes),
#: `packed` (flat arithmetic with packed matrices), `flat` (flat arithmetic, operation by operation),
#: `eager` (transformers' modules: the reference).
ENGINE_DEVICES = {
    "graph": ("cuda",),
    "compiled": ("cuda",),
    "packed": ("cpu",),
    "flat": ("cpu", "cuda"),
    "eager": ("cpu", "cuda"),
}
#: `auto` is the fastest engine that runs on the device; it never takes `compiled`.
ENGINES = ("auto", *ENGINE_DEVICES)

#: Facts that must be equal each time a worker loads: which policy it is, and what its actions mean.
_IDENTITY = (
    *("checkpoint_id", "variant", "parameters", "image_size", "image_keep_aspect", "step_period_s"),
    *("action_axes", "action_scale", "action_offset", "assumed_settings", "settings"),
)


@dataclass(frozen=True)
class PolicyFacts:
    """A loaded policy: where it is from, how it runs, what it reads and what its actions mean.

    Attributes:
        checkpoint: path of the file or folder.
        checkpoint_id: fingerprint of the content: the same weights have the same one wherever they are stored.
        variant: `hybrid` or `pure`.
        parameters: number of weights.
        dtype: data type of the arithmetic, such as `float16`.
        quantization: `int8` if weights are quantised, else None.
        device: where it runs, such as `cuda`.
        image_size: side of the square input image, pixels.
        engine: how a step runs (ENGINES).
        engine_fallback: why a faster engine is not used; empty if none was refused.
        fusion_features: names of the features that are joined, in order.
        cell: type of the recurrent cell: `lstm`, `gru` or `rnn`.
        image_keep_aspect: whether the centred square is cropped before the image is reduced.
        step_period_s: time that one step of the recurrent cell stands for, seconds.
        action_axes: the Twist axis of each action value.
        action_scale: command units per normalised unit, one per axis.
        action_offset: command units added afterwards, one per axis.
        assumed_settings: settings that nobody has confirmed for these weights.
        settings: all settings, JSON-ready.
        warnings: what a person should know before trusting this policy, one sentence each.
    """

    checkpoint: str
    checkpoint_id: str
    variant: str
    parameters: int
    dtype: str
    quantization: str | None
    device: str
    image_size: int
    engine: str
    engine_fallback: str
    fusion_features: tuple[str, ...]
    cell: str
    image_keep_aspect: bool
    step_period_s: float
    action_axes: tuple[str, ...]
    action_scale: tuple[float, ...]
    action_offset: tuple[float, ...]
    assumed_settings: tuple[str, ...]
    settings: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def action_mapping(self) -> ActionMapping:
        """How the policy's actions become velocities by its own settings."""
        return ActionMapping.of(self)

    def difference(self, other: PolicyFacts) -> str:
        """Name the first fact in which `other` is another policy than this one; empty if it is the same one."""
        for name in _IDENTITY:
            expected, found = _to_json(getattr(self, name)), _to_json(getattr(other, name))
            if found != expected:
                return f"{name} is {found!r}, expected {expected!r}"
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return the facts by name, JSON-ready."""
        return {each.name: _to_json(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PolicyFacts:
        """Read what `to_json` returns; raise MobileVlaError if a fact is missing or unknown."""
        names = [each.name for each in fields(cls)]
        for problem, found in (
            ("lacks", [name for name in names if name not in content]),
            ("contains the unknown", [name for name in content if name not in names]),
        ):
            if found:
                raise MobileVlaError(
                    f"the policy's description {problem} {', '.join(found)}, expected {', '.join(names)}; "
                    "run the node and its worker from one installation"
                )
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})


def _to_json(value: Any) -> Any:
    """Return a value with lists for tuples at every depth: equal values are equal again after a trip through JSON."""
    if isinstance(value, (list, tuple)):
        return [_to_json(each) for each in value]
    return {name: _to_json(each) for name, each in value.items()} if isinstance(value, dict) else value
