"""VlaPolicy: a loaded checkpoint that follows an instruction, one camera frame at a time.

    policy = VlaPolicy.load("best_simple_clip_lstm_model.pth", device="auto")
    policy.warm_up()
    policy.set_instruction("박스를 왼쪽으로 돌아서 컵까지 가세요")
    action = policy.step(frame)  # uint8 RGB [height, width, 3] -> normalised values

The LSTM state is kept from step to step; `reset`, or another instruction, clears it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobile_vla_inference.action import Action
from mobile_vla_inference.errors import DeviceError, InstructionError
from mobile_vla_inference.frames import reduce_frame
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.policy.facts import policy_facts
from mobile_vla_inference.policy.storage.config import HybridConfig
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy_facts import DEVICES, DTYPES, ENGINES, PolicyFacts

if TYPE_CHECKING:
    import torch

    from mobile_vla_inference.policy.architecture import HybridModel
    from mobile_vla_inference.policy.engines.engine import Engine
    from mobile_vla_inference.policy.preprocess import InstructionEncoder

_WARM_UP_STEPS = 3
_WARM_UP_INSTRUCTION = "warm up"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")


class VlaPolicy:
    """A policy in memory. Not thread-safe: one caller at a time.

    Attributes:
        settings: facts that the tensors don't contain, from the checkpoint's settings file.
        config: sizes of the architecture variant.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: InstructionEncoder,
        config: HybridConfig,
        settings: PolicySettings,
        facts: PolicyFacts,
    ) -> None:
        self.config = config
        self.settings = settings
        self._engine = engine
        self._encoder = encoder
        self._facts = facts
        self._instruction = ""

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        engine: str = "auto",
        processors: Path | str | None = None,
        progress: Callable[[str], None] | None = None,
        force: bool = False,
    ) -> VlaPolicy:
        """Load a checkpoint file or a converted folder, with its settings and processors. Never uses the network.

        Args:
            path: the checkpoint.
            device: `cpu`, `cuda`, or `auto` (cuda where there is one).
            dtype: type of the weights; `auto`: float32 on the CPU, float16 on cuda. Weights that are int8 in a
                converted folder stay int8; the arithmetic uses this type.
            engine: one of ENGINES.
            processors: folder with the two tokenizer folders; None: next to the checkpoint.
            progress: called with a few words on the present stage.
            force: load even if the memory seems too small.

        Raises:
            CheckpointError: the checkpoint, its settings or its processors can't be used.
            DeviceError: the device, type or engine is unknown or not available.
        """
        for variable in _OFFLINE:
            os.environ[variable] = "1"
        # Imported here: huggingface_hub reads the variables above when it is imported.
        from mobile_vla_inference.policy.engines.choice import load_engine
        from mobile_vla_inference.policy.preprocess import InstructionEncoder
        from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
        from mobile_vla_inference.policy.storage.checkpoint_files import find_processors, processor_folders

        report = progress or (lambda stage: None)
        torch_device = _device(device)
        torch_dtype = _dtype(dtype, torch_device)
        if engine not in ENGINES:
            raise DeviceError(f"engine is {engine!r}, expected one of {', '.join(ENGINES)}; correct it")
        report("reading the checkpoint")
        checkpoint = open_checkpoint(path)
        config, settings = checkpoint.config, checkpoint.settings
        checkpoint.check_action_axes()
        folders = processor_folders(find_processors(path, processors), config)
        encoder = InstructionEncoder(folders, config, settings)

        def prepare(model: HybridModel) -> None:
            if encoder.clip_eos_token_id is not None and settings.clip_eos_token_id is None:
                model.set_clip_eos_token_id(encoder.clip_eos_token_id)

        def probe(candidate: Engine) -> None:
            candidate.set_instruction(encoder.prompt(_WARM_UP_INSTRUCTION), encoder.clip_ids(_WARM_UP_INSTRUCTION))
            candidate.step(_noise(config.image_size))
            candidate.reset()

        loaded = load_engine(
            engine,
            checkpoint,
            torch_device,
            torch_dtype,
            prepare=prepare,
            probe=probe,
            progress=_in_tenths(report),
            force=force,
        )
        checkpoint.check_unchanged()
        facts = policy_facts(
            path,
            checkpoint,
            dtype=str(torch_dtype).removeprefix("torch."),
            device=str(torch_device),
            engine=loaded.name,
            engine_fallback=loaded.fallback,
        )
        return cls(loaded.engine, encoder, config, settings, facts)

    @property
    def engine(self) -> Engine:
        """What runs the steps, for measurements."""
        return self._engine

    @property
    def encoder(self) -> InstructionEncoder:
        """What converts an instruction to tokens, for measurements."""
        return self._encoder

    def describe(self) -> PolicyFacts:
        """Return what was loaded, and how."""
        return self._facts

    def warm_up(self) -> None:
        """Run a few steps on noise, so that the first real step is as fast as the others. No instruction stays set."""
        noise = _noise(self.config.image_size)
        self.set_instruction(_WARM_UP_INSTRUCTION)
        for _ in range(_WARM_UP_STEPS):
            self._engine.step(noise)
        self.set_instruction("")

    def set_instruction(self, text: str) -> None:
        """Follow another instruction. A changed text resets the LSTM state; an empty one means none.

        Raises:
            InstructionError: the text is too long or not UTF-8; the former instruction stays.
        """
        instruction = check_instruction(text)
        if instruction == self._instruction:
            return
        if instruction:
            self._engine.set_instruction(self._encoder.prompt(instruction), self._encoder.clip_ids(instruction))
        self._instruction = instruction
        self.reset()

    def step(self, frame: np.ndarray) -> Action:
        """Compute the action for the next frame, uint8 RGB [height, width, 3] of any size, and advance the state.

        Raises:
            InstructionError: no instruction is set.
            FrameError: the frame is not a usable image.
            PolicyError: the action is not finite; the state is reset.
        """
        if not self._instruction:
            raise InstructionError("no instruction is set, expected one before the first step; call set_instruction")
        started = time.perf_counter()
        reduced = reduce_frame(frame, self.config.image_size, self.settings.image_keep_aspect)
        values = self._engine.step(reduced)
        return Action(tuple(float(value) for value in values), time.perf_counter() - started)

    def reset(self) -> None:
        """Clear the LSTM state, which is carried from step to step."""
        self._engine.reset()


def _noise(side_px: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)


def _in_tenths(report: Callable[[str], None]) -> Callable[[int, int], None]:
    """Return a progress callback of bytes that reports each tenth of the loading once."""
    reported = -1

    def progress(done: int, total: int) -> None:
        nonlocal reported
        tenth = 10 * done // total
        if tenth != reported:
            reported = tenth
            report(f"loading the weights: {10 * tenth} %")

    return progress


def _device(name: str) -> torch.device:
    import torch

    if name not in DEVICES:
        raise DeviceError(f"device is {name!r}, expected one of {', '.join(DEVICES)}; correct it")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "device is cuda, but torch finds no CUDA device, expected an NVIDIA GPU and a torch built for it; "
            "use device cpu"
        )
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise DeviceError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}; correct it")
    if name == "auto":
        name = "float32" if device.type == "cpu" else "float16"
    return getattr(torch, name)
