"""The drill's own node: a camera that can be spoilt, an operator, and a recorder of what vla_node does.

Every time is on the steady clock, taken when a message is sent or has arrived.
"""

from __future__ import annotations

import contextlib
import math
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import Twist
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue, SetParametersResult
from rcl_interfaces.srv import SetParameters
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from mobile_vla_inference.border import MobileVlaError
from mobile_vla_inference.ros.conversions import rgb_to_compressed, rgb_to_image
from mobile_vla_inference.sim.camera import SimulatedCamera
from mobile_vla_inference.sim.robot import Pose
from mobile_vla_inference.tools.drill_judge import Command

CAMERA_RATE_HZ = 20.0

_RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
_BEST_EFFORT = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
_RECORDER = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
_LATCHED = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
_POLL_S = 0.05
_ANSWER_LIMIT_S = 5.0


@dataclass(frozen=True)
class Report:
    """A reason that the node gave in `~/status`."""

    time_s: float
    reason: str


class Camera:
    """A camera at 20 Hz, from a thread of its own; `spoil` makes its images bad from one moment on."""

    def __init__(self, node: rclpy.node.Node, transport: str) -> None:
        self._node = node
        self._publisher = (
            node.create_publisher(Image, "image_raw", _BEST_EFFORT)
            if transport == "raw"
            else node.create_publisher(CompressedImage, "image_raw/compressed", _BEST_EFFORT)
        )
        self._compressed = transport == "compressed"
        self._picture = SimulatedCamera(160, 120).frame(Pose(0.0, 0.0, 0.0))
        self._lock = threading.Lock()
        self._running = False
        self._change: Callable[[Any], None] | None = None
        self._leave = threading.Event()
        self.last_good_s = -math.inf
        self.last_good_stamp: Any = None
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Send good images."""
        with self._lock:
            self._running, self._change = True, None

    def stop(self) -> None:
        """Send nothing any more."""
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
        """End the thread and leave the topic."""
        self._leave.set()
        self._thread.join()
        self._node.destroy_publisher(self._publisher)

    def _run(self) -> None:
        while not self._leave.wait(1.0 / CAMERA_RATE_HZ):
            with self._lock:
                if self._running:
                    self._publish()

    def _publish(self) -> None:
        """Send an image stamped now; the caller holds the lock."""
        now_s, stamp = time.monotonic(), self._node.get_clock().now().to_msg()
        message = (
            rgb_to_compressed(self._picture, CompressedImage, stamp, "camera_optical_frame")
            if self._compressed
            else rgb_to_image(self._picture, Image, stamp, "camera_optical_frame")
        )
        if self._change is not None:
            self._change(message)
        else:
            self.last_good_s, self.last_good_stamp = now_s, stamp
        self._publisher.publish(message)


class DrillGraph:
    """Stand where the operator and the base stand: tell vla_node what to do, record what it commands and why.

    Attributes:
        commands: every velocity that arrived.
        reports: every reason that `~/status` gave.
    """

    def __init__(self, namespace: str, node_name: str, cmd_vel: str) -> None:
        """Join the graph that the environment names.

        Raises:
            MobileVlaError: somebody sends commands on `cmd_vel` already.
        """
        self.commands: list[Command] = []
        self.reports: list[Report] = []
        self._news = threading.Condition()
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self._node = node = rclpy.create_node("drill", namespace=namespace)
        self._instructions = node.create_publisher(String, "instruction", _RELIABLE)
        self._stops = node.create_publisher(Bool, "stop", _RELIABLE)
        node.create_subscription(Twist, cmd_vel, self._on_command, _RECORDER)
        node.create_subscription(DiagnosticStatus, f"{node_name}/status", self._on_status, _LATCHED)
        self._reset = node.create_client(Trigger, f"{node_name}/reset")
        self._enable = node.create_client(SetBool, f"{node_name}/enable")
        self._transitions = node.create_client(ChangeState, f"{node_name}/change_state")
        self._parameters = node.create_client(SetParameters, f"{node_name}/set_parameters")
        self._second_camera: Any = None
        self._flooding = threading.Event()
        self._flood_thread: threading.Thread | None = None
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        self._thread = threading.Thread(target=self._spin, name="recorder", daemon=True)
        self._thread.start()
        self._cmd_vel = cmd_vel
        self.camera: Camera | None = None

    def close(self) -> None:
        """Leave the graph."""
        self.end_flood()
        if self.camera is not None:
            self.camera.close()
        self._executor.shutdown()
        self._thread.join()
        self._node.destroy_node()
        rclpy.try_shutdown()

    def mount_camera(self, transport: str) -> None:
        """Replace the camera by one of a transport: `raw` or `compressed`."""
        if self.camera is not None:
            self.camera.close()
        self.camera = Camera(self._node, transport)

    # ---- what arrives ----------------------------------------------------------------------------------------------

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self._executor.spin()

    def _on_command(self, message: Twist) -> None:
        linear, angular = message.linear, message.angular
        values = (linear.x, linear.y, linear.z, angular.x, angular.y, angular.z)
        with self._news:
            self.commands.append(Command(time.monotonic(), values))
            self._news.notify_all()

    def _on_status(self, message: DiagnosticStatus) -> None:
        reason = next(entry.value for entry in message.values if entry.key == "reason")
        with self._news:
            self.reports.append(Report(time.monotonic(), reason))
            self._news.notify_all()

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `predicate` holds, looking at each arrival and 20 times a second; return whether it did."""
        deadline_s = time.monotonic() + timeout_s
        with self._news:
            while not predicate():
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0.0:
                    return False
                self._news.wait(min(remaining_s, _POLL_S))
        return True

    @property
    def reason(self) -> str:
        """The reason in force."""
        return self.reports[-1].reason if self.reports else "nothing was heard of the node"

    def first_refusal(self, since_s: float) -> str | None:
        """Return the first reason to stand still that was given after `since_s`."""
        return next((r.reason for r in list(self.reports) if r.time_s >= since_s and r.reason != "moving"), None)

    def reason_at(self, time_s: float) -> str:
        """Return the reason that was in force at a time."""
        return next((r.reason for r in reversed(self.reports) if r.time_s <= time_s), "none")

    def count_commanders(self) -> int:
        """Return how many publishers the velocity topic has."""
        return self._node.count_publishers(self._cmd_vel)

    def wait_until_heard(self, timeout_s: float) -> bool:
        """Wait until the node listens to us and serves us; return whether it does."""
        clients = (self._reset, self._enable, self._transitions, self._parameters)
        publishers = (self._instructions, self._stops)
        return self.wait_for(
            lambda: (
                all(client.service_is_ready() for client in clients)
                and all(publisher.get_subscription_count() > 0 for publisher in publishers)
            ),
            timeout_s,
        )

    # ---- what the operator does: each returns when it was asked for ------------------------------------------------

    def instruct(self, text: str) -> float:
        """Send an instruction."""
        sent_s = time.monotonic()
        self._instructions.publish(String(data=text))
        return sent_s

    def instruct_raw(self, data: bytes) -> float:
        """Send bytes as an instruction's text as they are, UTF-8 or not."""
        # CDR, little endian: the representation, the length with the final NUL, the text.
        message = b"\x00\x01\x00\x00" + struct.pack("<I", len(data) + 1) + data + b"\x00"
        sent_s = time.monotonic()
        self._instructions.publish(message)
        return sent_s

    def flood(self, rate_hz: float) -> float:
        """Send another instruction `rate_hz` times a second, until `end_flood`."""
        self._flooding.set()
        started_s = time.monotonic()
        self._flood_thread = threading.Thread(target=self._flood, args=(rate_hz, started_s), name="flood", daemon=True)
        self._flood_thread.start()
        return started_s

    def _flood(self, rate_hz: float, started_s: float) -> None:
        count = 0
        while self._flooding.is_set():
            self.instruct(f"go to place {count}")
            count += 1
            time.sleep(max(0.0, started_s + count / rate_hz - time.monotonic()))

    def end_flood(self) -> None:
        """End the flood of instructions, if there is one."""
        self._flooding.clear()
        if self._flood_thread is not None:
            self._flood_thread.join()
            self._flood_thread = None

    def stop(self, stop: bool) -> float:
        """Send on the stop topic."""
        sent_s = time.monotonic()
        self._stops.publish(Bool(data=stop))
        return sent_s

    def enable(self, enabled: bool) -> float:
        """Ask for `~/enable`."""
        return self._ask(self._enable, SetBool.Request(data=enabled))

    def reset(self) -> float:
        """Ask for `~/reset`."""
        return self._ask(self._reset, Trigger.Request())

    def change_state(self, transition: int) -> float:
        """Ask for a lifecycle transition, by its number in lifecycle_msgs/Transition."""
        request = ChangeState.Request()
        request.transition.id = transition
        return self._ask(self._transitions, request)

    def _ask(self, client: Any, request: Any) -> float:
        asked_s = time.monotonic()
        client.call_async(request)
        return asked_s

    def set_double(self, name: str, value: float) -> SetParametersResult:
        """Set a parameter and return the answer; raise MobileVlaError where none comes."""
        wanted = ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value)
        request = SetParameters.Request(parameters=[Parameter(name=name, value=wanted)])
        answer = self._parameters.call_async(request)
        if not self.wait_for(answer.done, _ANSWER_LIMIT_S):
            raise MobileVlaError(f"vla_node did not answer in {_ANSWER_LIMIT_S:g} s when parameter {name} was set")
        return answer.result().results[0]

    def add_second_camera(self) -> float:
        """Let a second publisher appear on the image topic; return when it had found the node."""
        self._second_camera = self._node.create_publisher(Image, "image_raw", _BEST_EFFORT)
        deadline_s = time.monotonic() + _ANSWER_LIMIT_S
        while self._second_camera.get_subscription_count() == 0 and time.monotonic() < deadline_s:
            time.sleep(0.001)
        return time.monotonic()

    def remove_second_camera(self) -> None:
        """Let the second publisher leave."""
        self._node.destroy_publisher(self._second_camera)
