"""ImageIntake: take the camera's images, check them, and offer the good ones to the policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.mailbox import Frame
from mobile_vla_inference.control.reset_cause import ResetCause
from mobile_vla_inference.control.stamps import StampAge, StampFault, StampJudge, stamp_seconds
from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.frames import reduce_frame
from mobile_vla_inference.ros import conversions
from mobile_vla_inference.ros.clock import missing_clock
from mobile_vla_inference.ros.live_parameters import LiveParameters
from mobile_vla_inference.ros.motion import MotionControl
from mobile_vla_inference.ros.parameters import NodeParameters
from mobile_vla_inference.ros.policy_link import PolicyLink


@dataclass(frozen=True)
class ImageFormat:
    """How one image_transport arrives.

    Attributes:
        topic: its name before remapping.
        type: message class.
        type_name: message type, such as `sensor_msgs/msg/Image`.
        check: raises FrameError if a message can't be a frame; decodes nothing.
        convert: returns uint8 RGB [height, width, 3]; raises FrameError.
    """

    topic: str
    type: type
    type_name: str
    check: Callable[[Any], None]
    convert: Callable[[Any], np.ndarray]


#: By the values of the parameter image_transport.
IMAGE_FORMATS = {
    "raw": ImageFormat("image_raw", Image, "sensor_msgs/msg/Image", conversions.check_image, conversions.image_to_rgb),
    "compressed": ImageFormat(
        "image_raw/compressed",
        CompressedImage,
        "sensor_msgs/msg/CompressedImage",
        conversions.check_compressed,
        conversions.compressed_to_rgb,
    ),
}


class ImageIntake:
    """Subscribe to the image topic. The callback checks and stores; pixels are converted when their step is due.

    Attributes:
        error: why the newest image, or its step, was refused; empty: it was not.
        received: images that have arrived.
        received_s: when the newest one arrived, steady clock; -inf: none has.
        newest: the newest good message; None: there is none.
    """

    def __init__(
        self,
        node: Node,
        group: CallbackGroup,
        qos: QoSProfile,
        parameters: LiveParameters[NodeParameters],
        motion: MotionControl,
        policy: PolicyLink,
    ) -> None:
        self.format = IMAGE_FORMATS[parameters.values.image_transport]
        self.error = ""
        self.received = 0
        self.received_s = -math.inf
        self.newest: Any | None = None
        self._clock = node.get_clock()
        self._parameters = parameters
        self._motion = motion
        self._policy = policy
        self._stamps = StampJudge()
        self._subscription = node.create_subscription(
            self.format.type, self.format.topic, self._on_image, qos, callback_group=group
        )

    @property
    def topic_name(self) -> str:
        """The resolved topic."""
        return self._subscription.topic_name

    def _on_image(self, message: Any) -> None:
        now_s = steady_s()
        self.received_s = now_s
        self.received += 1
        captured_at_s = stamp_seconds(message.header.stamp)
        age_s = self._clock.now().nanoseconds * 1e-9 - captured_at_s
        limits = self._parameters.values
        verdict = self._stamps.judge(
            captured_at_s, StampAge(age_s, limits.image_timeout_s, limits.future_stamp_tolerance_s)
        )
        refusal = self._refusal(message) or (verdict.fault and (verdict.fault, verdict.sentence))
        if refusal:
            self._refuse(*refusal)
            return
        captured_s = now_s - max(0.0, age_s)
        with self._motion.gate() as gate:
            gate.image_accepted(captured_s)
            if verdict.is_backwards:
                gate.forget_action()
        if verdict.is_backwards:  # a bag that loops: the LSTM state, and a step under way, are of later images
            self._policy.reset(ResetCause.TIME_BACKWARDS)
            self._motion.publish_decision()
        self.newest = message
        self._policy.submit(Frame(captured_at_s, now_s, captured_s, partial(_load_frame, self.format.convert, message)))

    def _refusal(self, message: Any) -> tuple[str, str] | None:
        """Return the cause and a sentence if an image can't be used, whatever its stamp is."""
        try:
            self.format.check(message)
        except FrameError as error:
            return "unreadable", str(error)
        sentence = missing_clock(self._clock)
        return ("no_clock", sentence) if sentence else None

    def _refuse(self, cause: str, sentence: str) -> None:
        """Count an image that can't be used, and stand still unless it only repeats the one before."""
        self.error = sentence
        self._policy.count_refused(cause)
        if cause != StampFault.REPEATED:
            self._motion.refuse_images()
            self._motion.publish_decision()


def _load_frame(convert: Callable[[Any], np.ndarray], message: Any, size_px: int, keep_aspect: bool) -> np.ndarray:
    """Convert an image message and reduce it to the policy's size."""
    return reduce_frame(convert(message), size_px, keep_aspect)
