"""How one step runs: an engine holds the instruction's tensors and the hidden state, and turns a frame into an action.

`EagerEngine` calls the module layer by layer on any device: the reference that other engines are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from mobile_vla_inference.errors import PolicyError
from mobile_vla_inference.policy.architecture import HiddenState, HybridModel
from mobile_vla_inference.policy.preprocess import FrameNormalizer, Prompt


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
        """Return what the cell reads of a frame, float32 [cell input], for comparisons; the state stays."""

    def reset(self) -> None:
        """Clear the hidden state."""


class EagerEngine:
    """Run the module as it is, in its own type, on its own device."""

    def __init__(self, model: HybridModel) -> None:
        self._model = model
        self._normalize = FrameNormalizer(model.settings, model.device, model.dtype)
        self._prompt: Prompt | None = None
        self._clip_text_feature: torch.Tensor | None = None
        self._hidden_state: HiddenState = model.initial_hidden_state()

    @torch.inference_mode()
    def set_instruction(self, prompt: Prompt, clip_ids: torch.Tensor | None) -> None:
        """Take the tokens of a new instruction and compute CLIP's text feature; the hidden state stays."""
        device = self._model.device
        feature = None
        if self._model.reads_clip_text:
            feature = self._model.clip_text_feature(clip_ids.to(device))
        self._prompt, self._clip_text_feature = prompt.to(device), feature

    @torch.inference_mode()
    def step(self, frame: np.ndarray) -> np.ndarray:
        """Map a frame, uint8 RGB [image_size, image_size, 3], to an action, float32 [actions]; advance the state.

        Raises:
            PolicyError: the action or the state is not finite; the state is reset.
        """
        features = self._model.fused_features(self._normalize(frame), self._prompt, self._clip_text_feature)
        actions, self._hidden_state = self._model.act(features, self._hidden_state)
        # One transfer from the device answers both: the values, and whether the state is finite.
        checked = torch.cat([actions[0], _largest(self._hidden_state)]).float().cpu().numpy()
        return require_finite_answer(checked, self.reset)

    @torch.inference_mode()
    def features(self, frame: np.ndarray) -> np.ndarray:
        """Return what the cell reads of a frame, float32 [cell input], for comparisons; the state stays."""
        features = self._model.fused_features(self._normalize(frame), self._prompt, self._clip_text_feature)
        return features[0].float().cpu().numpy()

    def reset(self) -> None:
        """Clear the hidden state."""
        self._hidden_state = self._model.initial_hidden_state()


def require_finite_answer(answer: np.ndarray, reset: Callable[[], None]) -> np.ndarray:
    """Return the actions of an answer whose last entry stands for the state's magnitude.

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


def _largest(hidden_state: HiddenState) -> torch.Tensor:
    """Return the largest magnitude in the state, [1]; NaN where there is one."""
    parts = hidden_state if isinstance(hidden_state, tuple) else (hidden_state,)
    return torch.stack([part.abs().amax() for part in parts]).amax(dim=0, keepdim=True)
