"""A real ROS 2 graph for tests: nodes under test as processes, and a probe node that waits for events."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Twist
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter, ParameterValue, SetParametersResult
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.parameter import Parameter as RosParameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import String
from std_srvs.srv import SetBool

from mobile_vla_inference.ros.conversions import rgb_to_image

RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
BEST_EFFORT = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


class NodeProcess:
    """A node of the package in a process of its own, with its output kept."""

    def __init__(self, module: str, *arguments: str, log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "--ros-args", *arguments], stdout=output, stderr=subprocess.STDOUT
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def interrupt(self, number: int = signal.SIGINT) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=20)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Probe:
    """A node of the test: publishes images and instructions, records commands and diagnostics with arrival times."""

    def __init__(self, namespace: str = "") -> None:
        self.commands: list[tuple[float, Twist]] = []
        self.diagnostics: dict[str, dict[str, str]] = {}
        self._news = threading.Condition()
        self._context = Context()
        self._context.init()
        self.node = rclpy.create_node("probe", namespace=namespace, context=self._context)
        self._node_name = f"{namespace}/vla_node".lstrip("/")
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self.images = self.node.create_publisher(Image, "image_raw", BEST_EFFORT)
        self.instructions = self.node.create_publisher(String, "instruction", RELIABLE)
        self.node.create_subscription(Twist, "cmd_vel", self._on_command, QoSProfile(depth=100))
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._timer = None
        self._image = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self._executor.spin()

    def _on_command(self, message: Twist) -> None:
        with self._news:
            self.commands.append((time.monotonic(), message))
            self._news.notify_all()

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        with self._news:
            for status in message.status:
                name, _, subject = status.name.partition(": ")
                if name != self._node_name:
                    continue
                self.diagnostics[subject] = {entry.key: entry.value for entry in status.values}
                self.diagnostics[subject]["message"] = status.message
            self._news.notify_all()

    def wait_for(self, what: str, predicate: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait for an event on the graph; fail with what is known after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        with self._news:
            while not predicate():
                remaining_s = deadline_s - time.monotonic()
                assert remaining_s > 0, f"not seen in {timeout_s} s: {what}; diagnostics: {self.diagnostics}"
                self._news.wait(min(remaining_s, 0.1))

    def start_images(self, rate_hz: float = 20.0, stamp_offset_s: float = 0.0) -> None:
        """Publish one image at `rate_hz`, stamped now plus the offset."""
        self.stop_images()

        def publish() -> None:
            stamp = self.node.get_clock().now() + rclpy.duration.Duration(seconds=stamp_offset_s)
            self.images.publish(rgb_to_image(self._image, Image, stamp.to_msg(), "camera_optical_frame"))

        self._timer = self.node.create_timer(1.0 / rate_hz, publish)

    def stop_images(self) -> None:
        if self._timer is not None:
            self._timer.destroy()
            self._timer = None

    def instruct(self, text: str) -> None:
        self.wait_for("a subscriber of the instruction", lambda: self.instructions.get_subscription_count() > 0)
        self.instructions.publish(String(data=text))

    def drive(self, text: str = "go around the box on the left to the cup") -> None:
        """Send the node images and an instruction, and wait until it moves the robot."""
        self.wait_until_loaded()
        self.start_images()
        self.instruct(text)
        self.wait_for("motion", self.is_moving)

    def call(self, service_type: type, name: str, request: Any) -> Any:
        """Call a service and return its answer."""
        client = self.node.create_client(service_type, name)
        assert client.wait_for_service(timeout_sec=20.0), name
        future = client.call_async(request)
        self.wait_for(f"the answer of {name}", future.done)
        return future.result()

    def set_parameter(self, name: str, value: Any) -> SetParametersResult:
        """Set a parameter of vla_node and return the answer; a ParameterValue is sent as it is."""
        typed = value if isinstance(value, ParameterValue) else RosParameter(name, value=value).to_parameter_msg().value
        request = SetParameters.Request(parameters=[Parameter(name=name, value=typed)])
        return self.call(SetParameters, "vla_node/set_parameters", request).results[0]

    def enable(self, enabled: bool = True) -> SetBool.Response:
        """Call vla_node's ~/enable and return the answer."""
        return self.call(SetBool, "vla_node/enable", SetBool.Request(data=enabled))

    def change_state(self, transition: int) -> bool:
        """Request a lifecycle transition (lifecycle_msgs/Transition) of vla_node; return whether it succeeded."""
        request = ChangeState.Request(transition=Transition(id=transition))
        return self.call(ChangeState, "vla_node/change_state", request).success

    def lifecycle_state(self) -> str:
        """Return the label of vla_node's lifecycle state."""
        return self.call(GetState, "vla_node/get_state", GetState.Request()).current_state.label

    def wait_until_loaded(self) -> None:
        """Wait until vla_node has loaded its policy."""
        self.wait_for("the policy to be loaded", lambda: self.value("policy", "state") == "ready", timeout_s=60.0)

    def wait_for_standstill(self, reason: str) -> None:
        self.wait_for("standstill", lambda: bool(self.commands) and is_zero(self.commands[-1][1]))
        self.wait_for(f"the reason {reason}", lambda: self.value("gate", "reason") == reason)

    def value(self, subject: str, key: str) -> str | None:
        return self.diagnostics.get(subject, {}).get(key)

    def is_moving(self) -> bool:
        return bool(self.commands) and not is_zero(self.commands[-1][1])

    def commands_since(self, moment_s: float) -> list[Twist]:
        return [command for arrived_s, command in self.commands if arrived_s >= moment_s]

    def close(self) -> None:
        self.stop_images()
        self._executor.shutdown()
        self.node.destroy_node()
        self._context.try_shutdown()
        self._thread.join()


def is_zero(twist: Twist) -> bool:
    """Whether every component of a Twist is zero."""
    return not any((twist.linear.x, twist.linear.y, twist.linear.z, twist.angular.x, twist.angular.y, twist.angular.z))


def environment_with(**changes: str) -> dict[str, str]:
    """Return this process's environment with changes."""
    return {**os.environ, **changes}
