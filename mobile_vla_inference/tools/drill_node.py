"""The drill's node: vla_node as it is, with the worker that fails on demand."""

from __future__ import annotations

from mobile_vla_inference.ros import node
from mobile_vla_inference.tools import drill_worker

if __name__ == "__main__":
    raise SystemExit(node.main(worker_module=drill_worker.__name__))
