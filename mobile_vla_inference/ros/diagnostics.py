"""The node's state as diagnostic_msgs: a DiagnosticStatus each for the gate, the policy, the images and the memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from mobile_vla_inference.action import STANDSTILL
from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.gate import ADVICE, Reason
from mobile_vla_inference.control.mailbox import WorkerCounters
from mobile_vla_inference.control.memory import MemoryProbe
from mobile_vla_inference.control.worker_events import WorkerState
from mobile_vla_inference.ros.graph import GraphFacts
from mobile_vla_inference.ros.image_intake import ImageIntake
from mobile_vla_inference.ros.live_parameters import LiveParameters
from mobile_vla_inference.ros.motion import MotionControl
from mobile_vla_inference.ros.operator_inputs import OperatorInputs
from mobile_vla_inference.ros.parameters import NodeParameters
from mobile_vla_inference.ros.policy_link import PolicyLink
from mobile_vla_inference.ros.step_message import NodeStep
from mobile_vla_inference.units import percentiles

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR

#: How often the diagnostics are published, seconds.
DIAGNOSTICS_PERIOD_S = 1.0
#: The facts of the loaded policy that the diagnostics show (PolicyFacts).
POLICY_FACTS = ("checkpoint", "variant", "parameters", "dtype", "quantization", "device", "engine", "engine_fallback")
#: Reasons to stand still that need nobody's attention.
_EXPECTED_REASONS = (Reason.MOVING, Reason.INACTIVE, Reason.NO_INSTRUCTION)
#: The latency percentiles are those of the newest steps, this many.
_LATENCY_WINDOW = 200


class StepTimes:
    """The times of the newest steps: in the policy, and from an image's arrival to its action."""

    def __init__(self) -> None:
        self._step_s: deque[float] = deque(maxlen=_LATENCY_WINDOW)
        self._reaction_s: deque[float] = deque(maxlen=_LATENCY_WINDOW)

    def add(self, step_s: float, reaction_s: float) -> None:
        """Add a step."""
        self._step_s.append(step_s)
        self._reaction_s.append(reaction_s)

    def percentiles_ms(self) -> dict[str, float]:
        """Return p50 and p95 of both, milliseconds, by the diagnostics' keys; 0 without a step."""
        return {
            f"{name}_ms_{percentile}": value
            for name, samples in (("step", self._step_s), ("reaction", self._reaction_s))
            # A copy: steps are added meanwhile.
            for percentile, value in percentiles([each * 1000.0 for each in list(samples)] or [0.0], (50, 95)).items()
        }


class NodeDiagnostics:
    """Describe the parts of the node; takes no lock, so that any thread may call it."""

    def __init__(
        self,
        node_name: str,
        *,
        parameters: LiveParameters[NodeParameters],
        motion: MotionControl,
        policy: PolicyLink,
        images: ImageIntake,
        inputs: OperatorInputs,
        times: StepTimes,
        graph: Callable[[], GraphFacts],
        dropped: Callable[[], dict[str, int]],
    ) -> None:
        """Describe these parts.

        Args:
            node_name: the node's full name, without the leading slash.
            parameters: those in force.
            motion: the gate and its decisions.
            policy: the worker.
            images: the image topic.
            inputs: the instruction.
            times: of the steps.
            graph: returns who is on the topics.
            dropped: returns how many reports and log lines were dropped, by key.
        """
        self._node_name = node_name
        self._parameters = parameters
        self._motion = motion
        self._policy = policy
        self._images = images
        self._inputs = inputs
        self._times = times
        self._graph = graph
        self._dropped = dropped
        self._memory = MemoryProbe()
        self._images_reported = 0

    def all(self) -> list[DiagnosticStatus]:
        """Return the four statuses; the image rate counts from the call before."""
        counters = self._policy.counters()
        return [self.gate(), self._policy_status(counters), self._image_status(counters), self._memory_status()]

    def step(self, step: NodeStep) -> DiagnosticStatus:
        """Return the message of a step."""
        return self._status("step", OK, step.reason, step.to_values())

    def gate(self) -> DiagnosticStatus:
        """Return why the robot moves or stands."""
        state, graph = self._motion.state, self._graph()
        reason, command = state.decision.reason, state.decision.command or STANDSTILL
        level = OK if reason in _EXPECTED_REASONS and not graph.warnings else WARN
        if state.latched or state.worker_changed:
            level = ERROR
        values = {
            "reason": reason.value,
            "latched": state.latched,
            "enabled": state.enabled,
            "linear_x_mps": command.linear_x_mps,
            "linear_y_mps": command.linear_y_mps,
            "angular_z_radps": command.angular_z_radps,
            "commands_published": state.commands_published,
            "instruction": self._policy.instruction,
            "instruction_error": self._inputs.instruction_error,
            "stop_publishers": graph.stop_publishers,
            "warnings": "; ".join(graph.warnings),
            **self._dropped(),
        }
        return self._status("gate", level, "; ".join((f"{reason.value}: {ADVICE[reason]}", *graph.warnings)), values)

    def _policy_status(self, counters: WorkerCounters) -> DiagnosticStatus:
        worker, facts = self._policy.worker, self._policy.facts
        state = worker.state if worker is not None else WorkerState.STOPPED
        level = {WorkerState.READY: OK, WorkerState.FAILED: ERROR}.get(state, WARN)
        message = (worker.progress or worker.last_error if worker is not None else "") or state.value
        values = {
            "state": state.value,
            "last_error": worker.last_error if worker is not None else "",
            "restarts": counters.restarts,
            "steps": counters.stepped,
            "discarded_results": counters.discarded_results,
            **self._times.percentiles_ms(),
            **{f"state_resets_{cause}": count for cause, count in sorted(counters.state_resets.items())},
            **({} if facts is None else {name: getattr(facts, name) for name in POLICY_FACTS}),
            "warnings": "; ".join(() if facts is None else facts.warnings),
        }
        return self._status("policy", level, message, values)

    def _image_status(self, counters: WorkerCounters) -> DiagnosticStatus:
        images, graph = self._images, self._graph()
        age_s = steady_s() - images.received_s
        rate_hz = (images.received - self._images_reported) / DIAGNOSTICS_PERIOD_S
        self._images_reported = images.received
        is_arriving = age_s < self._parameters.values.image_timeout_s
        problem = graph.image_mismatch or images.error or ("" if is_arriving else ADVICE[Reason.NO_IMAGE])
        values = {
            "topic": images.topic_name,
            "publishers": graph.image_publishers,
            "rate_hz": rate_hz,
            "since_last_image_s": age_s,
            "frames_received": counters.received,
            "frames_dropped": sum(counters.dropped.values()),
            **{f"dropped_{cause}": count for cause, count in sorted(counters.dropped.items())},
            "mismatch": graph.image_mismatch,
        }
        return self._status("image", WARN if problem else OK, problem or "images arrive", values)

    def _memory_status(self) -> DiagnosticStatus:
        worker, limits = self._policy.worker, self._parameters.values
        gpu = worker.memory if worker is not None else {}
        reading = self._memory.read(worker.pid if worker is not None else None, **gpu)
        available_mib = reading.system_available_mib
        level = OK if available_mib >= limits.memory_warn_mib else WARN
        if available_mib < limits.memory_error_mib:
            level = ERROR
        return self._status("memory", level, f"{available_mib:.0f} MiB available", vars(reading))

    def _status(self, subject: str, level: bytes, message: str, values: dict[str, Any]) -> DiagnosticStatus:
        return DiagnosticStatus(
            level=level,
            name=f"{self._node_name}: {subject}",
            message=message,
            hardware_id=self._node_name,
            values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
        )


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
