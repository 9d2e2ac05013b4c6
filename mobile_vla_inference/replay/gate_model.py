"""GateModel: the node's gate over recorded time: what it would have published at each image of a bag, and why."""

from __future__ import annotations

from collections.abc import Sequence

from mobile_vla_inference.action import AXES, VelocityCommand
from mobile_vla_inference.control.gate import PUBLISH_RATE_HZ, CommandGate, Decision, GateLimits, Reason
from mobile_vla_inference.replay.result import ReplayFrame, Velocity

#: How often the node asks its gate between steps.
_ASK_PERIOD_S = 1.0 / PUBLISH_RATE_HZ

#: Stamps are rounded: a decision this close before an image counts as the image's own.
_SAME_TIME_S = 1e-3

#: Names of the limits that change a command: the speed of each axis, and the accelerations of all axes together.
LIMITS = (*(f"speed of {axis}" for axis in AXES), "acceleration")

#: A change smaller than this, m/s or rad/s, is rounding.
_UNCHANGED = 1e-6


class GateModel:
    """Ask a CommandGate as the node does, with the stamps of the images as the steady clock.

    The model assumes an active, enabled robot, a ready worker, and steps that take no time. When time runs backwards,
    no time passes.
    """

    def __init__(self, limits: GateLimits, settings_confirmed: bool) -> None:
        self._gate = CommandGate(limits)
        self._gate.active = True
        self._gate.worker_ready = True
        self._gate.settings_confirmed = settings_confirmed
        self._now_s = 0.0
        self._stamp_s: float | None = None

    def advance(self, stamp_s: float) -> None:
        """Let time pass up to an image, with the decisions that the node's pulse takes in between."""
        elapsed_s = 0.0 if self._stamp_s is None else max(0.0, stamp_s - self._stamp_s)
        self._stamp_s = stamp_s
        goal_s = self._now_s + elapsed_s
        # After a longer gap every decision is the same: the gate is latched and silent.
        limits = self._gate.limits
        asked_until_s = min(goal_s, self._now_s + limits.resume_within_s + limits.stop_hold_s + 1.0)
        while self._now_s + _ASK_PERIOD_S < asked_until_s - _SAME_TIME_S:
            self._now_s += _ASK_PERIOD_S
            self._gate.decide(self._now_s)
        self._now_s = goal_s

    def instruction_changed(self, present: bool) -> None:
        """Take note that another instruction, or none, is in force."""
        self._gate.instruction_changed(present, self._now_s)

    def image_accepted(self) -> None:
        """Take note of a good image of the present time."""
        self._gate.image_accepted(self._now_s)

    def image_refused(self) -> None:
        """Take note of an image that can't be used."""
        self._gate.image_refused()

    def state_reset(self) -> None:
        """Drop the action in force, because the LSTM state was reset."""
        self._gate.forget_action()

    def action_ready(self, command: VelocityCommand) -> None:
        """Take the action of the policy for the present image."""
        self._gate.action_ready(command, self._now_s)

    def decide(self) -> Decision:
        """Return what the node would publish at the present image."""
        return self._gate.decide(self._now_s)


def limited_by(wanted: Velocity, gated: Velocity, limits: GateLimits) -> tuple[str, ...]:
    """Return which of LIMITS changed a command, from the policy's velocity and the one that the gate let through."""
    clamped = [max(-most, min(most, value)) for value, most in zip(wanted, limits.max_velocity)]
    changed = [abs(value - within) > _UNCHANGED for value, within in zip(wanted, clamped)]
    changed.append(any(abs(value - within) > _UNCHANGED for value, within in zip(gated, clamped)))
    return tuple(name for name, is_changed in zip(LIMITS, changed) if is_changed)


def frames_limited_by(frames: Sequence[ReplayFrame], limits: GateLimits) -> list[tuple[str, ...] | None]:
    """Return for each frame which limits changed the command in force; None if the gate did not let the robot move.

    For a frame that was not stepped, the command of the last stepped one stays in force.
    """
    found: list[tuple[str, ...] | None] = []
    wanted: Velocity | None = None
    for frame in frames:
        wanted = wanted if frame.command is None else frame.command
        moves = frame.reason == Reason.MOVING.value and frame.gated is not None and wanted is not None
        found.append(limited_by(wanted, frame.gated, limits) if moves else None)
    return found
