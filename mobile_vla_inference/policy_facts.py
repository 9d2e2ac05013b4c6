"""What the node and the policy worker agree on: the choices of device, number type and engine, and the message limit.

Standard library only: the node imports this without torch, and the worker without rclpy.
"""

from __future__ import annotations

#: Longest message between the node and its worker; a larger one is refused with a sentence by whoever would send it.
MAX_MESSAGE_BYTES = 1 << 17

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "float16", "bfloat16")
#: How a step runs: `graph` (one captured CUDA graph), `flat` (the same arithmetic, operation by operation), `eager`
#: (transformers' modules: the reference); `auto` takes the fastest that runs on the device.
ENGINES = ("auto", "graph", "compiled", "packed", "flat", "eager")
