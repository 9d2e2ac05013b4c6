"""GraphEngine: the whole step, from the uint8 frame to the action and the next state, as one captured CUDA graph.

A step is one copy into pinned memory, one launch and one wait: no Python between kernels, no synchronising operation.
A graph belongs to a number of tokens; another instruction of the same length only rewrites its inputs, a new length is
captured once. Graphs share one memory pool, because no two ever run at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.engines.engine import require_finite_answer
from mobile_vla_inference.policy.engines.flat import state_magnitude
from mobile_vla_inference.policy.engines.forward import FlatModel, Instruction, Operations
from mobile_vla_inference.policy.preprocess import Prompt

#: Instructions of so many different lengths are kept captured.
_MAX_GRAPHS = 8
#: Runs before a capture: kernels are compiled and libraries make their handles.
_RUNS_BEFORE_CAPTURE = 2


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    instruction: Instruction


class GraphEngine:
    """Replay a captured step on a CUDA device."""

    def __init__(
        self,
        model: HybridModel,
        operations: Operations,
        device: torch.device,
        *,
        quantized: bool = False,
        compiled: bool = False,
    ) -> None:
        """Copy the weights to the device; see FlatModel for the arguments. `compiled`: by torch.compile, minutes."""
        self.flat = FlatModel(model, operations, device, quantized=quantized, one_stream=compiled)
        self._step = torch.compile(self.flat.step, dynamic=False) if compiled else self.flat.step
        self._device = device
        side = model.config.image_size
        self._host_frame = torch.zeros(side, side, 3, dtype=torch.uint8, pin_memory=True)
        self._frame_view = self._host_frame.numpy()
        self._frame = torch.zeros_like(self._host_frame, device=device)
        # The actions, and the magnitude of the state: one transfer answers both.
        self._host_answer = torch.zeros(model.config.num_actions + 1, pin_memory=True)
        self._state = self.flat.initial_state()
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: OrderedDict[int, _Captured] = OrderedDict()
        self._current: _Captured | None = None

    def set_instruction(self, prompt: Prompt, clip_ids: torch.Tensor | None) -> None:
        """Take the tokens of a new instruction; the hidden state stays. A new length takes longer: it is captured."""
        instruction = self.flat.instruction(prompt, clip_ids)
        tokens = prompt.input_ids.shape[1]
        # Weights and instruction are made on the caller's stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            captured = self._graphs.get(tokens)
            if captured is None or captured.instruction.first_image_row != instruction.first_image_row:
                captured = self._capture(instruction)
                self._graphs[tokens] = captured
                if len(self._graphs) > _MAX_GRAPHS:
                    self._graphs.popitem(last=False)
            _copy_into(captured.instruction, instruction)
        self._graphs.move_to_end(tokens)
        self._current = captured
        self._stream.synchronize()

    def step(self, frame: np.ndarray) -> np.ndarray:
        """Map a frame, uint8 RGB [image_size, image_size, 3], to an action, float32 [actions]; advance the state.

        Raises:
            PolicyError: the action or the state is not finite; the state is reset.
        """
        np.copyto(self._frame_view, frame)
        with torch.cuda.stream(self._stream):
            self._current.graph.replay()
        self._stream.synchronize()
        return require_finite_answer(self._host_answer.numpy().copy(), self.reset)

    @torch.inference_mode()
    def features(self, frame: np.ndarray) -> np.ndarray:
        """Return what the cell reads of a frame, float32 [cell input], for comparisons; the state stays."""
        with torch.cuda.stream(self._stream):
            pixels = torch.tensor(frame, device=self._device)
            return self.flat.fused_features(pixels, self._current.instruction).cpu().numpy()

    def parts(self, frame: np.ndarray) -> dict[str, Callable[[], object]]:
        """Return the parts of a step on a frame, to be timed one by one; see FlatModel.parts."""
        return self.flat.parts(torch.tensor(frame, device=self._device), self._current.instruction, self._state)

    def reset(self) -> None:
        """Clear the hidden state."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for part in self._state_parts():
                part.zero_()

    def _state_parts(self) -> tuple[torch.Tensor, ...]:
        return self._state if isinstance(self._state, tuple) else (self._state,)

    def _capture(self, instruction: Instruction) -> _Captured:
        """Record the step for instructions of one length."""
        own = replace(instruction, **{name: part.clone() for name, part in _parts(instruction).items()})
        before = [part.clone() for part in self._state_parts()]
        for _ in range(_RUNS_BEFORE_CAPTURE):
            self._run(own)
        self._stream.synchronize()
        for part, kept in zip(self._state_parts(), before):
            part.copy_(kept)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._run(own)
        torch.cuda.empty_cache()  # what the first runs took outside the graphs' pool
        return _Captured(graph, own)

    def _run(self, instruction: Instruction) -> None:
        """Do everything that a step is, on the current stream."""
        self._frame.copy_(self._host_frame, non_blocking=True)
        actions, state = self._step(self._frame, instruction, self._state)
        parts = state if isinstance(state, tuple) else (state,)
        for part, after in zip(self._state_parts(), parts):
            part.copy_(after)
        self._host_answer.copy_(torch.cat([actions, state_magnitude(state)]), non_blocking=True)


def _parts(instruction: Instruction) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(instruction).items() if isinstance(value, torch.Tensor)}


def _copy_into(target: Instruction, source: Instruction) -> None:
    values = _parts(source)
    for name, part in _parts(target).items():
        part.copy_(values[name])
