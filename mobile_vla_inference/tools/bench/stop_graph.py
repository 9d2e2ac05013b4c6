"""The stop benchmark's own node: an operator who stops the robot and enables it again."""

from __future__ import annotations

import time

from geometry_msgs.msg import Twist
from std_msgs.msg import Bool
from std_srvs.srv import SetBool

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.node_listener import RELIABLE
from mobile_vla_inference.tools.bench.node_graph import BenchGraph

_ANSWER_LIMIT_S = 10.0


class StopGraph(BenchGraph):
    """A BenchGraph that stops the robot and enables it."""

    def __init__(self, node_name: str) -> None:
        """Join the graph that the environment names."""
        self._is_zero: bool | None = None
        super().__init__(node_name)
        self._stops = self.node.create_publisher(Bool, "stop", RELIABLE)
        self._enable = self.node.create_client(SetBool, f"{node_name}/enable")

    def stop(self) -> float:
        """Send true on the stop topic; return when."""
        self._is_zero = None
        sent_s = time.monotonic()
        self._stops.publish(Bool(data=True))
        return sent_s

    def is_zero(self) -> bool:
        """Whether the newest velocity is zero, of those since the last `stop`."""
        return self._is_zero is True

    def release(self) -> None:
        """Send false on the stop topic and enable the robot; raise MobileVlaError if it can't be enabled in time.

        `~/enable` is called again if it arrived before the release.
        """
        self._is_zero = None
        self._stops.publish(Bool(data=False))
        deadline_s = time.monotonic() + _ANSWER_LIMIT_S
        while time.monotonic() < deadline_s:
            answer = self._enable.call_async(SetBool.Request(data=True))
            if not self.wait_until(answer.done, deadline_s - time.monotonic()):
                break
            if not answer.result().message.startswith("stop_requested"):
                return
        raise MobileVlaError(
            f"the robot could not be enabled within {_ANSWER_LIMIT_S:g} s, expected ~/enable to succeed; vla_node "
            f"reports: {self.advice}"
        )

    def is_driving(self) -> bool:
        """Whether the newest velocity is other than zero, of those since the last `release`."""
        return self._is_zero is False

    def on_command(self, message: Twist) -> None:
        """Keep a velocity, and whether it is zero."""
        super().on_command(message)
        self._is_zero = message.linear.x == 0.0 and message.linear.y == 0.0 and message.angular.z == 0.0
