"""The facts of a policy, from its opened checkpoint and from how it was loaded. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_vla_inference.policy.storage.layout import parameter_counts
from mobile_vla_inference.policy_facts import PolicyFacts

if TYPE_CHECKING:
    from mobile_vla_inference.policy.storage.checkpoint import Checkpoint


def policy_facts(
    path: Path | str, checkpoint: Checkpoint, *, dtype: str, device: str, engine: str, engine_fallback: str
) -> PolicyFacts:
    """Return the facts of a checkpoint that was loaded in this way.

    Args:
        path: the checkpoint as the user gave it.
        checkpoint: the same, opened.
        dtype: data type of the arithmetic.
        device: where it runs.
        engine: how a step runs.
        engine_fallback: why a faster engine is not used; empty if none was refused.
    """
    settings = checkpoint.settings
    return PolicyFacts(
        checkpoint=str(path),
        checkpoint_id=checkpoint.fingerprint,
        variant=checkpoint.config.variant,
        parameters=sum(parameter_counts(checkpoint.index.shapes).values()),
        dtype=dtype,
        quantization=checkpoint.quantization,
        device=device,
        image_size=checkpoint.config.image_size,
        engine=engine,
        engine_fallback=engine_fallback,
        fusion_features=tuple(checkpoint.fusion_features),
        cell=checkpoint.config.cell.kind,
        image_keep_aspect=settings.image_keep_aspect,
        step_period_s=settings.step_period_s,
        action_axes=tuple(settings.action_axes),
        action_scale=tuple(settings.action_scale),
        action_offset=tuple(settings.action_offset),
        assumed_settings=tuple(settings.assumed),
        settings=settings.to_json(),
        warnings=tuple(checkpoint.warnings),
    )


def policy_facts_of_node(path: Path | str, diagnostics: Mapping[str, str]) -> PolicyFacts:
    """Return the facts of the policy that a node has loaded from `path`.

    Args:
        path: the checkpoint.
        diagnostics: values of the node's status `policy`, as texts by key: how it was loaded.

    Raises:
        CheckpointError: the checkpoint can't be opened.
    """
    from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint

    loaded = {name: diagnostics[name] for name in ("dtype", "device", "engine", "engine_fallback")}
    return policy_facts(path, open_checkpoint(path), **loaded)
