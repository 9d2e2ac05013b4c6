"""MotionControl: the only path to the base. It asks the gate and publishes what the gate decides."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from geometry_msgs.msg import Twist, TwistStamped
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy

from mobile_vla_inference.action import STANDSTILL, ActionMapping, VelocityCommand
from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.gate import CommandGate, Decision, Reason
from mobile_vla_inference.control.worker_events import StepResult
from mobile_vla_inference.policy_facts import PolicyFacts
from mobile_vla_inference.ros.graph import GraphFacts
from mobile_vla_inference.ros.parameters import NodeParameters

#: The final zero is repeated for this long before the node exits, so that it arrives with any transport.
FINAL_ZERO_S = 0.1
#: The gate is asked at least this often, at any publish rate.
_SAFETY_PERIOD_S = 0.05
#: Standstill is published at least this often while it is held.
_ZERO_PERIOD_S = 0.1
#: How long the final zero waits for the lock, which a thread that hangs may hold.
_LOCK_LIMIT_S = 0.05


@dataclass(frozen=True)
class MotionState:
    """What the gate decided last, and the switches set by people and faults.

    Attributes:
        decision: the command in force, and why.
        latched: a fault keeps the robot stopped until `~/enable`.
        enabled: what `~/enable` set last.
        worker_changed: a restarted worker loaded another policy than at configure.
        commands_published: velocities sent since the start, zeros included.
    """

    decision: Decision
    latched: bool
    enabled: bool
    worker_changed: bool
    commands_published: int


class MotionControl:
    """Guard the gate and the `cmd_vel` publisher with one lock: no command can overtake a later standstill.

    Thread-safe. The lock is held for a decision and its publication only.
    """

    def __init__(
        self, node: Node, parameters: NodeParameters, reason_changed: Callable[[Reason], object] = lambda _: None
    ) -> None:
        """Create the publisher; the gate lets nothing move yet.

        Args:
            node: publishes.
            parameters: those in force.
            reason_changed: called under the lock, so that the last reason that is reported is the one in force; it must
                not block.
        """
        self._parameters = parameters
        self._reason_changed = reason_changed
        self._clock = node.get_clock()
        self._publisher = node.create_publisher(
            TwistStamped if parameters.stamped else Twist,
            "cmd_vel",
            QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE),
        )
        self._lock = threading.Lock()
        self._gate = CommandGate(parameters.gate_limits())
        self._mapping: ActionMapping | None = None
        self._graph = GraphFacts()
        self._images_refused_s = -math.inf
        self._decision = Decision(None, Reason.INACTIVE)
        self._commands_published = 0
        self._beats = 0

    @property
    def topic_name(self) -> str:
        """The resolved topic of the commands."""
        return self._publisher.topic_name

    @property
    def has_policy(self) -> bool:
        """Whether a policy is configured, so that its actions can become velocities."""
        return self._mapping is not None

    @property
    def decision(self) -> Decision:
        """What was decided last."""
        return self._decision

    @property
    def max_velocity(self) -> tuple[float, float, float]:
        """Largest magnitude per axis, in the order of VelocityCommand.values."""
        return self._gate.limits.max_velocity

    @property
    def state(self) -> MotionState:
        """What was decided last, and the gate's switches; takes no lock."""
        gate = self._gate
        return MotionState(
            self._decision, gate.latched is not None, gate.enabled, gate.worker_changed, self._commands_published
        )

    @contextlib.contextmanager
    def gate(self) -> Iterator[CommandGate]:
        """Hold the lock and return the gate; for changes only, `publish_decision` acts on them."""
        with self._lock:
            yield self._gate

    # ---- changes ---------------------------------------------------------------------------------------------------

    def change_parameters(self, parameters: NodeParameters, facts: PolicyFacts | None) -> None:
        """Put other parameters in force; `facts` are those of the loaded policy, None without one.

        Raises:
            ParameterError: the axes and the scale don't fit the policy; nothing is changed.
        """
        with self._lock:
            if facts is not None:
                self._mapping = parameters.action_mapping(facts)
            self._parameters = parameters
            self._gate.limits = parameters.gate_limits()

    def use_policy(self, facts: PolicyFacts) -> None:
        """Convert the actions of a loaded policy from now on.

        Raises:
            ParameterError: the parameters action_axes and action_scale don't fit it.
        """
        with self._lock:  # parameters may be set meanwhile
            self._mapping = self._parameters.action_mapping(facts)

    def forget_policy(self) -> None:
        """Take no action any more."""
        with self._lock:
            self._gate.worker_ready = False
            self._mapping = None

    def refuse_images(self) -> None:
        """Stand still until a step uses an image that arrives from now on."""
        with self._lock:
            self._images_refused_s = steady_s()
            self._gate.image_refused()

    def take_step(self, step: StepResult) -> bool:
        """Take the action of a step; return whether it counts."""
        with self._lock:
            # A good image that arrived before a refused one does not show what the camera sees now.
            if step.received_s <= self._images_refused_s or self._mapping is None:
                return False
            self._gate.action_ready(self._mapping.velocity(step.values), step.captured_s)
            return True

    def graph_changed(self, graph: GraphFacts) -> bool:
        """Take note of who is on the topics, and publish the decision.

        Returns:
            whether a second publisher of images came or left: the LSTM state has to be cleared.
        """
        with self._lock:
            self._graph = graph
            sources_changed = self._gate.image_sources(graph.image_publishers)
            if sources_changed:
                self._images_refused_s = steady_s()  # no step on an earlier image counts any more
            self._gate.stop_unheard = bool(graph.stop_unheard)
            self._decide()
        return sources_changed

    # ---- decisions -------------------------------------------------------------------------------------------------

    def publish_decision(self) -> Decision:
        """Ask the gate and publish what it decides; call this after something has happened."""
        with self._lock:
            return self._decide()

    def beat(self, executor_stalled: bool, clock_missing: bool) -> None:
        """Ask the gate because time has passed; publish at `publish_rate_hz`, standstill at 10 Hz or more."""
        with self._lock:
            self._beats += 1
            # If a stop would not be received, the robot must not drive.
            self._gate.executor_stalled = executor_stalled
            self._gate.clock_missing = clock_missing
            self._decide(repeated=True)

    def _decide(self, repeated: bool = False) -> Decision:
        """Decide and publish; the caller holds the lock.

        Args:
            repeated: only time has passed: unless the reason changes, the command is published when it is due.
        """
        self._gate.cmd_vel_shared = self._parameters.exclusive_cmd_vel and self._graph.cmd_vel_publishers > 1
        decision = self._gate.decide(steady_s())
        changed, self._decision = decision.reason is not self._decision.reason, decision
        if decision.command is not None and (changed or not repeated or self._is_due(decision)):
            self.send(decision.command)
        if changed:
            self._reason_changed(decision.reason)
        return decision

    def _is_due(self, decision: Decision) -> bool:
        """Whether this beat repeats the command; beats are counted, so that steps don't delay a repetition."""
        publish_rate_hz = self._parameters.publish_rate_hz
        period_s = 1.0 / publish_rate_hz
        if decision.reason is not Reason.MOVING:
            period_s = min(period_s, _ZERO_PERIOD_S)
        return self._beats % max(1, math.floor(period_s / beat_period_s(publish_rate_hz) + 1e-6)) == 0

    def send(self, command: VelocityCommand) -> None:
        """Publish one velocity; the caller holds the lock. For this class and those that derive from it."""
        twist = Twist()
        twist.linear.x, twist.linear.y, twist.angular.z = command.values
        if self._parameters.stamped:
            message = TwistStamped(twist=twist)
            message.header.stamp = self._clock.now().to_msg()
            message.header.frame_id = self._parameters.base_frame_id
        else:
            message = twist
        self._publisher.publish(message)
        self._commands_published += 1

    # ---- standstill ------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Forbid motion; publish standstill if motion was allowed."""
        with self._lock:
            was_active = self._gate.active
            self._gate.halt()
            if was_active:
                self.send(STANDSTILL)

    def publish_final_zero(self) -> None:
        """Forbid motion and publish standstill until it has arrived: the first thing that an exiting node does.

        A thread that hangs while it holds the lock does not prevent this.
        """
        deadline_s = time.monotonic() + FINAL_ZERO_S
        while True:
            with self._lock_in_time(), contextlib.suppress(Exception):  # what fails now can work the next time
                self._gate.halt()
                self.send(STANDSTILL)
            if time.monotonic() >= deadline_s:
                break
            time.sleep(FINAL_ZERO_S / 5)
        with contextlib.suppress(Exception):
            self._publisher.wait_for_all_acked(Duration(seconds=FINAL_ZERO_S))

    @contextlib.contextmanager
    def _lock_in_time(self) -> Iterator[None]:
        acquired = self._lock.acquire(timeout=_LOCK_LIMIT_S)
        try:
            yield
        finally:
            if acquired:
                self._lock.release()


def beat_period_s(publish_rate_hz: float) -> float:
    """Return how often the gate is asked: the publish period, divided until it is short enough for safety."""
    period_s = 1.0 / publish_rate_hz
    return period_s / math.ceil(period_s / _SAFETY_PERIOD_S)
