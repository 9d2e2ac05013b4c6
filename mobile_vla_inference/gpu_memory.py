"""GPU memory that torch holds in this process; read without importing torch."""

from __future__ import annotations

import sys

from mobile_vla_inference.units import MIB


def gpu_memory_mib() -> dict[str, float] | None:
    """Return the memory of tensors (`gpu_allocated_mib`) and of torch's cache (`gpu_reserved_mib`), MiB.

    None as long as this process has not used a GPU.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return {
        "gpu_allocated_mib": torch.cuda.memory_allocated() / MIB,
        "gpu_reserved_mib": torch.cuda.memory_reserved() / MIB,
    }
