"""GraphEngine: the whole step, from the uint8 frame to the action and the next state, as one captured CUDA graph.

A step is one copy into pinned memory, one launch and one wait, without Python or synchronisation between kernels. A
graph is valid for one number of tokens. Another instruction of the same length only rewrites the graph's inputs; each
new length is captured once. The graphs share one memory pool, because only one runs at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from mobile_vla_inference.policy.architecture import HybridModel, state_parts
from mobile_vla_inference.policy.engines.engine import require_finite_answer, state_magnitude
from mobile_vla_inference.policy.engines.forward import EncodedInstruction, FlatModel
from mobile_vla_inference.policy.engines.operations import TorchOperations
from mobile_vla_inference.policy.preprocess import Prompt

#: So many graphs, for instructions of different lengths, are kept.
_MAX_GRAPHS = 8
#: Runs before a capture, in which kernels are compiled and libraries create their handles.
_RUNS_BEFORE_CAPTURE = 2


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    instruction: EncodedInstruction


class GraphEngine:
    """An Engine that replays a captured step on a CUDA device.

    Attributes:
        flat: the model that is captured.
    """

    def __init__(
        self, model: HybridModel, operations: TorchOperations, device: torch.device, *, compiled: bool = False
    ) -> None:
        """Copy the weights to the device; see FlatModel for the arguments.

        With `compiled`, torch.compile makes the kernels, which takes minutes.
        """
        self.flat = FlatModel(model, operations, device, one_stream=compiled)
        self._step = torch.compile(self.flat.step, dynamic=False) if compiled else self.flat.step
        self._device = device
        side = model.config.image_size
        self._host_frame = torch.zeros(side, side, 3, dtype=torch.uint8, pin_memory=True)
        self._frame_view = self._host_frame.numpy()
        self._frame = torch.zeros_like(self._host_frame, device=device)
        # The actions and the magnitude of the state, in one transfer.
        self._host_answer = torch.zeros(model.config.num_actions + 1, pin_memory=True)
        self._state = self.flat.initial_state()
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: OrderedDict[int, _Captured] = OrderedDict()
        self._current: _Captured | None = None

    def set_instruction(self, prompt: Prompt, clip_ids: torch.Tensor | None) -> None:
        """See Engine. An instruction of a new length takes longer, because its step is captured."""
        instruction = self.flat.instruction(prompt, clip_ids)
        tokens = prompt.input_ids.shape[1]
        # Weights and instruction were computed on the caller's stream.
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
        """See Engine."""
        np.copyto(self._frame_view, frame)
        with torch.cuda.stream(self._stream):
            self._current.graph.replay()
        self._stream.synchronize()
        return require_finite_answer(self._host_answer.numpy().copy(), self.reset)

    @torch.inference_mode()
    def features(self, frame: np.ndarray) -> np.ndarray:
        """See Engine."""
        with torch.cuda.stream(self._stream):
            pixels = torch.tensor(frame, device=self._device)
            return self.flat.fused_features(pixels, self._current.instruction).cpu().numpy()

    def parts(self, frame: np.ndarray) -> dict[str, Callable[[], object]]:
        """Return the parts of a step on a frame, to be timed one by one; see FlatModel.parts."""
        return self.flat.parts(torch.tensor(frame, device=self._device), self._current.instruction, self._state)

    def reset(self) -> None:
        """See Engine."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for part in state_parts(self._state):
                part.zero_()

    def _capture(self, instruction: EncodedInstruction) -> _Captured:
        """Record the step for instructions of one length."""
        own = replace(instruction, **{name: part.clone() for name, part in _parts(instruction).items()})
        before = [part.clone() for part in state_parts(self._state)]
        for _ in range(_RUNS_BEFORE_CAPTURE):
            self._run(own)
        self._stream.synchronize()
        for part, kept in zip(state_parts(self._state), before):
            part.copy_(kept)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._run(own)
        torch.cuda.empty_cache()  # gives back what the first runs took outside the graphs' pool
        return _Captured(graph, own)

    def _run(self, instruction: EncodedInstruction) -> None:
        """Run a whole step on the current stream, from the frame in host memory to the answer there."""
        self._frame.copy_(self._host_frame, non_blocking=True)
        actions, state = self._step(self._frame, instruction, self._state)
        for part, after in zip(state_parts(self._state), state_parts(state)):
            part.copy_(after)
        self._host_answer.copy_(torch.cat([actions, state_magnitude(state)]), non_blocking=True)


def _parts(instruction: EncodedInstruction) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(instruction).items() if isinstance(value, torch.Tensor)}


def _copy_into(target: EncodedInstruction, source: EncodedInstruction) -> None:
    values = _parts(source)
    for name, part in _parts(target).items():
        part.copy_(values[name])
