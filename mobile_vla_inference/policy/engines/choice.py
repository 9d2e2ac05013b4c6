"""Load a checkpoint into the engine that suits the device, with a fallback that is told and never silent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mobile_vla_inference.errors import DeviceError
from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.engines.cpu import CpuEngine, can_pack
from mobile_vla_inference.policy.engines.engine import EagerEngine, Engine
from mobile_vla_inference.policy.engines.flat import FlatEngine
from mobile_vla_inference.policy.engines.forward import TorchOperations
from mobile_vla_inference.policy.finite_weights import require_finite
from mobile_vla_inference.policy.loading import Progress, check_memory, load_model
from mobile_vla_inference.policy.storage.checkpoint import Checkpoint

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that has run a step, and what to tell of it.

    Attributes:
        engine: ready for an instruction.
        model: the module that its weights come from.
        name: which engine it is.
        fallback: why it is not the first choice; empty where it is.
    """

    engine: Engine
    model: HybridModel
    name: str
    fallback: str


def load_engine(
    name: str,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    prepare: Callable[[HybridModel], None],
    probe: Callable[[Engine], None],
    progress: Progress | None = None,
    force: bool = False,
) -> LoadedEngine:
    """Load a checkpoint for one of ENGINES, or for the best that runs here (`auto`).

    Args:
        name: `auto`, `eager`, `flat`, `packed`, `graph` or `compiled` (never by `auto`: it takes minutes).
        checkpoint: what to load.
        device: where it runs.
        dtype: type of the arithmetic.
        prepare: called with the module before an engine takes it.
        probe: sets an instruction and runs a step; where it raises, `auto` takes the next engine.
        progress: called with the bytes loaded so far and in all.
        force: load even where the memory seems too small.

    Raises:
        CheckpointError: it can't be loaded, or a weight is not finite in this type.
        DeviceError: the engine does not run on this device.
    """
    if name in ("graph", "compiled") and device.type != "cuda":
        raise DeviceError(f"engine is {name}, expected a CUDA device for it; use engine flat or auto")
    if name == "eager" or (name == "auto" and device.type not in ("cpu", "cuda")):
        model = load_model(checkpoint, device=device, dtype=dtype, progress=progress, force=force)
        prepare(model)
        return LoadedEngine(EagerEngine(model), model, "eager", "")
    if name == "packed" and device.type != "cpu":
        raise DeviceError("engine is packed, expected device cpu for it; use engine graph or auto")
    if device.type == "cpu":
        packs, fallback = _chooses_packed(name, checkpoint, dtype)
        # Packed products widen 16-bit weights as they read them: the arithmetic is fp32.
        arithmetic = torch.float32 if packs else dtype
        model = load_model(checkpoint, device=device, dtype=arithmetic, progress=progress, force=force)
        prepare(model)
        if packs:
            return LoadedEngine(CpuEngine(model), model, "packed", "")
        return LoadedEngine(FlatEngine(model, TorchOperations(dtype), device), model, "flat", fallback)
    if not force:
        check_memory(checkpoint, device, dtype)
    # The pages of the file: the engine copies what it needs to the device, in its final form.
    model = load_model(checkpoint, device="cpu", dtype=None, progress=progress, force=force)
    prepare(model)
    return _first_that_runs(name, checkpoint, model, device, dtype, probe)


def _chooses_packed(name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[bool, str]:
    """Tell whether the CPU's packed products are to be used, and why not where they would be the first choice."""
    wanted = name == "packed" or (name == "auto" and (dtype == torch.float16 or checkpoint.quantization is not None))
    if not wanted or can_pack():
        return wanted, ""
    fallback = "engine packed does not run here (this torch has no FBGEMM, or the CPU no AVX2)"
    if name == "packed":
        raise DeviceError(f"{fallback}; use engine flat or auto")
    _LOG.warning("%s; trying the next", fallback)
    return False, fallback


def _first_that_runs(
    name: str,
    checkpoint: Checkpoint,
    model: HybridModel,
    device: torch.device,
    dtype: torch.dtype,
    probe: Callable[[Engine], None],
) -> LoadedEngine:
    """Return the first engine of a CUDA device whose probe runs."""
    fallback = ""
    for candidate, make in _cuda_engines(name, model, device, dtype):
        try:
            engine = make()
            probe(engine)
        except torch.OutOfMemoryError:
            raise  # the next one needs no less
        except Exception as error:  # a driver's, a compiler's or a library's own class: whatever it is, it is told
            if name != "auto":
                raise
            fallback = f"engine {candidate} does not run here ({type(error).__name__}: {_first_line(error)})"
            _LOG.warning("%s; trying the next", fallback)
            torch.cuda.empty_cache()
            continue
        if not engine.flat.all_finite():
            _name_what_is_not_finite(checkpoint, model, dtype)
        return LoadedEngine(engine, model, candidate, fallback)
    raise DeviceError(f"no engine runs on {device}: {fallback}; use device cpu, or engine eager")


def _cuda_engines(
    name: str, model: HybridModel, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Engine]]]:
    """Yield engines, fastest first, with what makes them."""
    from mobile_vla_inference.policy.engines import triton_kernels as kernels
    from mobile_vla_inference.policy.engines.graph import GraphEngine

    if name in ("auto", "graph"):
        if kernels.AVAILABLE and dtype in (torch.float16, torch.bfloat16):
            yield "graph", lambda: GraphEngine(model, kernels.TritonOperations(dtype, device), device)
        if name == "auto" or not kernels.AVAILABLE or dtype == torch.float32:
            yield "graph without Triton", lambda: GraphEngine(model, TorchOperations(dtype), device)
    if name == "compiled":
        yield "compiled", lambda: GraphEngine(model, TorchOperations(dtype), device, compiled=True)
    if name in ("auto", "flat"):
        yield "flat", lambda: FlatEngine(model, TorchOperations(dtype), device)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _name_what_is_not_finite(checkpoint: Checkpoint, model: HybridModel, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            require_finite(checkpoint, name, parameter.to(dtype))
