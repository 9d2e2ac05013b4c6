"""The drill's camera, whose images can be spoilt.

Every time is on the steady clock, taken when an image is sent.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from mobile_vla_inference.ros.conversions import rgb_to_compressed, rgb_to_image
from mobile_vla_inference.sim.camera import SimulatedCamera
from mobile_vla_inference.sim.robot import Pose

CAMERA_RATE_HZ = 20.0
BEST_EFFORT = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


class Camera:
    """A camera at 20 Hz in a thread of its own; `spoil` makes its images bad from one moment on."""

    def __init__(self, node: Node, transport: str) -> None:
        self._node = node
        self._publisher = (
            node.create_publisher(Image, "image_raw", BEST_EFFORT)
            if transport == "raw"
            else node.create_publisher(CompressedImage, "image_raw/compressed", BEST_EFFORT)
        )
        self._compressed = transport == "compressed"
        self._image = SimulatedCamera(160, 120).frame(Pose(0.0, 0.0, 0.0))
        self._lock = threading.Lock()
        self._running = False
        self._change: Callable[[Any], None] | None = None
        self._ended = threading.Event()
        self.last_good_s = -math.inf
        self.last_good_stamp: Any = None
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Send good images."""
        with self._lock:
            self._running, self._change = True, None

    def stop(self) -> None:
        """Send no images."""
        with self._lock:
            self._running = False

    def spoil(self, change: Callable[[Any], None]) -> float:
        """Pass every image through `change` before it is sent, from now on; return when the first one was sent."""
        with self._lock:
            self._running, self._change = True, change
            spoilt_s = time.monotonic()
            self._publish()
        return spoilt_s

    def close(self) -> None:
        """End the thread, and destroy the publisher."""
        self._ended.set()
        self._thread.join()
        self._node.destroy_publisher(self._publisher)

    def _run(self) -> None:
        while not self._ended.wait(1.0 / CAMERA_RATE_HZ):
            with self._lock:
                if self._running:
                    self._publish()

    def _publish(self) -> None:
        """Send an image stamped now; the caller holds the lock."""
        now_s, stamp = time.monotonic(), self._node.get_clock().now().to_msg()
        message = (
            rgb_to_compressed(self._image, CompressedImage, stamp, "camera_optical_frame")
            if self._compressed
            else rgb_to_image(self._image, Image, stamp, "camera_optical_frame")
        )
        if self._change is not None:
            self._change(message)
        else:
            self.last_good_s, self.last_good_stamp = now_s, stamp
        self._publisher.publish(message)
