"""NodeStep: the content of a message on `~/step`, which vla_node publishes for every step that counted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NodeStep:
    """One step of the node, exact to the last bit, so that `mobile_vla replay` can repeat it.

    Attributes:
        stamp_s: stamp of its image, seconds.
        first_of_state: whether the LSTM state was empty before.
        instruction: the text in force.
        action: normalised, one float per axis.
        step_s: seconds that the policy took.
        gated: the velocity that the gate let through (m/s, m/s, rad/s); None: silence.
        reason: the gate's reason.
    """

    stamp_s: float
    first_of_state: bool
    instruction: str
    action: tuple[float, ...]
    step_s: float
    gated: tuple[float, float, float] | None
    reason: str

    def to_values(self) -> dict[str, Any]:
        """Return the key-value pairs of the message; its text is the reason."""
        return {
            "stamp_s": repr(self.stamp_s),
            "first_of_state": self.first_of_state,
            "instruction": self.instruction,
            "action": json.dumps(self.action),
            "step_s": repr(self.step_s),
            "command": json.dumps(self.gated),
        }

    @classmethod
    def from_values(cls, reason: str, values: Mapping[str, str]) -> NodeStep:
        """Read the key-value pairs of the message, all of them text."""
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
