"""The stop benchmark's own node: an operator who stops the robot, and lets it go again."""

from __future__ import annotations

import time
from typing import Any

from geometry_msgs.msg import Twist
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import Bool
from std_srvs.srv import SetBool

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.tools.bench.node_graph import BenchGraph

_STOP_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
_ANSWER_LIMIT_S = 10.0


class StopGraph(BenchGraph):
    """A BenchGraph that stops the robot and enables it."""

    def __init__(self, node_name: str, instruction: str) -> None:
        """Join the graph that the environment names."""
        super().__init__(node_name, instruction)
        self._stops = self._node.create_publisher(Bool, "stop", _STOP_QOS)
        self._enable = self._node.create_client(SetBool, f"{node_name}/enable")
        self._is_zero: bool | None = None

    def stop(self) -> float:
        """Send true on the stop topic; return when."""
        self._is_zero = None
        sent_s = time.monotonic()
        self._stops.publish(Bool(data=True))
        return sent_s

    def await_zero(self, limit_s: float) -> bool:
        """Wait for a zero since the last `stop`; return whether one came."""
        return self._spin_until(lambda: self._is_zero is True, limit_s)

    def release(self) -> None:
        """Send false on the stop topic and enable the robot, again where that came first; raise MobileVlaError."""
        self._is_zero = None
        self._stops.publish(Bool(data=False))
        deadline_s = time.monotonic() + _ANSWER_LIMIT_S
        while time.monotonic() < deadline_s:
            answer = self._enable.call_async(SetBool.Request(data=True))
            if not self._spin_until(answer.done, deadline_s - time.monotonic()):
                break
            if not answer.result().message.startswith("stop_requested"):
                return
        raise MobileVlaError(f"the robot could not be enabled within {_ANSWER_LIMIT_S:g} s; it says: {self.advice}")

    def await_motion(self, limit_s: float) -> bool:
        """Wait for a velocity other than zero since the last `release`; return whether one came."""
        return self._spin_until(lambda: self._is_zero is False, limit_s)

    def _spin_until(self, condition: Any, limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        while not condition():
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0.0:
                return False
            self._executor.spin_once(timeout_sec=remaining_s)
        return True

    def _on_command(self, message: Twist) -> None:
        super()._on_command(message)
        self._is_zero = message.linear.x == 0.0 and message.linear.y == 0.0 and message.angular.z == 0.0
