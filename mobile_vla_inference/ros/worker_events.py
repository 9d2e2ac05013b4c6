"""WorkerEvents: act on what the policy worker reports: actions, refusals, faults, another state."""

from __future__ import annotations

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.gate import Reason
from mobile_vla_inference.control.worker_events import (
    FrameRefused,
    InstructionRefused,
    StepFailed,
    StepResult,
    WorkerChanged,
    WorkerEvent,
    WorkerFault,
    WorkerState,
)
from mobile_vla_inference.ros.diagnostics import StepTimes
from mobile_vla_inference.ros.image_intake import ImageIntake
from mobile_vla_inference.ros.motion import MotionControl
from mobile_vla_inference.ros.node_log import NodeLog
from mobile_vla_inference.ros.operator_inputs import OperatorInputs
from mobile_vla_inference.ros.policy_link import PolicyLink
from mobile_vla_inference.ros.reports import Reports

_LOG_PERIOD_S = 1.0


class WorkerEvents:
    """Take the worker's events in the executor's thread, decide once for all of them, then report."""

    def __init__(
        self,
        policy: PolicyLink,
        motion: MotionControl,
        images: ImageIntake,
        inputs: OperatorInputs,
        times: StepTimes,
        reports: Reports,
        log: NodeLog,
    ) -> None:
        self._policy = policy
        self._motion = motion
        self._images = images
        self._inputs = inputs
        self._times = times
        self._reports = reports
        self._log = log

    def take(self) -> None:
        """Take what is new; called after the worker's notification."""
        worker = self._policy.worker
        if worker is None:
            return
        with self._motion.gate() as gate:
            ready = worker.state is WorkerState.READY and self._motion.has_policy
            was_ready, gate.worker_ready = gate.worker_ready, ready
        events = worker.take_events()
        for event in events:
            self._take(event)
        if events or (was_ready and not ready):
            self._motion.publish_decision()
        if events:
            self._reports.post_debug_image()
            self._reports.post_steps([event for event in events if isinstance(event, StepResult)])

    def _take(self, event: WorkerEvent) -> None:
        if isinstance(event, StepResult):
            self._take_step(event)
            return
        if isinstance(event, FrameRefused):
            self._motion.refuse_images()
            self._images.error = event.message
        elif isinstance(event, InstructionRefused):
            with self._motion.gate() as gate:
                gate.has_instruction = False
            self._inputs.instruction_error = event.message
        elif isinstance(event, StepFailed):
            with self._motion.gate() as gate:
                gate.latch(Reason.ACTION_NOT_FINITE)
        elif isinstance(event, WorkerFault):
            with self._motion.gate() as gate:
                gate.latch(Reason.WORKER_FAULT)
        elif isinstance(event, WorkerChanged):
            with self._motion.gate() as gate:
                gate.worker_changed = True
                gate.forget_action()
        self._log.say_once(_LOG_PERIOD_S, type(event).__name__, "error", event.message)

    def _take_step(self, step: StepResult) -> None:
        if self._motion.take_step(step):
            self._times.add(step.step_s, steady_s() - step.received_s)
            self._images.error = ""
