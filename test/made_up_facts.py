"""The facts of a policy that a test makes up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mobile_vla_inference.policy_facts import PolicyFacts

FACTS = PolicyFacts(
    checkpoint="scripted",
    checkpoint_id="scripted",
    variant="hybrid",
    parameters=3,
    dtype="float32",
    quantization=None,
    device="cpu",
    image_size=8,
    engine="eager",
    engine_fallback="",
    fusion_features=("kosmos_text",),
    cell="lstm",
    image_keep_aspect=False,
    step_period_s=0.05,
    action_axes=("linear.x", "angular.z"),
    action_scale=(1.0, 1.0),
    action_offset=(0.0, 0.0),
    assumed_settings=(),
    settings={},
    warnings=(),
)


def made_up_facts(**changes: Any) -> PolicyFacts:
    """Return facts of a policy that drives ahead and turns, with some changed."""
    return replace(FACTS, **changes)
