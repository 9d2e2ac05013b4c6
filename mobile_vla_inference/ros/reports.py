"""Reports: publish what the node does, through the reporter: status, steps, diagnostics and the debug image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from mobile_vla_inference.action import STANDSTILL
from mobile_vla_inference.control.gate import ADVICE, Decision, Reason
from mobile_vla_inference.control.overlay import draw_command
from mobile_vla_inference.control.reporter import Reporter
from mobile_vla_inference.control.worker_events import StepResult
from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.ros import conversions
from mobile_vla_inference.ros.diagnostics import NodeDiagnostics
from mobile_vla_inference.ros.image_intake import ImageIntake
from mobile_vla_inference.ros.motion import MotionControl
from mobile_vla_inference.ros.node_log import NodeLog
from mobile_vla_inference.ros.policy_link import PolicyLink
from mobile_vla_inference.ros.step_message import NodeStep

_LATCHED_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
#: Deep enough that a subscriber which is busy for a while misses no step.
_STEP_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)


class Reports:
    """Create the topics of the reports. `post_*` never block and may be called by any thread."""

    def __init__(
        self,
        node: Node,
        image_qos: QoSProfile,
        reporter: Reporter,
        diagnostics: NodeDiagnostics,
        motion: MotionControl,
        policy: PolicyLink,
        images: ImageIntake,
        log: NodeLog,
    ) -> None:
        self._clock = node.get_clock()
        self._reporter = reporter
        self._diagnostics = diagnostics
        self._motion = motion
        self._policy = policy
        self._images = images
        self._log = log
        self._debug_image_waits = False
        self._diagnostics_publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._status_publisher = node.create_publisher(DiagnosticStatus, "~/status", _LATCHED_QOS)
        self._step_publisher = node.create_publisher(DiagnosticStatus, "~/step", _STEP_QOS)
        self._debug_publisher = node.create_publisher(Image, "~/debug_image", image_qos)

    def post_reason(self, reason: Reason) -> None:
        """Report that the robot now moves, or stands, for another reason."""
        self._reporter.post(partial(self._report_reason, reason, self._diagnostics.gate()))

    def _report_reason(self, reason: Reason, status: DiagnosticStatus) -> None:
        self._status_publisher.publish(status)
        self._log.write("info" if reason is Reason.MOVING else "warning", f"{reason.value}: {ADVICE[reason]}")

    def post_diagnostics(self) -> None:
        """Publish all statuses on /diagnostics."""
        self._reporter.post(self._publish_diagnostics)

    def _publish_diagnostics(self) -> None:
        array = DiagnosticArray(status=self._diagnostics.all())
        array.header.stamp = self._clock.now().to_msg()
        self._diagnostics_publisher.publish(array)

    def post_steps(self, steps: Sequence[StepResult]) -> None:
        """Publish every step with the decision in force: `mobile_vla replay` repeats them."""
        decision = self._motion.decision
        for step in steps:
            message = NodeStep(
                stamp_s=step.stamp_s,
                first_of_state=step.first_of_state,
                instruction=self._policy.instruction,
                action=step.values,
                step_s=step.step_s,
                gated=decision.command.values if decision.command is not None else None,
                reason=decision.reason.value,
            )
            self._reporter.post(partial(self._step_publisher.publish, self._diagnostics.step(message)))

    def post_debug_image(self) -> None:
        """Draw the decision on the newest image, and publish it; only if somebody subscribes, one at a time."""
        newest = self._images.newest
        if newest is None or self._debug_image_waits:
            return
        if self._debug_publisher.get_subscription_count() > 0:
            self._debug_image_waits = True
            report = partial(self._publish_debug_image, self._images.format.convert, newest, self._motion.decision)
            self._reporter.post(report)

    def _publish_debug_image(self, convert: Callable[[Any], np.ndarray], message: Any, decision: Decision) -> None:
        self._debug_image_waits = False
        try:
            frame = convert(message)
        except FrameError:
            return  # the image diagnostics contain the reason
        command = decision.command or STANDSTILL
        lines = (
            f"{decision.reason.value}  x {command.linear_x_mps:+.2f} m/s  y {command.linear_y_mps:+.2f} m/s  "
            f"turn {command.angular_z_radps:+.2f} rad/s",
            self._policy.instruction or "(no instruction)",
        )
        picture = draw_command(frame, command, self._motion.max_velocity, lines)
        header = message.header
        self._debug_publisher.publish(conversions.rgb_to_image(picture, Image, header.stamp, header.frame_id))
