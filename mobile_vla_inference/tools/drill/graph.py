"""The drill's own node: a camera that can be spoilt, an operator, and a recorder of what vla_node does.

Every time is on the steady clock, taken when a message is sent or has arrived.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Twist
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.ros.conversions import rgb_to_compressed, rgb_to_image
from mobile_vla_inference.sim.camera import SimulatedCamera
from mobile_vla_inference.sim.robot import Pose
from mobile_vla_inference.tools.drill.judge import Command

CAMERA_RATE_HZ = 20.0

_RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
_BEST_EFFORT = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
_RECORDER = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
_LATCHED = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
_POLL_S = 0.05
_ANSWER_LIMIT_S = 5.0
#: Participants announce themselves every 3 s, diagnostics come every second, and either may get lost.
_DISCOVERY_LIMIT_S = 15.0


@dataclass(frozen=True)
class Report:
    """A reason that the node gave in `~/status`, and whether it says that it needs `~/enable`."""

    time_s: float
    reason: str
    latched: bool


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
        #: What the node has told, as lines of text: its status on every change, its diagnostics as they came last.
        self._told: list[str] = []
        self._diagnosed: dict[str, str] = {}
        # No lock: the thread that waits may be interrupted anywhere, and the recorder must never wait for it.
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
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
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._namespace = namespace
        self._full_name = f"{namespace}/{node_name}"
        self._second_camera: Any = None
        self._other: tuple[Context, Any] | None = None
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
        self.remove_other_node()
        if self.camera is not None:
            self.camera.close()
        self._executor.shutdown()
        self._thread.join()
        self._node.destroy_node()
        rclpy.try_shutdown()
        os.close(self._news)

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
        self.commands.append(Command(time.monotonic(), values))
        self._tell_news()

    def _on_status(self, message: DiagnosticStatus) -> None:
        values = {entry.key: entry.value for entry in message.values}
        self.reports.append(Report(time.monotonic(), values["reason"], values.get("latched") == "True"))
        self._told.append(_status_text(message))
        self._tell_news()

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.startswith(f"{self._full_name.lstrip('/')}: "):
                self._diagnosed[status.name] = _status_text(status)
        self._tell_news()

    def _tell_news(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._news, 1)

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float, poll_s: float = _POLL_S) -> bool:
        """Wait until `predicate` holds, looking at each arrival and each `poll_s`; return whether it did."""
        deadline_s = time.monotonic() + timeout_s
        while not predicate():
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0.0:
                return False
            if select.select([self._news], [], [], min(remaining_s, poll_s))[0]:
                os.eventfd_read(self._news)
        return True

    def has_told(self, text: str) -> bool:
        """Whether the node has said a text in its status since it was started, or says it in its diagnostics now."""
        return any(text in line for line in (*self._told, *self._diagnosed.values()))

    def warns_of(self, text: str) -> bool:
        """Whether the node's diagnostics hold a text at level WARN or above."""
        return any(text in line for line in self._diagnosed.values() if not line.startswith("OK "))

    def forget(self) -> None:
        """Forget what a former node has told: one that was killed while it drove may have said `moving` last."""
        self.reports.clear()
        self._told.clear()
        self._diagnosed.clear()

    @property
    def reason(self) -> str:
        """The reason in force."""
        return self.reports[-1].reason if self.reports else "nothing was heard of the node"

    @property
    def is_latched(self) -> bool:
        """Whether the node says that it needs `~/enable`."""
        return bool(self.reports) and self.reports[-1].latched

    def first_refusal(self, since_s: float) -> str | None:
        """Return the first reason to stand still since `since_s`; one that was in force by then counts."""
        before = self.reason_at(since_s)
        if before not in ("moving", "none"):
            return before
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

    def flood(self, rate_hz: float, send: Callable[[int], object]) -> float:
        """Call `send` with a count `rate_hz` times a second, until `end_flood`."""
        self._flooding.set()
        started_s = time.monotonic()
        arguments = (rate_hz, send, started_s)
        self._flood_thread = threading.Thread(target=self._flood, args=arguments, name="flood", daemon=True)
        self._flood_thread.start()
        return started_s

    def _flood(self, rate_hz: float, send: Callable[[int], object], started_s: float) -> None:
        count = 0
        while self._flooding.is_set():
            send(count)
            count += 1
            time.sleep(max(0.0, started_s + count / rate_hz - time.monotonic()))

    def end_flood(self) -> None:
        """End the flood, if there is one."""
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

    def set_parameter(self, name: str, value: bool | float) -> SetParametersResult:
        """Set a parameter and return the answer; raise MobileVlaError where none comes."""
        answer = self.ask_parameter(name, value)
        if not self.wait_for(answer.done, _ANSWER_LIMIT_S):
            raise MobileVlaError(f"vla_node did not answer in {_ANSWER_LIMIT_S:g} s when parameter {name} was set")
        return answer.result().results[0]

    def ask_parameter(self, name: str, value: bool | float) -> Any:
        """Ask for a parameter; the result tells when that is answered."""
        wanted = Parameter(name, value=value).to_parameter_msg()
        return self._parameters.call_async(SetParameters.Request(parameters=[wanted]))

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

    # ---- somebody else who drives ----------------------------------------------------------------------------------

    def add_publisher(self, node_name: str, message_type: type, topic: str, qos: QoSProfile) -> Any:
        """Let another node publish on a topic, in a participant of its own, until `remove_other_node`."""
        context = Context()
        context.init(args=[])
        node = rclpy.create_node(node_name, namespace=self._namespace, context=context)
        self._other = (context, node)
        return node.create_publisher(message_type, topic, qos)

    def add_stop_button(self) -> Callable[[bool], float]:
        """Let another node offer `stop` with best effort; return what sends on it, once vla_node knows of it."""
        publisher = self.add_publisher("stop_button", Bool, "stop", _BEST_EFFORT)
        known = "stop_publishers 2"
        if not self.wait_for(
            lambda: publisher.get_subscription_count() > 0 and any(known in line for line in self._diagnosed.values()),
            _DISCOVERY_LIMIT_S,
        ):
            raise MobileVlaError(f"vla_node did not find a second publisher of stop within {_DISCOVERY_LIMIT_S:g} s")

        def send(stop: bool) -> float:
            sent_s = time.monotonic()
            publisher.publish(Bool(data=stop))
            return sent_s

        return send

    def add_deaf_stop(self) -> None:
        """Let another node publish texts on the stop topic, which nobody who listens for Bool can hear."""
        self.add_publisher("stop_button", String, "stop", _RELIABLE)

    def add_other_node(self, name: str) -> None:
        """Let another node, which sends nothing, publish on the velocity topic; return once its publisher is seen."""
        self.add_publisher(name, Twist, self._cmd_vel, _RELIABLE)
        if not self.wait_for(lambda: self.count_commanders() > 1, _ANSWER_LIMIT_S, poll_s=0.002):
            raise MobileVlaError(f"a second publisher on {self._cmd_vel} was not seen within {_ANSWER_LIMIT_S:g} s")

    def remove_other_node(self) -> None:
        """Let the other node leave, if there is one."""
        if self._other is not None:
            (context, node), self._other = self._other, None
            node.destroy_node()
            context.try_shutdown()


def _status_text(status: DiagnosticStatus) -> str:
    """Return a status as a line: its level, what it says, and its values."""
    level = "OK" if status.level == DiagnosticStatus.OK else "not OK"
    values = "; ".join(f"{entry.key} {entry.value}" for entry in status.values)
    return f"{level} {status.message}; {values}"
