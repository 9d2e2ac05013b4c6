"""Another node on the drill's graph, which publishes where vla_node does or listens."""

from __future__ import annotations

from typing import Any

import rclpy
from rclpy.context import Context
from rclpy.qos import QoSProfile


class OtherNode:
    """A node in a DDS participant of its own, with one publisher.

    Attributes:
        publisher: the publisher.
    """

    def __init__(self, name: str, namespace: str, message_type: type, topic: str, qos: QoSProfile) -> None:
        """Join the graph that the environment names, and publish on a topic."""
        self._context = Context()
        self._context.init(args=[])
        self._node = rclpy.create_node(name, namespace=namespace, context=self._context)
        self.publisher: Any = self._node.create_publisher(message_type, topic, qos)

    def close(self) -> None:
        """Leave the graph."""
        self._node.destroy_node()
        self._context.try_shutdown()
