"""Mailbox: the newest frame and the instruction on their way to the worker, its events on their way back.

It decides what the worker is asked for next, and when, and it accounts for every frame. It knows no process, socket or
thread; time is passed in.

A *generation* counts resets and changes of the instruction. A result of an older generation is discarded.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mobile_vla_inference.control.reset_cause import ResetCause
from mobile_vla_inference.control.stamps import broken_sequence
from mobile_vla_inference.control.worker_events import StepFailed, StepResult, WorkerEvent

#: Contexts are not sent more often: under a flood of instructions the worker would do nothing but encode them.
_CONTEXT_PERIOD_S = 0.1


@dataclass(frozen=True)
class Frame:
    """A camera image that waits for its step; only the newest is kept.

    Attributes:
        stamp_s: capture time by the message's stamp, seconds.
        received_s: arrival time, steady clock, seconds.
        captured_s: capture time by the stamp's age at arrival, steady clock, seconds.
        load: converts and reduces the image: (size_px, keep_aspect) -> uint8 RGB [size, size, 3]; raises FrameError.
    """

    stamp_s: float
    received_s: float
    captured_s: float
    load: Callable[[int, bool], np.ndarray]


@dataclass(frozen=True)
class ContextOrder:
    """The worker shall reset its hidden state and follow this instruction."""

    generation: int
    instruction: str


@dataclass(frozen=True)
class StepOrder:
    """The worker shall step on this frame."""

    generation: int
    frame: Frame


@dataclass
class WorkerCounters:
    """What happened to the frames; `received` equals `stepped` plus all of `dropped` plus at most one that waits."""

    received: int = 0
    stepped: int = 0
    dropped: Counter = field(default_factory=Counter)
    discarded_results: int = 0
    state_resets: Counter = field(default_factory=Counter)
    restarts: int = 0


@dataclass
class _Sent:
    """What one worker process was asked for so far, and when the next context and the next step are due."""

    generation: int | None = None
    last_stamp_s: float | None = None
    next_context_s: float = 0.0
    next_step_s: float = 0.0


class Mailbox:
    """Hold what waits for the worker and what waits for the node. Thread-safe; no method waits for anything."""

    def __init__(self, state_gap_s: float) -> None:
        """Start empty, with a worker that is not ready.

        Args:
            state_gap_s: a longer gap between the stamps of two stepped frames resets the hidden state.
        """
        self._state_gap_s = state_gap_s
        self._lock = threading.Lock()
        self._counters = WorkerCounters()
        self._events: deque[WorkerEvent] = deque()
        self._frame: Frame | None = None
        self._instruction = ""
        self._generation = 0
        self._steps_allowed = False
        self._worker_ready = False
        self._sent = _Sent()

    # ---- the node's side -----------------------------------------------------------------------------------------

    def allow_steps(self, allowed: bool) -> None:
        """Allow steps or not; either way the hidden state is reset."""
        with self._lock:
            self._steps_allowed = allowed
            self._start_generation(ResetCause.ACTIVATION)

    def submit(self, frame: Frame) -> None:
        """Offer a frame; an older one that still waits is dropped and counted."""
        with self._lock:
            self._counters.received += 1
            cause = self._refusal()
            if cause is not None:
                self._counters.dropped[cause] += 1
                return
            if self._frame is not None:
                self._counters.dropped["superseded"] += 1
            self._frame = frame

    def count_refused(self, cause: str) -> None:
        """Count an image that was refused before it became a frame."""
        with self._lock:
            self._counters.received += 1
            self._counters.dropped[cause] += 1

    def set_instruction(self, text: str) -> bool:
        """Put a checked instruction in force; a changed text resets the hidden state. Return whether it changed."""
        with self._lock:
            if text == self._instruction:
                return False
            self._instruction = text
            self._start_generation(ResetCause.INSTRUCTION)
        return True

    def reset(self, cause: ResetCause) -> None:
        """Reset the hidden state before the next step and discard the result of a step under way."""
        with self._lock:
            self._start_generation(cause)

    def take_events(self) -> list[WorkerEvent]:
        """Return and forget the events since the last call; results of older generations are not among them."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
        return events

    def counters(self) -> WorkerCounters:
        """Return a copy of the counters."""
        with self._lock:
            c = self._counters
            return WorkerCounters(
                c.received, c.stepped, Counter(c.dropped), c.discarded_results, Counter(c.state_resets), c.restarts
            )

    # ---- the worker's side ---------------------------------------------------------------------------------------

    def begin_session(self) -> None:
        """Forget what the worker process before this one was asked for."""
        with self._lock:
            self._sent = _Sent()

    def set_worker_ready(self, ready: bool) -> None:
        """Accept frames, or refuse them and drop the one that waits."""
        with self._lock:
            self._worker_ready = ready
            if not ready and self._frame is not None:
                self._counters.dropped["worker_not_ready"] += 1
                self._frame = None

    def next_order_s(self) -> float:
        """Return the time from which `next_order` returns an order; infinite while nothing waits."""
        with self._lock:
            if self._sent.generation != self._generation:
                return self._sent.next_context_s
            return math.inf if self._frame is None else self._sent.next_step_s

    def next_order(self, now_s: float) -> ContextOrder | StepOrder | None:
        """Take what a worker that waits is asked for now: a changed context first, then the newest frame."""
        with self._lock:
            sent = self._sent
            if sent.generation != self._generation:
                return self._take_context(now_s) if now_s >= sent.next_context_s else None
            frame = self._frame
            if frame is None or now_s < sent.next_step_s:
                return None
            if (cause := broken_sequence(sent.last_stamp_s, frame.stamp_s, self._state_gap_s)) is not None:
                self._generation += 1
                self._counters.state_resets[cause] += 1
                return self._take_context(now_s)
            self._frame = None
            return StepOrder(self._generation, frame)

    def step_started(self, order: StepOrder, due_s: float, step_period_s: float) -> None:
        """Note that the worker was handed a frame whose step was due at `due_s`.

        The period starts anew with a late step: a backlog of steps would run the LSTM's time too fast.
        """
        with self._lock:
            self._sent.next_step_s = due_s + step_period_s
            self._sent.last_stamp_s = order.frame.stamp_s

    def step_finished(self, order: StepOrder, result: StepResult) -> bool:
        """Count a step and pass its result on, unless its generation is over; return whether it was passed on."""
        with self._lock:
            self._counters.stepped += 1
            current = order.generation == self._generation
            if current:
                self._events.append(result)
            else:
                self._counters.discarded_results += 1
        return current

    def step_failed(self, message: str) -> None:
        """Count a frame for which the policy computed no usable action, and pass the reason on."""
        with self._lock:
            self._sent.last_stamp_s = None
            self._counters.dropped["step_failed"] += 1
            self._counters.state_resets[ResetCause.STEP_FAILED] += 1
            self._events.append(StepFailed(message))

    def step_lost(self, cause: str) -> None:
        """Count a frame that was taken for a step and came to no result."""
        with self._lock:
            self._counters.dropped[cause] += 1

    def post(self, event: WorkerEvent) -> None:
        """Pass an event on."""
        with self._lock:
            self._events.append(event)

    def count_restart(self) -> None:
        """Count a restart of the worker."""
        with self._lock:
            self._counters.restarts += 1

    # ---- helpers; the caller holds the lock ----------------------------------------------------------------------

    def _start_generation(self, cause: ResetCause) -> None:
        self._generation += 1
        self._counters.state_resets[cause] += 1
        if self._frame is not None:
            self._counters.dropped["state_reset"] += 1
            self._frame = None
        kept = [event for event in self._events if not isinstance(event, StepResult)]
        self._counters.discarded_results += len(self._events) - len(kept)
        self._events = deque(kept)

    def _refusal(self) -> str | None:
        """Return why a frame can't be stepped at all now, or None."""
        if not self._worker_ready:
            return "worker_not_ready"
        if not self._steps_allowed:
            return "inactive"
        if not self._instruction:
            return "no_instruction"
        return None

    def _take_context(self, now_s: float) -> ContextOrder:
        self._sent.generation = self._generation
        self._sent.last_stamp_s = None
        self._sent.next_context_s = now_s + _CONTEXT_PERIOD_S
        return ContextOrder(self._generation, self._instruction)
