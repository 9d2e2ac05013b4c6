"""Load a checkpoint as a module, within a memory budget.

Loading maps the file and casts tensor by tensor into the place where it is used: the module is built on the meta
device, nothing is initialised, and there is never a second copy of the weights. No pickle is run: the tensor index
already contains the place of each tensor, so the optimizer, lm_head and other unused weights are never read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.engines.quantize import use_int8_linears, use_widening_modules
from mobile_vla_inference.policy.finite_weights import require_finite
from mobile_vla_inference.policy.mapped_tensors import MappedTensor, mapped_tensors
from mobile_vla_inference.policy.storage.checkpoint import Checkpoint, open_checkpoint
from mobile_vla_inference.policy.storage.memory_budget import (
    LOAD_MARGIN_BYTES,
    available_bytes,
    copied_bytes,
    is_widened,
    loaded_dtype,
    stays_mapped,
)
from mobile_vla_inference.policy.storage.tensor_index import TensorEntry
from mobile_vla_inference.units import MIB

#: Called with the bytes of the file's tensors that are loaded so far, and of all of them.
Progress = Callable[[int, int], None]


def load_model(
    checkpoint: Checkpoint | Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> HybridModel:
    """Load a checkpoint as a module in eval mode. The file must not change during the call.

    Weights that are int8 in the file stay int8, in modules of quantize.Int8Linear; `dtype` is for the others. The
    matrices of a 16-bit file that is loaded as float32 on the CPU stay mapped, and are widened in use (quantize.py).

    On the CPU, tensors that already have the type stay mapped: they are not copied, and the kernel can drop their
    pages and read them again. Otherwise peak memory is that of the new weights and one tensor.

    Args:
        checkpoint: an opened one, or its path.
        device: where the weights go.
        dtype: their data type; None: as in the file.
        progress: called after each tensor.
        force: load even if the memory seems too small.

    Raises:
        CheckpointError: it can't be read or has no known architecture, memory is too small, or a weight that is copied
            is not finite.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    device = torch.device(device)
    if not force:
        check_memory(checkpoint, device, dtype)
    with torch.device("meta"):
        model = HybridModel(checkpoint.config, checkpoint.settings)
        dtype_name = None if dtype is None else _dtype_name(dtype)
        stored = checkpoint.index.stored
        use_int8_linears(model, checkpoint.index.scales)
        use_widening_modules(model, (n for n, e in stored.items() if is_widened(n, e, device.type, dtype_name)))
    weights = {}
    done, total = 0, sum(entry.nbytes for entry in stored.values())

    def is_copied(name: str, entry: TensorEntry) -> bool:
        return not stays_mapped(name, entry, device.type, dtype_name)

    for name, entry, mapped in mapped_tensors(stored, is_copied):
        tensor_dtype = getattr(torch, loaded_dtype(name, entry, device.type, dtype_name))
        weights[name] = _place(checkpoint, name, mapped, device, tensor_dtype)
        if weights[name] is not mapped.tensor:
            mapped.drop_pages()
        done += entry.nbytes
        if progress is not None:
            progress(done, total)
    model.load_state_dict(weights, strict=True, assign=True)
    model.materialize_buffers(device)
    return model.eval().requires_grad_(False)


def check_memory(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raise CheckpointError if loading needs more memory than is available."""
    dtype_name = None if dtype is None else _dtype_name(dtype)
    weights, largest = copied_bytes(checkpoint.index, device.type, dtype_name)
    if device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated:
        free, _ = torch.cuda.mem_get_info(device)
        _refuse_if_short(checkpoint.path, weights + largest, free, "GPU memory")
        weights = 0  # the host only holds the tensor that is being cast
    _refuse_if_short(checkpoint.path, weights + largest + LOAD_MARGIN_BYTES, available_bytes(), "memory")


def _refuse_if_short(path: Path, need: int, available: int, what: str) -> None:
    if need > available:
        raise CheckpointError(
            f"loading {path} needs {need / MIB:.0f} MiB of {what}, but {available / MIB:.0f} MiB is available, "
            f"expected at least as much; close other programs, use a smaller dtype, or load it anyway "
            f"(--force; for vla_node the parameter force_load)"
        )


def _place(
    checkpoint: Checkpoint, name: str, mapped: MappedTensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return a tensor on its device in its type: a cast copy, or the mapped tensor if nothing changes."""
    source = mapped.tensor
    placed = source.to(device=device, dtype=dtype)
    if placed is source and source.data_ptr() % source.element_size():
        placed = source.clone()
    if placed is not source and placed.is_floating_point():
        require_finite(checkpoint, name, placed)
    return placed


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
