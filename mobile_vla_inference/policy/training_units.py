"""Commands in the units of training. Pure numpy, for training, calibration and evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Commands are float32 in the files: this much over the scale is rounding.
_ROUNDING = 1e-5


def training_values(commands: np.ndarray, scale: Sequence[float], offset: Sequence[float]) -> np.ndarray:
    """Return commands [..., axes] as training saw them: over the scale, clipped to [-1, 1]."""
    return np.clip(unclipped_values(commands, scale, offset), -1.0, 1.0)


def unclipped_values(commands: np.ndarray, scale: Sequence[float], offset: Sequence[float]) -> np.ndarray:
    """Return commands [..., axes] over the scale."""
    scales = np.asarray(scale, dtype=np.float64)
    return (commands - np.asarray(offset)) / np.where(scales == 0.0, 1.0, scales)


def clipped_shares(commands: np.ndarray, scale: Sequence[float], offset: Sequence[float]) -> np.ndarray:
    """Return the share of commands [steps, axes] that `training_values` clips, per axis, 0 to 1."""
    return (np.abs(unclipped_values(commands, scale, offset)) > 1.0 + _ROUNDING).mean(axis=0)
