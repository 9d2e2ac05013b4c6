"""Run a policy over the images of a bag, frame by frame, with its LSTM state, and compare it with the recording.

An image is processed as in the node: the message is checked and converted by ros/conversions.py, its stamp is judged by
control/stamps.py, it is reduced by frames.reduce_frame inside VlaPolicy.step, and the command goes through a
CommandGate. The same rules clear the LSTM state: a changed instruction, a gap in the images, time that runs backwards,
a step that failed. Only the timing depends on the machine's speed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mobile_vla_inference.action import Action
from mobile_vla_inference.bags.images import CONVERSIONS, decode_or_none
from mobile_vla_inference.bags.reader import BagError, BagMessage, BagReader
from mobile_vla_inference.bags.topics import BagTopics, choose_topics
from mobile_vla_inference.control.gate import GateLimits
from mobile_vla_inference.control.reset_cause import ResetCause
from mobile_vla_inference.control.stamps import StampFault, StampJudge, broken_sequence, stamp_seconds
from mobile_vla_inference.control.worker_options import WorkerOptions
from mobile_vla_inference.errors import FrameError, InstructionError, MobileVlaError
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.policy_facts import PolicyFacts
from mobile_vla_inference.replay.gate_model import GateModel
from mobile_vla_inference.replay.result import ReplayFrame, ReplayResult, Velocity
from mobile_vla_inference.replay.summary import Step, make_result
from mobile_vla_inference.replay.timing import Stopwatch

EVERY_FRAME, DUE, STEPS_FILE, NODE = "every-frame", "due", "steps-file", "node"

#: Called with every message of the topics, and with its result if it is an image.
MessageSink = Callable[[BagTopics, BagMessage, ReplayFrame | None], None]

#: A recorded command older than this is not used for a frame: the recording, or the driver, was silent.
COMMAND_MAX_AGE_S = 0.5

#: A step can start this much too early: stamps are rounded.
_DUE_TOLERANCE_S = 1e-3


class Policy(Protocol):
    """The part of VlaPolicy that a replay uses."""

    def describe(self) -> PolicyFacts:
        """Return the facts of the loaded policy."""

    def set_instruction(self, text: str) -> None:
        """Follow another instruction."""

    def step(self, frame: np.ndarray) -> Action:
        """Compute the action for a frame, uint8 RGB [height, width, 3]."""

    def reset(self) -> None:
        """Clear the hidden state."""


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay, and how.

    Attributes:
        image_topic: None: the only image topic of the bag.
        command_topic: None: the only velocity topic of the bag, or the one named cmd_vel.
        instruction: None: those of the bag.
        pace: `every-frame`, `due` (as the node at the policy's step period) or `steps-file` (exactly `steps`).
        steps: for `steps-file`.
        max_frames: stop after this many images; None: all.
        state_gap_s: a longer gap between two stepped frames clears the LSTM state, as in the node.
        limits: limits of the gate.
        command_line: shown in the report.
    """

    image_topic: str | None = None
    command_topic: str | None = None
    instruction: str | None = None
    pace: str = EVERY_FRAME
    steps: tuple[Step, ...] = ()
    max_frames: int | None = None
    state_gap_s: float = WorkerOptions.state_gap_s
    limits: GateLimits = field(default_factory=GateLimits)
    command_line: str = ""

    def topics(self, bag: BagReader) -> BagTopics:
        """Find the topics to use in a bag; raise BagError if one is missing, ambiguous or of a wrong type."""
        given = self.instruction is not None or self.pace == STEPS_FILE
        return choose_topics(bag, self.image_topic, self.command_topic, not given)


def replay(
    path: Path | str,
    policy: Policy,
    options: ReplayOptions,
    *,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
    sink: MessageSink | None = None,
) -> ReplayResult:
    """Run a policy over a bag.

    Args:
        path: the bag.
        policy: a loaded VlaPolicy; its LSTM state is cleared first.
        options: what to replay, and how.
        progress: called with the number of images done and the number of all images.
        sink: called with every message of the topics, and with its result if it is an image.

    Raises:
        BagError: the bag can't be used, or contains no image that could be stepped.
        InstructionError: there is no instruction, or it can't be used.
    """
    with BagReader(path) as bag:
        topics = options.topics(bag)
        total = topics.image.count if options.max_frames is None else min(topics.image.count, options.max_frames)
        runner = _Runner(policy, options)
        commands = CommandRecord()
        frames: list[ReplayFrame] = []
        received_ns: list[int] = []
        clock = Stopwatch()
        unreadable: Counter[str] = Counter()
        for message in bag.messages(topics.names):
            made = None
            if message.topic == topics.image.name:
                if len(frames) == options.max_frames:
                    break
                made = runner.image(len(frames), decode_or_none(bag, message), topics.image.type_name)
                frames.append(made)
                received_ns.append(message.time_ns)
            else:
                decoded = decode_or_none(bag, message)
                if decoded is None:
                    unreadable[message.topic] += 1
                elif topics.command is not None and message.topic == topics.command.name:
                    commands.add(message.time_ns, decoded)
                else:
                    runner.instruction(decoded.data)
            if sink is not None:
                sink(topics, message, made)
            if made is not None:
                clock.lap(len(frames) - 1, made.latency_s)
                progress(len(frames), total)
        runner.finish()
        notes = (*bag.notes, *(f"{n} messages on {topic} could not be read" for topic, n in sorted(unreadable.items())))
    if not any(frame.stepped for frame in frames):
        raise _nothing_stepped(Path(path), frames)
    frames = commands.assign(frames, received_ns)
    return make_result(
        Path(path),
        topics,
        policy.describe(),
        options.pace,
        options.command_line,
        frames,
        notes,
        clock.timing(len(frames)),
        options.limits,
    )


def _nothing_stepped(path: Path, frames: list[ReplayFrame]) -> MobileVlaError:
    drops = Counter(frame.drop for frame in frames)
    if drops.get("no_instruction") == len(frames):
        return InstructionError(
            f"{path} contains no instruction before its images end, expected a text; give one with --instruction"
        )
    causes = ", ".join(f"{count} {cause}" for cause, count in sorted(drops.items()))
    return BagError(f"none of the {len(frames)} images of {path} could be stepped ({causes}), expected camera frames")


class _Runner:
    """Step the policy on the images by the node's rules; one entry per image."""

    def __init__(self, policy: Policy, options: ReplayOptions) -> None:
        self._policy = policy
        self._options = options
        facts = policy.describe()
        self._mapping = facts.action_mapping
        self._step_period_s = facts.step_period_s
        self._gate = GateModel(options.limits, not facts.assumed_settings)
        self._instruction = ""
        self._stamps = StampJudge()
        self._last_stepped_s: float | None = None
        # A steady clock made of the stamps: the step period does not restart when the time of a bag runs backwards.
        self._now_s = 0.0
        self._next_step_s = 0.0
        self._pending_reset: ResetCause | None = ResetCause.START
        self._step_number = 0
        policy.set_instruction("")
        policy.reset()
        if options.instruction is not None:
            self.instruction(options.instruction)

    def instruction(self, text: str) -> None:
        """Follow an instruction of the bag; a text that can't be used counts as none, as in the node."""
        try:
            checked = check_instruction(text)
        except InstructionError:
            if self._options.instruction is not None:
                raise
            checked = ""
        if checked == self._instruction or self._options.pace == STEPS_FILE:
            return
        self._follow(checked)
        self._reset_before_next(ResetCause.INSTRUCTION)

    def _follow(self, text: str) -> None:
        self._policy.set_instruction(text)
        self._instruction = text
        self._gate.instruction_changed(bool(text))

    def image(self, index: int, message: Any | None, type_name: str) -> ReplayFrame:
        """Process the next image, None if it could not be decoded; return its entry without the recorded command."""
        # Without a message there is no stamp: no time has passed.
        captured_s = self._stamps.last_s or 0.0 if message is None else stamp_seconds(message.header.stamp)
        check, convert = CONVERSIONS[type_name]
        verdict = self._stamps.judge(captured_s)
        drop = "unreadable" if not _is_readable(message, check) else verdict.fault or ""
        self._now_s += max(0.0, verdict.elapsed_s)
        self._gate.advance(captured_s)
        if drop and drop != StampFault.REPEATED:
            self._gate.image_refused()
        elif not drop:
            self._gate.image_accepted()
            if verdict.is_backwards:
                self._reset_before_next(ResetCause.TIME_BACKWARDS)
        action, reset = None, None
        if not drop:
            drop = self._skip_cause(captured_s)
        if not drop:
            action, reset, drop = self._step(captured_s, partial(convert, message))
        return self._entry(index, captured_s, str(drop), str(reset or ""), action)

    def _skip_cause(self, stamp_s: float) -> str:
        """Return why a good image is not stepped now; empty: it is."""
        if self._options.pace == STEPS_FILE:
            steps = self._options.steps
            due = self._step_number < len(steps) and steps[self._step_number].stamp_s == stamp_s
            return "" if due else "not_due"
        if not self._instruction:
            return "no_instruction"
        early = self._now_s < self._next_step_s - _DUE_TOLERANCE_S
        return "not_due" if early and self._options.pace == DUE else ""

    def _step(self, stamp_s: float, load: Callable[[], np.ndarray]) -> tuple[Action | None, ResetCause | None, str]:
        """Step the policy; return the action, why the state was reset before, and why there is no action."""
        try:
            frame = load()
        except FrameError:
            self._gate.image_refused()
            return None, None, "unreadable"
        reset = self._clear_state(stamp_s)
        self._last_stepped_s = stamp_s
        self._next_step_s = self._now_s + self._step_period_s
        try:
            return self._policy.step(frame), reset, ""
        except MobileVlaError:  # as in the worker: the LSTM state may be damaged
            self._reset_before_next(ResetCause.STEP_FAILED)
            return None, reset, "step_failed"

    def _clear_state(self, stamp_s: float) -> ResetCause | None:
        """Clear the LSTM state if the node would have, and return why; None: it was kept."""
        if self._options.pace == STEPS_FILE:
            step = self._options.steps[self._step_number]
            self._step_number += 1
            if step.instruction != self._instruction:
                self._follow(step.instruction)
            cause = ResetCause.STEPS_FILE if step.reset else None
        else:
            cause = self._pending_reset or broken_sequence(self._last_stepped_s, stamp_s, self._options.state_gap_s)
        self._pending_reset = None
        if cause is not None:
            self._policy.reset()
        return cause

    def _reset_before_next(self, cause: ResetCause) -> None:
        self._pending_reset = self._pending_reset or cause
        self._gate.state_reset()

    def _entry(self, index: int, stamp_s: float, drop: str, reset: str, action: Action | None) -> ReplayFrame:
        command = None
        if action is not None:
            command = self._mapping.velocity(action.values)
            self._gate.action_ready(command)
        decision = self._gate.decide()
        return ReplayFrame(
            index=index,
            stamp_s=stamp_s,
            stepped=action is not None,
            drop=drop,
            reset=reset,
            action=None if action is None else action.values,
            command=None if command is None else command.values,
            gated=None if decision.command is None else decision.command.values,
            reason=decision.reason.value,
            recorded=None,
            instruction=self._instruction,
            latency_s=None if action is None else action.step_s,
        )

    def finish(self) -> None:
        """Raise BagError if the bag lacks the image of a step of the steps file."""
        steps = self._options.steps
        if self._options.pace == STEPS_FILE and self._step_number < len(steps):
            raise BagError(
                f"step {self._step_number} of {len(steps)} has the stamp {steps[self._step_number].stamp_s!r}, "
                "which no further image of the bag has; use the bag that the steps were recorded with"
            )


def _is_readable(message: Any | None, check: Callable[[Any], None]) -> bool:
    """Whether an image has a header that can be a frame's; None is a message that could not be decoded."""
    try:
        if message is not None:
            check(message)
    except FrameError:
        return False
    return message is not None


class CommandRecord:
    """The recorded velocities of a bag, in 32 bytes each."""

    def __init__(self) -> None:
        self._times_ns: list[int] = []
        self._values: list[Velocity] = []

    def add(self, time_ns: int, message: Any) -> None:
        """Add a Twist or TwistStamped."""
        twist = getattr(message, "twist", message)
        self._times_ns.append(time_ns)
        self._values.append((float(twist.linear.x), float(twist.linear.y), float(twist.angular.z)))

    def assign(self, frames: Sequence[ReplayFrame], received_ns: Sequence[int]) -> list[ReplayFrame]:
        """Return the frames, each with the newest command that was recorded before it, if that is finite and recent."""
        order = np.argsort(np.array(self._times_ns, dtype=np.int64), kind="stable")
        times = np.array(self._times_ns, dtype=np.int64)[order]
        newest = np.searchsorted(times, np.array(received_ns, dtype=np.int64), side="right") - 1
        assigned = []
        for frame, at, time_ns in zip(frames, newest, received_ns):
            recent = at >= 0 and time_ns - times[at] <= COMMAND_MAX_AGE_S * 1e9
            value = self._values[order[at]] if recent else None
            usable = value is not None and all(map(math.isfinite, value))
            assigned.append(replace(frame, recorded=value) if usable else frame)
        return assigned
