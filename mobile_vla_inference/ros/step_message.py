"""What vla_node tells on `~/step`: every step that counted, exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NodeStep:
    """One step as the node told it.

    Attributes:
        stamp_s: stamp of its frame, seconds.
        first_of_state: whether the hidden state was empty before.
        instruction: the text in force.
        action: normalised, one float per axis.
        step_s: seconds that the policy took.
        gated: what the gate made of it (m/s, m/s, rad/s); None: silence.
        reason: the gate's reason.
    """

    stamp_s: float
    first_of_state: bool
    instruction: str
    action: tuple[float, ...]
    step_s: float
    gated: tuple[float, float, float] | None
    reason: str

    @classmethod
    def from_values(cls, reason: str, values: Mapping[str, str]) -> NodeStep:
        """Read the key-value pairs of the node's message; its text is the gate's reason."""
        gated = json.loads(values["command"])
        return cls(
            stamp_s=float(values["stamp_s"]),
            first_of_state=values["first_of_state"] == "True",
            instruction=values["instruction"],
            action=tuple(json.loads(values["action"])),
            step_s=float(values["step_s"]),
            gated=None if gated is None else tuple(gated),
            reason=reason,
        )
