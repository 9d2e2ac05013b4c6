"""Commands in the units of training. Pure numpy, for calibration and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def training_values(commands: np.ndarray, scale: Sequence[float], offset: Sequence[float]) -> np.ndarray:
    """Return commands [..., axes] as training saw them: over the scale, clipped to [-1, 1]."""
    scales = np.asarray(scale, dtype=np.float64)
    return np.clip((commands - np.asarray(offset)) / np.where(scales == 0.0, 1.0, scales), -1.0, 1.0)
