"""The process that `mobile_vla bench load` watches: it loads a checkpoint in one way and reports the end of each stage.

Started as `python -m mobile_vla_inference.tools.bench.load_child REQUEST` (JSON); answers JSON lines on stdout: stages
with the steady time and the memory at their end, progress, or the sentence of a refusal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.tools.bench.machine import read_memory_mib
from mobile_vla_inference.units import MIB

if TYPE_CHECKING:
    from mobile_vla_inference.policy.architecture import HybridModel

_INSTRUCTION = "go to the cup"

Report = Callable[..., None]


def load_as_usual(path: Path, device: str, dtype: str) -> HybridModel:
    """Load a .pth in the way that most scripts do: read all of it, build, copy, cast.

    Raises:
        MobileVlaError: it can't be read, or has another architecture.
    """
    import torch

    from mobile_vla_inference.policy.architecture import HybridModel
    from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    index = checkpoint.index
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    state = content if index.wrapper is None else content[index.wrapper]
    model = HybridModel(checkpoint.config, checkpoint.settings)
    model.load_state_dict({name: state[index.file_keys[name]] for name in index.stored}, strict=True)
    return model.to(device=device, dtype=getattr(torch, dtype)).eval()


def camera_frame() -> np.ndarray:
    """Return a frame, uint8 RGB [720, 1280, 3], with soft shapes like a camera's instead of noise."""
    patches = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    return cv2.resize(patches, (1280, 720), interpolation=cv2.INTER_CUBIC)


def _run(request: dict[str, Any], report: Report) -> None:
    import torch

    import mobile_vla_inference.policy.engines.choice
    import mobile_vla_inference.policy.preprocess  # noqa: F401
    from mobile_vla_inference.policy.vla_policy import VlaPolicy

    path, device, dtype = Path(request["checkpoint"]), request["device"], request["dtype"]
    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
    report(stage="imported")
    if request["way"] == "naive":
        load_as_usual(path, device, dtype)
        report(stage="loaded", gpu_mib=_gpu_peak_mib(device))
        return
    policy = VlaPolicy.load(
        path, device=device, dtype=dtype, engine=request["engine"], progress=lambda text: report(progress=text)
    )
    report(stage="loaded", gpu_mib=_gpu_peak_mib(device))
    policy.set_instruction(_INSTRUCTION)
    action = policy.step(camera_frame())
    report(stage="acted", gpu_mib=_gpu_peak_mib(device), action=action.values)


def _gpu_peak_mib(device: str) -> float:
    """Wait for the GPU and return the peak of its allocated memory; 0 on the CPU."""
    import torch

    if device != "cuda":
        return 0.0
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / MIB


def main() -> int:
    """Load by the request on the command line; return 0, or 2 if the loader refused."""
    # Output of libraries must not mix with the lines of the answer.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def report(**facts: Any) -> None:
        now = {"time_s": time.monotonic(), "cpu_s": time.process_time(), "memory": read_memory_mib()}
        print(json.dumps({**now, **facts}), file=channel, flush=True)

    try:
        _run(json.loads(sys.argv[1]), report)
    except MobileVlaError as error:
        report(refused=str(error))
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
