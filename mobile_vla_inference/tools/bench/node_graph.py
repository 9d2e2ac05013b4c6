"""The benchmark's own node: it instructs vla_node, calls its services at a rate, and times the answers."""

from __future__ import annotations

import threading
import time

from lifecycle_msgs.srv import GetState
from rcl_interfaces.srv import GetParameters

from mobile_vla_inference.harness.node_listener import NodeListener

#: Services of the node that are called in turn, with the fields of the request; none of them stops the robot.
_SERVICES = (
    (GetParameters, "get_parameters", {"names": ["publish_rate_hz"]}),
    (GetState, "get_state", {}),
)


class BenchGraph(NodeListener):
    """A NodeListener that calls services.

    Attributes:
        answers_s: how long each answered service call took.
        calls: how many calls were made.
    """

    def __init__(self, node_name: str) -> None:
        """Join the graph that the environment names."""
        self.answers_s: list[float] = []
        self.calls = 0
        self._calling = threading.Event()
        self._caller: threading.Thread | None = None
        super().__init__("bench", node_name)
        self._clients = [
            (self.node.create_client(kind, f"{node_name}/{name}"), kind.Request(**fields))
            for kind, name, fields in _SERVICES
        ]

    def call_services(self, rate_hz: float) -> None:
        """Call services `rate_hz` times a second in all, until `end_calls`."""
        self._calling.set()
        self._caller = threading.Thread(target=self._call, args=(rate_hz,), name="caller", daemon=True)
        self._caller.start()

    def end_calls(self) -> None:
        """Stop calling."""
        self._calling.clear()
        if self._caller is not None:
            self._caller.join()
            self._caller = None

    def close(self) -> None:
        """Leave the graph."""
        self.end_calls()
        super().close()

    def _call(self, rate_hz: float) -> None:
        for client, _ in self._clients:
            while self._calling.is_set() and not client.wait_for_service(timeout_sec=0.1):
                pass
        due_s = time.monotonic()
        while self._calling.is_set():
            client, request = self._clients[self.calls % len(self._clients)]
            called_s = time.monotonic()
            client.call_async(request).add_done_callback(
                lambda _, called_s=called_s: self.answers_s.append(time.monotonic() - called_s)
            )
            self.calls += 1
            due_s = max(due_s + 1.0 / rate_hz, called_s)
            time.sleep(max(0.0, due_s - time.monotonic()))
