"""EagerEngine: transformers' modules layer by layer, on any device; the reference for the other engines."""

from __future__ import annotations

import numpy as np
import torch

from mobile_vla_inference.policy.architecture import HiddenState, HybridModel
from mobile_vla_inference.policy.engines.engine import require_finite_answer, state_magnitude
from mobile_vla_inference.policy.preprocess import FrameNormalizer, Prompt


class EagerEngine:
    """An Engine that runs the module as it is, in its own type, on its own device."""

    def __init__(self, model: HybridModel) -> None:
        self._model = model
        self._normalize = FrameNormalizer(model.settings, model.device, model.dtype)
        self._prompt: Prompt | None = None
        self._clip_text_feature: torch.Tensor | None = None
        self._hidden_state: HiddenState = model.initial_hidden_state()

    @torch.inference_mode()
    def set_instruction(self, prompt: Prompt, clip_ids: torch.Tensor | None) -> None:
        """See Engine."""
        device = self._model.device
        feature = None
        if self._model.reads_clip_text:
            feature = self._model.clip_text_feature(clip_ids.to(device))
        self._prompt, self._clip_text_feature = prompt.to(device), feature

    @torch.inference_mode()
    def step(self, frame: np.ndarray) -> np.ndarray:
        """See Engine."""
        actions, self._hidden_state = self._model.act(self._fused_features(frame), self._hidden_state)
        # One transfer from the device for both: the values, and whether the state is finite.
        answer = torch.cat([actions[0].float(), state_magnitude(self._hidden_state)]).cpu().numpy()
        return require_finite_answer(answer, self.reset)

    @torch.inference_mode()
    def features(self, frame: np.ndarray) -> np.ndarray:
        """See Engine."""
        return self._fused_features(frame)[0].float().cpu().numpy()

    def reset(self) -> None:
        """See Engine."""
        self._hidden_state = self._model.initial_hidden_state()

    def _fused_features(self, frame: np.ndarray) -> torch.Tensor:
        return self._model.fused_features(self._normalize(frame), self._prompt, self._clip_text_feature)
