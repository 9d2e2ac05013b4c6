"""Engine: how one step runs. It holds an instruction's tensors and the hidden state, and maps a frame to an action."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from mobile_vla_inference.errors import PolicyError
from mobile_vla_inference.policy.architecture import HiddenState, state_parts
from mobile_vla_inference.policy.preprocess import Prompt


class Engine(Protocol):
    """What VlaPolicy needs of an engine."""

    def set_instruction(self, prompt: Prompt, clip_ids: torch.Tensor | None) -> None:
        """Take the tokens of a new instruction; the hidden state stays."""

    def step(self, frame: np.ndarray) -> np.ndarray:
        """Map a frame, uint8 RGB [image_size, image_size, 3], to an action, float32 [actions]; advance the state.

        Raises:
            PolicyError: the action or the state is not finite; the state is reset.
        """

    def features(self, frame: np.ndarray) -> np.ndarray:
        """Return the LSTM's input for a frame, float32 [cell input], for comparisons; the state stays."""

    def reset(self) -> None:
        """Clear the hidden state."""


def state_magnitude(state: HiddenState) -> torch.Tensor:
    """Return the sum of the state's magnitudes, fp32 [1]: not finite if any value is not."""
    return torch.stack([part.float().abs().sum() for part in state_parts(state)]).sum().unsqueeze(0)


def require_finite_answer(answer: np.ndarray, reset: Callable[[], None]) -> np.ndarray:
    """Return the actions of an answer, whose last entry is the state's magnitude.

    Raises:
        PolicyError: something is not finite; `reset` has been called.
    """
    if not np.isfinite(answer).all():
        reset()
        raise PolicyError(
            f"the policy computed the action {answer[:-1].tolist()} with a state of magnitude {answer[-1]}, "
            f"expected finite numbers; check the checkpoint, or load it with dtype float32"
        )
    return answer[:-1]
