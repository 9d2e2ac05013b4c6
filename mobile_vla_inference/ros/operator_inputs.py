"""OperatorInputs: what a person or a planner sends: the instruction, the stop, `~/reset` and `~/enable`."""

from __future__ import annotations

import math

from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.gate import ADVICE, Reason
from mobile_vla_inference.control.reset_cause import ResetCause
from mobile_vla_inference.errors import InstructionError
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.ros.inputs import EveryPublisher
from mobile_vla_inference.ros.motion import MotionControl
from mobile_vla_inference.ros.node_log import NodeLog
from mobile_vla_inference.ros.policy_link import PolicyLink
from mobile_vla_inference.ros.thread_watch import ThreadWatch

_LOG_PERIOD_S = 0.2


class OperatorInputs:
    """Subscribe to `instruction` and `stop`, and serve `~/reset` and `~/enable`; the executor's thread runs all of it.

    Attributes:
        instruction_error: why the last instruction was refused; empty: it was not.
        topics: the stop topic, then the instruction.
    """

    def __init__(
        self,
        node: Node,
        group: CallbackGroup,
        motion: MotionControl,
        policy: PolicyLink,
        threads: ThreadWatch,
        log: NodeLog,
    ) -> None:
        self.instruction_error = ""
        self._motion = motion
        self._policy = policy
        self._threads = threads
        self._log = log
        self._stopped_s = -math.inf
        self._instructions = EveryPublisher(node, String, "instruction", self._on_instruction, group)
        self._stops = EveryPublisher(node, Bool, "stop", self._on_stop, group, self._on_replayed_stop)
        self.topics = (self._stops, self._instructions)
        node.create_service(Trigger, "~/reset", self._on_reset, callback_group=group)
        node.create_service(SetBool, "~/enable", self._on_enable, callback_group=group)

    def _on_instruction(self, message: String) -> None:
        try:
            text, self.instruction_error = check_instruction(message.data), ""
        except InstructionError as error:
            text, self.instruction_error = "", str(error)
            self._log.say_once(_LOG_PERIOD_S, "refusal", "warning", f"instruction refused: {error}")
        if text == self._policy.instruction:
            return
        with self._motion.gate() as gate:
            gate.instruction_changed(bool(text), steady_s())
        self._policy.set_instruction(text)
        if self._motion.decision.reason is Reason.MOVING:
            self._motion.publish_decision()
        self._log.say_once(_LOG_PERIOD_S, "instruction", "info", f"instruction: {text!r}")

    def _on_stop(self, message: Bool) -> None:
        self._threads.note_executor()
        if message.data:
            self._stopped_s = steady_s()
        with self._motion.gate() as gate:
            gate.request_stop(message.data)
        self._motion.publish_decision()

    def _on_replayed_stop(self, message: Bool) -> bool:
        """Obey a stop that was published before the node started; ignore a release from then, which can be outdated."""
        if message.data:
            self._on_stop(message)
        return message.data

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._motion.gate() as gate:
            gate.forget_action()
        response.success = self._policy.reset(ResetCause.REQUEST)
        self._motion.publish_decision()
        response.message = "LSTM state cleared" if response.success else "no policy is loaded; configure the node first"
        return response

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._threads.note_executor()
        # Stop messages that arrived before this request was handled count first: a release before it, a stop after it.
        is_stopped = request.data and (
            any(message.data for message in self._stops.take_pending())
            # The order of what waited while the executor ran no callback is unknown.
            or self._threads.is_catching_up_since(self._stopped_s)
        )
        if not is_stopped:
            with self._motion.gate() as gate:
                gate.enable(request.data)
            self._policy.reset(ResetCause.ENABLE)
        decision = self._motion.publish_decision()
        response.success = not is_stopped
        response.message = (
            "refused: a stop arrived while this request waited; call again when it is safe"
            if is_stopped
            else f"{decision.reason.value}: {ADVICE[decision.reason]}"
        )
        return response
