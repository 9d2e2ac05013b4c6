"""Refuse weights that are NaN or infinite."""

from __future__ import annotations

import math

import torch

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.checkpoint import Checkpoint


def is_finite(values: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)  # NaN if one value is; many times faster than isfinite on 16-bit types
    return math.isfinite(low) and math.isfinite(high)


def require_finite(checkpoint: Checkpoint, name: str, values: torch.Tensor) -> None:
    """Raise CheckpointError, with the tensor's name, for NaN or Inf in the file or by a cast that overflowed."""
    if is_finite(values):
        return
    count = values.numel() - int(torch.isfinite(values).sum())
    original = checkpoint.index.stored[name].dtype
    dtype = str(values.dtype).removeprefix("torch.")
    cast = "" if dtype == original else f" as {dtype} (the file has {original}: try bfloat16 or float32)"
    raise CheckpointError(
        f"{checkpoint.path}: {name} has {count} values that are NaN or Inf{cast}, expected finite weights; "
        f"use an earlier checkpoint of the same training"
    )
