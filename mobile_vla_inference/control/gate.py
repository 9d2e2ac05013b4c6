"""CommandGate: decides every velocity that reaches the base.

Pure logic on plain numbers. From the facts that it is given (image, step, worker, operator) and the steady time it
decides between a limited velocity, standstill and silence, always with a reason. No ROS, no threads, no clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from mobile_vla_inference.action import STANDSTILL, VelocityCommand


class Reason(Enum):
    """Why the gate decided as it did; `~/status` and the diagnostics show the value.

    In the order in which the gate checks them. Every latched fault is checked in the place of WORKER_FAULT.
    """

    MOVING = "moving"
    INACTIVE = "inactive"
    STOP_REQUESTED = "stop_requested"
    STOP_UNHEARD = "stop_unheard"
    NODE_STALLED = "node_stalled"
    DISABLED = "disabled"
    WORKER_CHANGED = "worker_changed"
    WORKER_FAULT = "worker_fault"
    ACTION_NOT_FINITE = "action_not_finite"
    WORKER_NOT_READY = "worker_not_ready"
    SETTINGS_ASSUMED = "settings_assumed"
    CMD_VEL_SHARED = "cmd_vel_shared"
    NO_INSTRUCTION = "no_instruction"
    NO_CLOCK = "no_clock"
    IMAGE_AMBIGUOUS = "image_ambiguous"
    IMAGE_REFUSED = "image_refused"
    NO_IMAGE = "no_image"
    IMAGE_STALE = "image_stale"
    NO_STEP = "no_step"
    STEP_STALE = "step_stale"


#: What a person should do about each reason.
ADVICE = {
    Reason.MOVING: "driving",
    Reason.INACTIVE: "activate the node",
    Reason.STOP_REQUESTED: "release the stop topic, then call ~/enable with true",
    Reason.STOP_UNHEARD: "a publisher on the stop topic has another message type than std_msgs/msg/Bool, "
    "see the warnings; correct or end it",
    Reason.NODE_STALLED: "the node itself did not run (stopped, suspended or without CPU time); "
    "after a long stall call ~/enable",
    Reason.DISABLED: "call ~/enable with true",
    Reason.WORKER_CHANGED: "the loaded policy is not the configured one, see the policy diagnostics; "
    "configure the node again",
    Reason.WORKER_FAULT: "see the policy diagnostics, then call ~/enable with true",
    Reason.ACTION_NOT_FINITE: "the policy computed NaN or infinity; check the checkpoint and the dtype, "
    "then call ~/enable",
    Reason.WORKER_NOT_READY: "wait until the policy is loaded",
    Reason.SETTINGS_ASSUMED: "confirm policy.json with `mobile_vla inspect CHECKPOINT --confirm`",
    Reason.CMD_VEL_SHARED: "let only this node publish on cmd_vel, or set exclusive_cmd_vel to false",
    Reason.NO_INSTRUCTION: "publish an instruction on the instruction topic",
    Reason.NO_CLOCK: "use_sim_time is true and no node publishes /clock: start the simulator, "
    "`ros2 bag play BAG --clock` or `mobile_vla play BAG`",
    Reason.IMAGE_AMBIGUOUS: "let only one node publish on the image topic",
    Reason.IMAGE_REFUSED: "see the image diagnostics",
    Reason.NO_IMAGE: "check that the camera publishes on the image topic with a matching QoS",
    Reason.IMAGE_STALE: "check the camera; after a long gap call ~/enable with true",
    Reason.NO_STEP: "wait for the first step",
    Reason.STEP_STALE: "see the step times in the diagnostics",
}


#: A changed instruction is followed after no other one has arrived for this long: in a flood of them the robot stands.
INSTRUCTION_SETTLE_S = 0.1

#: Stops by a person that are not urgent: with `soft_stop` the robot slows down instead of stopping at once, as long as
#: there is no other reason except the missing action that follows from them.
_GENTLE = frozenset({Reason.NO_INSTRUCTION, Reason.DISABLED})

#: A robot that slows down stops after this long at the latest, at any acceleration limit.
ROLL_OUT_LIMIT_S = 2.0

#: How often the node repeats a command between steps, by default.
PUBLISH_RATE_HZ = 20.0

#: Decisions further apart than this mean that the node itself stood still; other parts are not blamed for that time.
STALL_S = 0.5


@dataclass(frozen=True)
class GateLimits:
    """What the gate enforces. Speeds and accelerations are magnitudes per axis; times are in seconds.

    Attributes:
        image_timeout_s: an image older than this, by its stamp or its arrival, stops the robot.
        step_timeout_s: an action stops the robot if the image that it was computed from is older than this.
        resume_within_s: after a gap in the images, or a standstill of the node itself, that is longer than this, the
            robot stays stopped until it is enabled again.
        stop_hold_s: how long standstill is published before the gate is silent.
        soft_stop: slow down within the acceleration limits if a person, not a fault, stops the robot.
    """

    max_linear_x_mps: float = 0.5
    max_linear_y_mps: float = 0.5
    max_angular_z_radps: float = 1.0
    max_linear_acceleration_mps2: float = 1.0
    max_angular_acceleration_radps2: float = 3.0
    image_timeout_s: float = 0.5
    step_timeout_s: float = 2.0
    resume_within_s: float = 2.0
    stop_hold_s: float = 1.0
    soft_stop: bool = False

    @property
    def max_velocity(self) -> tuple[float, float, float]:
        """Largest magnitude per axis, in the order of VelocityCommand.values."""
        return (self.max_linear_x_mps, self.max_linear_y_mps, self.max_angular_z_radps)

    @property
    def max_acceleration(self) -> tuple[float, float, float]:
        """Largest change per second and axis, in the order of VelocityCommand.values."""
        linear = self.max_linear_acceleration_mps2
        return (linear, linear, self.max_angular_acceleration_radps2)


@dataclass(frozen=True)
class Decision:
    """What to publish now, and why.

    Attributes:
        command: the velocity to publish; None: publish nothing, so that a mux or the timeout of the base takes over.
        reason: why.
    """

    command: VelocityCommand | None
    reason: Reason


class CommandGate:
    """Decide what reaches the base. Every method takes the steady time; none reads a clock.

    Attributes:
        limits: the limits in force; can be replaced at any time.
        active: the node's lifecycle allows motion.
        enabled: the operator allows motion (`enable`).
        settings_confirmed: no setting of the policy is only assumed.
        worker_ready: the policy is loaded.
        worker_changed: a restarted worker loaded another policy than the configured one; only configuring ends this.
        has_instruction: there is an instruction to follow.
        stop_unheard: the stop topic has a publisher that this node can't receive.
        executor_stalled: a stop would not be received now, because the executor runs no callback.
        clock_missing: the age of images is unknown, because the ROS clock has not started.
        cmd_vel_shared: another node publishes on `cmd_vel` although it must not.
    """

    def __init__(self, limits: GateLimits) -> None:
        self.limits = limits
        self.active = False
        self.enabled = True
        self.settings_confirmed = False
        self.worker_ready = False
        self.worker_changed = False
        self.has_instruction = False
        self.stop_unheard = False
        self.executor_stalled = False
        self.cmd_vel_shared = False
        self.clock_missing = False
        self._stop_requested = False
        self._latch: Reason | None = None
        self._image_time_s: float | None = None
        self._image_lost_s: float | None = None  # since when a camera that had sent images is missing
        self._image_refused = False
        self._image_sources = 1
        self._action: VelocityCommand | None = None
        self._captured_s = -math.inf
        self._instruction_changed_s = -math.inf
        self._last_command = STANDSTILL
        self._last_decision_s: float | None = None
        self._standing_since_s: float | None = None
        self._rolling_since_s: float | None = None

    @property
    def latched(self) -> Reason | None:
        """The fault that keeps the robot stopped until `enable(True)`, if any."""
        return self._latch

    def enable(self, enabled: bool) -> None:
        """Allow or forbid motion; allowing also releases a latched fault, whose cause can latch again."""
        self.enabled = enabled
        self.forget_action()
        if enabled:
            self._latch = Reason.STOP_REQUESTED if self._stop_requested else None
            self._image_time_s = self._image_lost_s = None

    def halt(self) -> None:
        """Forbid motion at once; the caller publishes a standstill without asking."""
        self.active = False
        self.forget_action()
        self._last_command = STANDSTILL

    def request_stop(self, stop: bool) -> None:
        """Stop while `stop` is true, and stay stopped afterwards until enabled again."""
        self._stop_requested = stop
        if stop:
            self.latch(Reason.STOP_REQUESTED)

    def latch(self, reason: Reason) -> None:
        """Stop for `reason` until enabled again; the first reason stays."""
        self._latch = self._latch or reason
        self.forget_action()

    def instruction_changed(self, present: bool, now_s: float) -> None:
        """Take note of another instruction, or of none; the action of the earlier one is dropped."""
        self.has_instruction = present
        self._instruction_changed_s = now_s
        self.forget_action()

    def image_accepted(self, captured_s: float) -> None:
        """Take note of an image captured at `captured_s` (steady clock: arrival minus the age by its stamp)."""
        self._image_lost_s = None
        self._image_time_s = max(captured_s, self._image_time_s if self._image_time_s is not None else -math.inf)

    def image_refused(self) -> None:
        """Take note of an image that can't be used: standstill until a step uses a good one."""
        self._image_refused = True
        self.forget_action()

    def image_sources(self, count: int) -> bool:
        """Take note of how many publishers the image topic has: with two, the robot's own view is unknown.

        Returns:
            whether this began or ended just now: an action from the images of either one is dropped.
        """
        crossed = (count > 1) != (self._image_sources > 1)
        if crossed:
            self.forget_action()
        self._image_sources = count
        return crossed

    def action_ready(self, action: VelocityCommand, captured_s: float) -> None:
        """Take the newest action of the policy; NaN and infinity stop the robot until enabled again.

        Args:
            action: the velocity by the policy.
            captured_s: when the image that it was computed from was captured, steady clock.
        """
        if not action.is_finite:
            self.latch(Reason.ACTION_NOT_FINITE)
            return
        self._image_refused = False
        self._action = action
        self._captured_s = captured_s

    def forget_action(self) -> None:
        """Drop the action in force (a reset, a new instruction, a fault)."""
        self._action = None
        self._captured_s = -math.inf

    def decide(self, now_s: float) -> Decision:
        """Return what to publish at `now_s` (steady clock, seconds)."""
        self._notice_stall(now_s)
        reasons = self._reasons(now_s)
        if not reasons:
            self._standing_since_s = self._rolling_since_s = None
            command = self._limited(self._action, now_s)
        elif self._may_roll_out(reasons, now_s):
            command = self._limited(STANDSTILL, now_s)
        else:
            if self._standing_since_s is None:
                self._standing_since_s = now_s
            held = now_s - self._standing_since_s > self.limits.stop_hold_s
            command = None if held else STANDSTILL
        self._last_command = command or STANDSTILL
        self._last_decision_s = now_s
        return Decision(command, reasons[0] if reasons else Reason.MOVING)

    def _may_roll_out(self, reasons: list[Reason], now_s: float) -> bool:
        """Whether the robot may slow down within its acceleration limits instead of stopping at once."""
        if self._rolling_since_s is None:
            self._rolling_since_s = now_s
        asked = _GENTLE.intersection(reasons)
        return (
            self.limits.soft_stop
            and not self._last_command.is_zero
            and now_s - self._rolling_since_s <= ROLL_OUT_LIMIT_S
            and bool(asked)
            and set(reasons) <= asked | {Reason.NO_STEP}
        )

    def _notice_stall(self, now_s: float) -> None:
        """Forget ages after a time in which this node did not run: they are not the camera's fault."""
        if self._last_decision_s is None or now_s - self._last_decision_s <= STALL_S:
            return
        stalled_s = now_s - self._last_decision_s
        if self.active and stalled_s > self.limits.resume_within_s:
            self.latch(Reason.NODE_STALLED)
        self.forget_action()
        if self._image_time_s is not None:
            self._image_time_s, self._image_lost_s = None, now_s

    def _reasons(self, now_s: float) -> list[Reason]:
        """Return every reason to stand still, the one to report first; empty: the robot may move."""
        image_age_s = math.inf if self._image_time_s is None else now_s - self._image_time_s
        if self._image_time_s is not None and image_age_s > self.limits.resume_within_s and self._latch is None:
            self.latch(Reason.IMAGE_STALE)
        if self._image_lost_s is not None and now_s - self._image_lost_s > self.limits.resume_within_s:
            self._image_lost_s = None
            self.latch(Reason.IMAGE_STALE)
        checks = (
            (not self.active, Reason.INACTIVE),
            (self._stop_requested, Reason.STOP_REQUESTED),
            (self.stop_unheard, Reason.STOP_UNHEARD),
            (self.executor_stalled, Reason.NODE_STALLED),
            (not self.enabled, Reason.DISABLED),
            (self.worker_changed, Reason.WORKER_CHANGED),
            (self._latch is not None, self._latch),
            (not self.worker_ready, Reason.WORKER_NOT_READY),
            (not self.settings_confirmed, Reason.SETTINGS_ASSUMED),
            (self.cmd_vel_shared, Reason.CMD_VEL_SHARED),
            (not self.has_instruction, Reason.NO_INSTRUCTION),
            (self.clock_missing, Reason.NO_CLOCK),
            (self._image_sources > 1, Reason.IMAGE_AMBIGUOUS),
            (self._image_refused, Reason.IMAGE_REFUSED),
            (self._image_time_s is None, Reason.NO_IMAGE),
            (image_age_s > self.limits.image_timeout_s, Reason.IMAGE_STALE),
            (self._action is None, Reason.NO_STEP),
            (now_s - self._instruction_changed_s < INSTRUCTION_SETTLE_S, Reason.NO_STEP),
            (self._action is not None and now_s - self._captured_s > self.limits.step_timeout_s, Reason.STEP_STALE),
        )
        return [reason for refused, reason in checks if refused]

    def _limited(self, goal: VelocityCommand, now_s: float) -> VelocityCommand:
        """Return the goal within the speed limits, approached along a straight line in velocity space."""
        target = [max(-m, min(m, v)) for v, m in zip(goal.values, self.limits.max_velocity)]
        elapsed_s = 0.0 if self._last_decision_s is None else max(0.0, now_s - self._last_decision_s)
        last = self._last_command.values
        # One factor for all axes keeps the direction of the change, so that the robot's path bends the same way.
        factor = 1.0
        for start, end, rate in zip(last, target, self.limits.max_acceleration):
            if abs(end - start) > rate * elapsed_s:
                factor = min(factor, rate * elapsed_s / abs(end - start))
        reached = [start + factor * (end - start) for start, end in zip(last, target)]
        # A speed limit that is lowered while the robot drives faster takes effect at once.
        return VelocityCommand(*(max(-m, min(m, v)) for v, m in zip(reached, self.limits.max_velocity)))
