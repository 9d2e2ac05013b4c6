"""The drill's own node: a camera, an operator, and a recorder of what vla_node does.

Every time is on the steady clock, taken when a message is sent or has arrived.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import Twist
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from rclpy.task import Future
from sensor_msgs.msg import Image
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.node_listener import RELIABLE, NodeListener
from mobile_vla_inference.tools.drill.camera import BEST_EFFORT, Camera
from mobile_vla_inference.tools.drill.judge import Command
from mobile_vla_inference.tools.drill.other_node import OtherNode

#: The reason before the first status of a node.
NO_STATUS = "no status was received"

_RECEIVE_S = 0.1
_ANSWER_LIMIT_S = 5.0
#: Participants announce themselves every 3 s, diagnostics come every second, and either can get lost.
_DISCOVERY_LIMIT_S = 15.0


@dataclass(frozen=True)
class Report:
    """A reason in `~/status`, and whether it asks for `~/enable`."""

    time_s: float
    reason: str
    latched: bool


class DrillGraph(NodeListener):
    """A NodeListener in the place of the operator, the camera and the base; it receives in a thread of its own.

    Attributes:
        commands: every velocity that arrived.
        reports: every reason of `~/status`.
        camera: the camera; None before `mount_camera`.
    """

    def __init__(self, namespace: str, node_name: str, cmd_vel: str) -> None:
        """Join the graph that the environment names."""
        self.commands: list[Command] = []
        self.reports: list[Report] = []
        self.camera: Camera | None = None
        #: Lines of text: each status of the node, and its newest diagnostics.
        self._lines: list[str] = []
        self._diagnosed: dict[str, str] = {}
        self._namespace = namespace
        self._cmd_vel = cmd_vel
        self._second_camera: Any = None
        self._other: OtherNode | None = None
        self._ended = threading.Event()
        self._flooding = threading.Event()
        self._flood_thread: threading.Thread | None = None
        # No lock: a signal can interrupt the waiting thread anywhere, and the recorder must never wait for it.
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        super().__init__("drill", node_name, namespace=namespace, cmd_vel=cmd_vel)
        self.reason = NO_STATUS
        self._stops = self.node.create_publisher(Bool, "stop", RELIABLE)
        self._reset = self.node.create_client(Trigger, f"{node_name}/reset")
        self._enable = self.node.create_client(SetBool, f"{node_name}/enable")
        self._transitions = self.node.create_client(ChangeState, f"{node_name}/change_state")
        self._parameters = self.node.create_client(SetParameters, f"{node_name}/set_parameters")
        self._thread = threading.Thread(target=self._receive, name="recorder", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave the graph."""
        self.end_flood()
        self.remove_other_node()
        if self.camera is not None:
            self.camera.close()
        self._ended.set()
        self._thread.join()
        super().close()
        os.close(self._news)

    def mount_camera(self, transport: str) -> None:
        """Replace the camera by one of a transport: `raw` or `compressed`."""
        if self.camera is not None:
            self.camera.close()
        self.camera = Camera(self.node, transport)

    # ---- what arrives ----------------------------------------------------------------------------------------------

    def spin_once(self, timeout_s: float) -> None:
        """Wait for a message, which the thread handles, or return after `timeout_s`."""
        if select.select([self._news], [], [], timeout_s)[0]:
            os.eventfd_read(self._news)

    def on_command(self, message: Twist) -> None:
        """Record a velocity."""
        time_s = time.monotonic()
        super().on_command(message)
        linear, angular = message.linear, message.angular
        self.commands.append(Command(time_s, (linear.x, linear.y, linear.z, angular.x, angular.y, angular.z)))
        self._notify()

    def on_status(self, message: DiagnosticStatus) -> None:
        """Record a status."""
        super().on_status(message)
        self.reports.append(Report(time.monotonic(), self.reason, self.is_latched))
        self._lines.append(_status_text(message))
        self._notify()

    def on_diagnostics(self, statuses: Sequence[DiagnosticStatus]) -> None:
        """Keep the newest diagnostics."""
        super().on_diagnostics(statuses)
        self._diagnosed.update({status.name: _status_text(status) for status in statuses})
        self._notify()

    def has_reported(self, text: str) -> bool:
        """Whether the node has reported a text in a status since its start, or in its newest diagnostics."""
        return any(text in line for line in (*self._lines, *self._diagnosed.values()))

    def warns_of(self, text: str) -> bool:
        """Whether the node's newest diagnostics contain a text at level WARN or above."""
        return any(text in line for line in self._diagnosed.values() if not line.startswith("OK "))

    def forget(self) -> None:
        """Forget what a former node reported: after SIGKILL its last status can be `moving`."""
        self.reports.clear()
        self._lines.clear()
        self._diagnosed.clear()
        self.reason, self.is_latched = NO_STATUS, False

    def first_refusal(self, since_s: float) -> str | None:
        """Return the first reason to stand still since `since_s`; the reason in force then counts."""
        before = self.reason_at(since_s)
        if before not in ("moving", "none"):
            return before
        return next((r.reason for r in list(self.reports) if r.time_s >= since_s and r.reason != "moving"), None)

    def reason_at(self, time_s: float) -> str:
        """Return the reason that was in force at a time."""
        return next((r.reason for r in reversed(self.reports) if r.time_s <= time_s), "none")

    def count_commanders(self) -> int:
        """Return how many publishers the velocity topic has."""
        return self.node.count_publishers(self._cmd_vel)

    def is_connected(self) -> bool:
        """Whether the node has subscribed to our topics and offers its services."""
        clients = (self._reset, self._enable, self._transitions, self._parameters)
        return (
            all(client.service_is_ready() for client in clients)
            and self.can_instruct()
            and self._stops.get_subscription_count() > 0
        )

    def _receive(self) -> None:
        while not self._ended.is_set():
            super().spin_once(_RECEIVE_S)

    def _notify(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._news, 1)

    # ---- the operator: each method returns when it asked or sent ---------------------------------------------------

    def instruct_raw(self, data: bytes) -> float:
        """Send bytes as an instruction's text as they are, UTF-8 or not."""
        # CDR, little endian: the representation, the length with the final NUL, the text.
        message = b"\x00\x01\x00\x00" + struct.pack("<I", len(data) + 1) + data + b"\x00"
        return self.send_instruction(message)

    def stop(self, stop: bool) -> float:
        """Send on the stop topic."""
        sent_s = time.monotonic()
        self._stops.publish(Bool(data=stop))
        return sent_s

    def enable(self, enabled: bool) -> float:
        """Call `~/enable`."""
        return _call(self._enable, SetBool.Request(data=enabled))

    def reset(self) -> float:
        """Call `~/reset`."""
        return _call(self._reset, Trigger.Request())

    def change_state(self, transition: int) -> float:
        """Request a lifecycle transition, by its number in lifecycle_msgs/Transition."""
        request = ChangeState.Request()
        request.transition.id = transition
        return _call(self._transitions, request)

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

    def set_parameter(self, name: str, value: bool | float) -> SetParametersResult:
        """Set a parameter and return the answer; raise MobileVlaError if there is none."""
        answer = self.request_parameter(name, value)
        if not self.wait_until(answer.done, _ANSWER_LIMIT_S):
            raise MobileVlaError(
                f"vla_node did not answer within {_ANSWER_LIMIT_S:g} s, expected an answer when parameter {name} is set"
            )
        return answer.result().results[0]

    def request_parameter(self, name: str, value: bool | float) -> Future:
        """Request that a parameter is set; the future ends with the answer."""
        wanted = Parameter(name, value=value).to_parameter_msg()
        return self._parameters.call_async(SetParameters.Request(parameters=[wanted]))

    # ---- other publishers ------------------------------------------------------------------------------------------

    def add_second_camera(self) -> float:
        """Add a second publisher on the image topic; return when it had found the node."""
        self._second_camera = self.node.create_publisher(Image, "image_raw", BEST_EFFORT)
        self.wait_until(lambda: self._second_camera.get_subscription_count() > 0, _ANSWER_LIMIT_S, poll_s=0.001)
        return time.monotonic()

    def remove_second_camera(self) -> None:
        """Remove the second publisher."""
        self.node.destroy_publisher(self._second_camera)

    def add_stop_button(self) -> Callable[[bool], float]:
        """Add a node that publishes `stop` with best effort; return what sends on it, once vla_node knows of it."""
        publisher = self._add_other_node("stop_button", Bool, "stop", BEST_EFFORT)
        known = "stop_publishers 2"
        if not self.wait_until(
            lambda: publisher.get_subscription_count() > 0 and any(known in line for line in self._diagnosed.values()),
            _DISCOVERY_LIMIT_S,
        ):
            raise MobileVlaError(
                f"vla_node did not find a second publisher of stop within {_DISCOVERY_LIMIT_S:g} s, expected it to"
            )

        def send(stop: bool) -> float:
            sent_s = time.monotonic()
            publisher.publish(Bool(data=stop))
            return sent_s

        return send

    def add_stop_of_other_type(self) -> None:
        """Add a node that publishes texts on the stop topic, which no subscription of Bool can receive."""
        self._add_other_node("stop_button", String, "stop", RELIABLE)

    def add_commander(self, name: str) -> None:
        """Add a silent publisher on the velocity topic in a node of that name; return once it is discovered."""
        self._add_other_node(name, Twist, self._cmd_vel, RELIABLE)
        if not self.wait_until(lambda: self.count_commanders() > 1, _ANSWER_LIMIT_S, poll_s=0.002):
            raise MobileVlaError(
                f"a second publisher on {self._cmd_vel} was not found within {_ANSWER_LIMIT_S:g} s, expected it to be"
            )

    def remove_other_node(self) -> None:
        """Remove the other node, if there is one."""
        if self._other is not None:
            other, self._other = self._other, None
            other.close()

    def _add_other_node(self, name: str, message_type: type, topic: str, qos: QoSProfile) -> Any:
        """Add another node and return its publisher."""
        self._other = OtherNode(name, self._namespace, message_type, topic, qos)
        return self._other.publisher


def _call(client: Any, request: Any) -> float:
    called_s = time.monotonic()
    client.call_async(request)
    return called_s


def _status_text(status: DiagnosticStatus) -> str:
    """Return a status as a line: its level, its message and its values."""
    level = "OK" if status.level == DiagnosticStatus.OK else "not OK"
    values = "; ".join(f"{entry.key} {entry.value}" for entry in status.values)
    return f"{level} {status.message}; {values}"
