"""The stop benchmark's node: vla_node as it is, with the stand-in for its policy."""

from __future__ import annotations

from mobile_vla_inference.ros import node
from mobile_vla_inference.tools.bench import node_worker

if __name__ == "__main__":
    raise SystemExit(node.main(worker_module=node_worker.__name__))
