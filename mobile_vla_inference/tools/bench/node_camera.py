"""The benchmark's camera: a process that sends one prepared image at a rate, each time with a new stamp.

It is prepared once, so that the camera is not the bottleneck. Each line of its record is a stamp, the steady time at
which that image was published, and how late the camera woke: the delay that the machine itself causes.
"""

from __future__ import annotations

import array
import json
import os
import time

import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image

from mobile_vla_inference.control.exit_request import ExitRequest
from mobile_vla_inference.harness.interrupts import exit_on_signals

#: Encodings that it sends, with bytes per pixel.
ENCODINGS = {"bgr8": 3, "rgb8": 3, "bgra8": 4, "mono8": 1}

_BEST_EFFORT = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


def prepare_image(width_px: int, height_px: int, encoding: str) -> Image:
    """Return a message without a stamp; its pixels are noise that repeats in each row."""
    image = Image(width=width_px, height=height_px, encoding=encoding, step=width_px * ENCODINGS[encoding])
    image.header.frame_id = "camera_optical_frame"
    image.data = array.array("B", os.urandom(image.step) * height_px)
    return image


def main() -> int:
    """Send images until SIGINT or SIGTERM."""
    with exit_on_signals() as request:
        _send(request)
    return 0


def _send(request: ExitRequest) -> None:
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("bench_camera")
    publisher = node.create_publisher(Image, "image_raw", _BEST_EFFORT)

    def parameter(name: str, default: str | int | float) -> str | int | float:
        return node.declare_parameter(name, default).value

    image = prepare_image(parameter("width", 640), parameter("height", 480), parameter("encoding", "bgr8"))
    period_s = 1.0 / parameter("rate_hz", 30.0)
    with open(parameter("record", os.devnull), "w", buffering=1) as record:  # noqa: PTH123
        due_s = time.monotonic()
        while not request.wait(max(0.0, due_s - time.monotonic())):
            # Images that are too late are left out: no burst follows a pause.
            late_s = time.monotonic() - due_s
            due_s += period_s + max(0.0, late_s - period_s)
            stamp = image.header.stamp = node.get_clock().now().to_msg()
            published_s = time.monotonic()
            publisher.publish(image)
            entry = {"stamp_s": stamp.sec + stamp.nanosec * 1e-9, "published_s": published_s, "late_s": late_s}
            print(json.dumps(entry), file=record)
    node.destroy_node()
    rclpy.try_shutdown()


if __name__ == "__main__":
    raise SystemExit(main())
