"""The benchmark's base: a process that only records when each velocity arrives.

Each line of its record is the steady time of an arrival and the velocity's `linear_x_mps`.
"""

from __future__ import annotations

import gc
import json
import os
import time

import rclpy
from geometry_msgs.msg import Twist
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions

from mobile_vla_inference.control.exit_request import ExitRequest
from mobile_vla_inference.harness.interrupts import exit_on_signals

_COMMAND_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)


def main() -> int:
    """Record velocities until SIGINT or SIGTERM."""
    with exit_on_signals() as request:
        _record(request)
    return 0


def _record(request: ExitRequest) -> None:
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("bench_base")
    with open(node.declare_parameter("record", os.devnull).value, "w", buffering=1) as record:  # noqa: PTH123

        def write_down(message: Twist) -> None:
            arrived_s = time.monotonic()
            print(json.dumps({"arrived_s": arrived_s, "linear_x_mps": message.linear.x}), file=record)

        node.create_subscription(Twist, "cmd_vel", write_down, _COMMAND_QOS)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        gc.disable()  # the pauses of the node are measured, not those of this process
        while not request.is_set():
            executor.spin_once(timeout_sec=0.1)
        executor.shutdown()
    node.destroy_node()
    rclpy.try_shutdown()


if __name__ == "__main__":
    raise SystemExit(main())
