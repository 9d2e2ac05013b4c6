"""Load a checkpoint into the engine that suits the device; a fallback is always reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mobile_vla_inference.errors import DeviceError
from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.engines.cpu import CpuEngine, can_pack
from mobile_vla_inference.policy.engines.eager import EagerEngine
from mobile_vla_inference.policy.engines.engine import Engine
from mobile_vla_inference.policy.engines.flat import FlatEngine
from mobile_vla_inference.policy.engines.graph import GraphEngine
from mobile_vla_inference.policy.engines.operations import TorchOperations
from mobile_vla_inference.policy.finite_weights import require_finite
from mobile_vla_inference.policy.loading import Progress, check_memory, load_model
from mobile_vla_inference.policy.storage.checkpoint import Checkpoint
from mobile_vla_inference.policy_facts import ENGINE_DEVICES

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedEngine:
    """An engine on its device, and what to report of it.

    Attributes:
        engine: ready for an instruction.
        model: the module that its weights come from.
        name: which engine it is.
        fallback: why it is not the first choice; empty if it is.
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
    """Load a checkpoint for an engine.

    Args:
        name: one of policy_facts.ENGINES.
        checkpoint: what to load.
        device: where it runs.
        dtype: type of the arithmetic.
        prepare: called with the module before an engine takes it.
        probe: sets an instruction and runs a step; if it raises, `auto` takes the next engine.
        progress: called with the bytes loaded so far and in all.
        force: load even if the memory seems too small.

    Raises:
        CheckpointError: it can't be loaded, or a weight is not finite in this type.
        DeviceError: the engine does not run on this device.
    """
    _check_device(name, device)

    def load(place: torch.device | str, weight_dtype: torch.dtype | None) -> HybridModel:
        model = load_model(checkpoint, device=place, dtype=weight_dtype, progress=progress, force=force)
        prepare(model)
        return model

    if name == "eager":
        model = load(device, dtype)
        return LoadedEngine(EagerEngine(model), model, name, "")
    if device.type == "cpu":
        is_packed, fallback = _chooses_packed(name, checkpoint, dtype)
        if is_packed:
            # Packed products widen 16-bit weights as they read them: the arithmetic is fp32.
            model = load(device, torch.float32)
            return LoadedEngine(CpuEngine(model), model, "packed", "")
        model = load(device, dtype)
        return LoadedEngine(FlatEngine(model, TorchOperations(dtype), device), model, "flat", fallback)
    if not force:
        check_memory(checkpoint, device, dtype)
    # The model stays on the CPU as pages of its file; the engine copies what it needs to the device.
    return _first_that_runs(name, checkpoint, load("cpu", None), device, dtype, probe)


def _check_device(name: str, device: torch.device) -> None:
    """Raise DeviceError if an engine does not run on a device."""
    if name == "auto" or device.type in ENGINE_DEVICES[name]:
        return
    if device.type == "cpu":
        raise DeviceError(f"engine is {name}, expected a CUDA device for it; use engine flat or auto")
    raise DeviceError(f"engine is {name}, expected device cpu for it; use engine graph or auto")


def _chooses_packed(name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether the CPU uses packed products, and why not if they are the first choice but do not run here."""
    is_wanted = name == "packed" or (name == "auto" and (dtype == torch.float16 or checkpoint.quantization is not None))
    if not is_wanted or can_pack():
        return is_wanted, ""
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
            raise  # the next engine needs as much memory
        except Exception as error:  # a driver, a compiler and a library each raise their own classes
            if name != "auto":
                raise
            fallback = f"engine {candidate} does not run here ({type(error).__name__}: {_first_line(error)})"
            _LOG.warning("%s; trying the next", fallback)
            torch.cuda.empty_cache()
            continue
        if not engine.flat.all_finite():
            _raise_for_the_weight_that_is_not_finite(checkpoint, model, dtype)
        return LoadedEngine(engine, model, candidate, fallback)
    raise DeviceError(f"no engine runs on {device}: {fallback}; use device cpu, or engine eager")


def _cuda_engines(
    name: str, model: HybridModel, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], FlatEngine | GraphEngine]]]:
    """Yield the name and the constructor of each engine that `name` allows, fastest first."""
    if name in ("auto", "graph"):
        triton_operations = _triton_operations()
        if triton_operations is not None and dtype in (torch.float16, torch.bfloat16):
            yield "graph", lambda: GraphEngine(model, triton_operations(dtype, device), device)
        if name == "auto" or triton_operations is None or dtype == torch.float32:
            yield "graph without Triton", lambda: GraphEngine(model, TorchOperations(dtype), device)
    if name == "compiled":
        yield "compiled", lambda: GraphEngine(model, TorchOperations(dtype), device, compiled=True)
    if name in ("auto", "flat"):
        yield "flat", lambda: FlatEngine(model, TorchOperations(dtype), device)


def _triton_operations() -> Callable[[torch.dtype, torch.device], TorchOperations] | None:
    """Return TritonOperations, or None if Triton, an optional dependency, is not installed.

    This is the only place that decides whether the modules that need Triton are imported.
    """
    try:
        import triton.language  # noqa: F401
    except ImportError:
        return None
    from mobile_vla_inference.policy.engines.triton_operations import TritonOperations

    return TritonOperations


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _raise_for_the_weight_that_is_not_finite(checkpoint: Checkpoint, model: HybridModel, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            require_finite(checkpoint, name, parameter.to(dtype))
