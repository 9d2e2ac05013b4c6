"""What the node and the policy worker agree on: the choices of device, number type and engine, and the message limit.

Standard library only: the node imports this without torch, and the worker without rclpy.
"""

from __future__ import annotations

#: Longest message between the node and its worker; a larger one is refused with a sentence by whoever would send it.
MAX_MESSAGE_BYTES = 1 << 17

DEVICES = ("auto", "cpu", "cuda")

#: Types that weights can have while a step runs; `auto` is float16 on a GPU and float32 on a CPU.
FLOAT_DTYPES = ("float32", "float16", "bfloat16")
DTYPES = ("auto", *FLOAT_DTYPES)

#: The engines, that is, the ways to run a step, and the devices that each runs on:
#: `graph` (one captured CUDA graph), `compiled` (a graph of what torch.compile makes, which takes minutes),
#: `packed` (flat arithmetic with packed matrices), `flat` (flat arithmetic, operation by operation),
#: `eager` (transformers' modules: the reference).
ENGINE_DEVICES = {
    "graph": ("cuda",),
    "compiled": ("cuda",),
    "packed": ("cpu",),
    "flat": ("cpu", "cuda"),
    "eager": ("cpu", "cuda"),
}
#: `auto` is the fastest engine that runs on the device; it never takes `compiled`.
ENGINES = ("auto", *ENGINE_DEVICES)
