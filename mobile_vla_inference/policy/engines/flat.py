"""FlatEngine: the flat arithmetic of forward.py, operation by operation, on any device.

GraphEngine captures the same arithmetic, so all of it but the kernels is tested on machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.engines.engine import require_finite_answer, state_magnitude
from mobile_vla_inference.policy.engines.forward import EncodedInstruction, FlatModel
from mobile_vla_inference.policy.engines.operations import TorchOperations
from mobile_vla_inference.policy.preprocess import Prompt


class FlatEngine:
    """An Engine that runs the flat arithmetic directly.

    Attributes:
        flat: the model that runs.
    """

    def __init__(self, model: HybridModel, operations: TorchOperations, device: torch.device) -> None:
        """See FlatModel for the arguments."""
        self.flat = FlatModel(model, operations, device)
        self._device = device
        self._instruction: EncodedInstruction | None = None
        self._state = self.flat.initial_state()

    def set_instruction(self, prompt: Prompt, clip_ids: torch.Tensor | None) -> None:
        """See Engine."""
        self._instruction = self.flat.instruction(prompt, clip_ids)

    @torch.inference_mode()
    def step(self, frame: np.ndarray) -> np.ndarray:
        """See Engine."""
        pixels = torch.tensor(frame, device=self._device)  # a copy: the frame can be read-only or in shared memory
        actions, self._state = self.flat.step(pixels, self._instruction, self._state)
        answer = torch.cat([actions, state_magnitude(self._state)]).cpu().numpy()
        return require_finite_answer(answer, self.reset)

    @torch.inference_mode()
    def features(self, frame: np.ndarray) -> np.ndarray:
        """See Engine."""
        return self.flat.fused_features(torch.tensor(frame, device=self._device), self._instruction).cpu().numpy()

    def parts(self, frame: np.ndarray) -> dict[str, Callable[[], object]]:
        """Return the parts of a step on a frame, to be timed one by one; see FlatModel.parts."""
        return self.flat.parts(torch.tensor(frame, device=self._device), self._instruction, self._state)

    def reset(self) -> None:
        """See Engine."""
        self._state = self.flat.initial_state()
