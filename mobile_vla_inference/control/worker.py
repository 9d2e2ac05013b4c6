"""PolicyWorker: the policy in a process of its own, started, watched and restarted from here.

A hang in CUDA, a segmentation fault or the OOM killer takes the worker process, never the node. One thread
supervises it: hands over the newest frame when a step is due, receives actions, notices a crash or a hang,
and starts it again. Frames cross in anonymous shared memory (memfd: nothing to leak by name), messages as JSON
over a socket pair. Only this side writes frames, and only while the worker waits, so no frame is ever torn.

Numbers that matter: a *generation* counts resets and instructions, and results of an older one are discarded;
`step_period_s` is the time that one LSTM step stands for, so steps start no more often than that.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.policy_facts import MAX_MESSAGE_BYTES, PolicyFacts

#: The entry point that imports torch; a module name, so that this side never does.
WORKER_MODULE = "mobile_vla_inference.policy.worker_process"

#: Contexts are sent no more often: under a flood of instructions the worker would only encode them.
_CONTEXT_PERIOD_S = 0.1
_RESTART_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
#: A deadline that is noticed later than this was missed by this process itself, which says nothing of the worker.
_OWN_STALL_S = 0.25
#: How long the end of a process is waited for once it is certain; memory of a driver may take longer to be freed.
_EXIT_LIMIT_S = 5.0


class WorkerState(Enum):
    """Where the worker is in its life; the value is shown in the diagnostics."""

    STOPPED = "stopped"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"


@dataclass(frozen=True)
class WorkerOptions:
    """How to start and to watch the worker.

    Attributes:
        policy: keyword arguments of VlaPolicy.load (JSON-ready).
        load_timeout_s: a load that takes longer counts as a hang.
        step_timeout_s: a step that takes longer counts as a hang.
        state_gap_s: a longer gap between the stamps of two stepped frames resets the hidden state.
        max_restarts: restarts after faults in a row before giving up.
        healthy_after_s: a worker that was ready for so long ends the row.
        module: the module that runs as the worker process.
    """

    policy: dict[str, Any]
    load_timeout_s: float = 600.0
    step_timeout_s: float = 2.0
    state_gap_s: float = 2.0
    max_restarts: int = 5
    healthy_after_s: float = 60.0
    module: str = WORKER_MODULE


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
class StepResult:
    """An action and the frame that caused it.

    Attributes:
        values: normalised action, one float per axis.
        stamp_s: stamp of the frame, seconds.
        received_s: arrival of the frame, steady clock.
        captured_s: capture of the frame, steady clock.
        started_s: when the frame's step was due and its conversion began, steady clock.
        loaded_s: when it was converted and lay in shared memory, steady clock.
        finished_s: when the action came back, steady clock.
        step_s: seconds that the policy itself took.
        first_of_state: whether the hidden state was empty before this step.
    """

    values: tuple[float, ...]
    stamp_s: float
    received_s: float
    captured_s: float
    started_s: float
    loaded_s: float
    finished_s: float
    step_s: float
    first_of_state: bool


@dataclass(frozen=True)
class WorkerFault:
    """The worker died, hung or failed; `message` is one sentence; `final` means that it is not started again."""

    message: str
    final: bool


@dataclass(frozen=True)
class WorkerChanged:
    """A restarted worker loaded something else than the first one; `message` names it. It is not started again."""

    message: str


@dataclass(frozen=True)
class FrameRefused:
    """A frame could not be converted; `message` says why."""

    message: str


@dataclass(frozen=True)
class InstructionRefused:
    """The policy could not use the instruction; `message` says why."""

    message: str


@dataclass(frozen=True)
class StepFailed:
    """The policy gave no usable action for a frame; `message` says why. The hidden state starts afresh."""

    message: str


WorkerEvent = StepResult | StepFailed | WorkerFault | WorkerChanged | FrameRefused | InstructionRefused


@dataclass
class WorkerCounters:
    """What happened to the frames; `received` equals `stepped` plus all of `dropped` plus at most one that waits."""

    received: int = 0
    stepped: int = 0
    dropped: Counter = field(default_factory=Counter)
    discarded_results: int = 0
    state_resets: Counter = field(default_factory=Counter)
    restarts: int = 0


class PolicyWorker:
    """Run the policy in a child process and keep it alive.

    Thread-safe, and harmless after `close`: what it is told then is forgotten.
    """

    def __init__(
        self, options: WorkerOptions, notify: Callable[[], None], died: Callable[[BaseException], None] = lambda _: None
    ) -> None:
        """Prepare the worker; `start` starts it.

        Args:
            options: how to start and to watch it.
            notify: called from the supervising thread whenever `take_events` or the state has news.
            died: called by the supervising thread with what ended it, should it ever fail itself.
        """
        self._options = options
        self._notify = notify
        self._died = died
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._events: deque[WorkerEvent] = deque()
        self._counters = WorkerCounters()
        self._state = WorkerState.STOPPED
        self._progress = ""
        self._last_error = ""
        self._facts: PolicyFacts | None = None
        self._memory: dict[str, float] = {}
        self._stepping_allowed = False
        self._frame: Frame | None = None
        self._instruction = ""
        self._generation = 0
        self._stop = False
        #: A step that takes longer counts as a hang; may change while the worker runs.
        self.step_timeout_s = options.step_timeout_s
        self._thread: threading.Thread | None = None
        self._child: subprocess.Popen | None = None
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Guards the descriptor: after `close` its number may belong to somebody else.
        self._wake_lock = threading.Lock()
        self._closed = False
        self._dead = False

    # ---- what the node calls -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the supervising thread and with it the worker process."""
        with self._lock:
            self._stop = False
            self._state = WorkerState.LOADING
        self._thread = threading.Thread(target=self._run, name="policy_worker", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the worker process and its thread; safe to call more than once."""
        with self._lock:
            self._stop = True
        self._wake_up()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._changed:
            self._state = WorkerState.STOPPED
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, and release the file descriptor; safe to call more than once."""
        self.stop()
        with self._wake_lock:
            if not self._closed:
                self._closed = True
                os.close(self._wake_fd)

    def wait_until_loaded(self) -> None:
        """Block until the worker is ready, has failed for good or was stopped."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._state in (WorkerState.READY, WorkerState.FAILED, WorkerState.STOPPED) or self._stop
            )

    def allow_steps(self, allowed: bool) -> None:
        """Let steps happen or not; either way the hidden state starts afresh."""
        with self._lock:
            self._stepping_allowed = allowed
            self._bump_generation("activation")
        self._wake_up()

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
        self._wake_up()

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
            self._bump_generation("instruction")
        self._wake_up()
        return True

    def reset(self, cause: str = "request") -> None:
        """Clear the hidden state before the next step and discard the result of a step under way."""
        with self._lock:
            self._bump_generation(cause)
        self._wake_up()

    def take_events(self) -> list[WorkerEvent]:
        """Return and forget what happened since the last call; results of older generations are already gone."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
        return events

    @property
    def state(self) -> WorkerState:
        """Where the worker is in its life."""
        return self._state

    @property
    def pid(self) -> int | None:
        """Process id of the worker, if one runs."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    @property
    def facts(self) -> PolicyFacts | None:
        """The loaded policy; None before one is loaded."""
        return self._facts

    @property
    def memory(self) -> dict[str, float]:
        """GPU memory that the worker last reported, MiB."""
        return self._memory

    @property
    def progress(self) -> str:
        """What the worker does while it loads, for people."""
        return self._progress

    @property
    def last_error(self) -> str:
        """The sentence of the last fault; empty if there was none."""
        return self._last_error

    @property
    def instruction(self) -> str:
        """The instruction in force; empty means: stand still."""
        return self._instruction

    def counters(self) -> WorkerCounters:
        """Return a copy of the counters."""
        with self._lock:
            c = self._counters
            return WorkerCounters(
                c.received, c.stepped, Counter(c.dropped), c.discarded_results, Counter(c.state_resets), c.restarts
            )

    # ---- shared helpers ------------------------------------------------------------------------------------------

    def _wake_up(self) -> None:
        with self._wake_lock, contextlib.suppress(BlockingIOError):  # it is awake already
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def _bump_generation(self, cause: str) -> None:
        """Raise the generation; the caller holds the lock."""
        self._generation += 1
        self._counters.state_resets[cause] += 1
        if self._frame is not None:
            self._counters.dropped["state_reset"] += 1
            self._frame = None
        kept = [event for event in self._events if not isinstance(event, StepResult)]
        self._counters.discarded_results += len(self._events) - len(kept)
        self._events = deque(kept)

    def _refusal(self) -> str | None:
        """Return why a frame can't be stepped at all now, or None; the caller holds the lock."""
        if self._state is not WorkerState.READY:
            return "worker_not_ready"
        if not self._stepping_allowed:
            return "inactive"
        if not self._instruction:
            return "no_instruction"
        return None

    def _publish_event(self, event: WorkerEvent) -> None:
        with self._lock:
            self._events.append(event)
        self._notify()

    def _set_state(self, state: WorkerState) -> None:
        with self._changed:
            self._state = state
            if state is not WorkerState.READY and self._frame is not None:
                self._counters.dropped["worker_not_ready"] += 1
                self._frame = None
            self._changed.notify_all()
        self._notify()

    # ---- the supervising thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        """Supervise, and tell whatever ends that: a worker that nobody watches must not move a robot."""
        try:
            self._supervise()
        except BaseException as error:
            self._tell_death(error)

    def _tell_death(self, error: BaseException) -> None:
        """Tell, once, that the supervision has ended and why."""
        if self._dead:
            return
        self._dead = True
        self._last_error = f"the worker's supervision failed: {_describe_error(error)}"
        with self._lock:
            self._events.append(WorkerFault(self._last_error, True))
            self._state = WorkerState.FAILED
            self._changed.notify_all()
        self._died(error)

    def _supervise(self) -> None:
        """Start the worker, again after faults, until stopped or given up."""
        attempt = 0
        while not self._stop:
            self._set_state(WorkerState.LOADING)
            with _WorkerSession(self) as session:
                try:
                    fault = session.run()
                except Exception as error:  # no descriptor left, a message that makes no sense, whatever else
                    fault = WorkerFault(f"worker could not be run: {_describe_error(error)}", False)
                if self._stop or fault is None:
                    return
                if session.ready_for_s >= self._options.healthy_after_s:
                    attempt = 0
                # Told before the process is ended: the kernel takes its time to free gigabytes, the robot drives on.
                final = self._tell_fault(fault, attempt)
            if final:
                return
            delay_s = _RESTART_DELAYS_S[min(attempt, len(_RESTART_DELAYS_S) - 1)]
            attempt += 1
            with self._lock:
                self._counters.restarts += 1
            self._sleep(delay_s)

    def _tell_fault(self, fault: WorkerFault | WorkerChanged, attempt: int) -> bool:
        """Publish a fault of the worker; return whether it is final."""
        if isinstance(fault, WorkerChanged):
            self._last_error = fault.message
            with self._lock:
                self._events.append(fault)
            self._set_state(WorkerState.FAILED)
            return True
        # What never ran once will not run the next time either.
        final = fault.final or self._facts is None or attempt >= self._options.max_restarts
        message = fault.message
        self._last_error = message
        if self._facts is not None and final and not fault.final:
            message = f"{message}; gave up after {attempt} restarts"
        with self._lock:
            self._events.append(WorkerFault(message, final))
        self._set_state(WorkerState.FAILED if final else WorkerState.RESTARTING)
        return final

    def _sleep(self, duration_s: float) -> None:
        """Wait, but wake at once when stopped."""
        deadline_s = steady_s() + duration_s
        while not self._stop and (remaining_s := deadline_s - steady_s()) > 0:
            time.sleep(min(remaining_s, 0.05))


class _WorkerSession:
    """One life of the worker process: spawn, load, steps, end. Lives in the supervising thread."""

    def __init__(self, worker: PolicyWorker) -> None:
        self._worker = worker
        self._options = worker._options
        self._pending: Frame | None = None  # handed over, result outstanding
        self._pending_generation = 0
        self._started_s = self._loaded_s = 0.0
        self._deadline_s = math.inf
        self._next_step_s = 0.0
        self._next_context_s = 0.0
        self._sent_generation = -1
        self._fresh_state = True
        self._last_stamp_s: float | None = None
        self._ready_s = math.inf
        self._shared: mmap.mmap | None = None
        self._child: subprocess.Popen | None = None
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> _WorkerSession:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Kill the process if it still runs, reap it and release what the session holds."""
        if error is not None:  # told first: the kernel takes its time to end a process
            self._worker._tell_death(error)
        if self._child is not None:
            if self._child.poll() is None:
                self._child.kill()
            self._await_exit(_EXIT_LIMIT_S)
        self._worker._child = None
        self._resources.close()

    def _open(self) -> None:
        """Make what both processes share, and start the other one."""
        self._memory_fd = os.memfd_create("mobile_vla_frame", os.MFD_CLOEXEC)
        self._resources.callback(os.close, self._memory_fd)
        self._socket, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._resources.enter_context(self._socket)
        with remote:
            self._selector = self._resources.enter_context(selectors.DefaultSelector())
            self._oom_kills = _count_oom_kills()
            self._spawn(remote)
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._worker._wake_fd, selectors.EVENT_READ)
        self._deadline_s = steady_s() + self._options.load_timeout_s

    def _spawn(self, remote: socket.socket) -> None:
        command = [
            sys.executable,
            "-m",
            self._options.module,
            str(remote.fileno()),
            str(self._memory_fd),
            str(os.getpid()),
        ]
        self._worker._child = self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=(remote.fileno(), self._memory_fd)
        )
        self._send({"op": "load", "policy": self._options.policy})

    def _await_exit(self, limit_s: float) -> int | None:
        """Return the exit status, or None where the process has not ended after `limit_s`."""
        try:
            return self._child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    @property
    def ready_for_s(self) -> float:
        """How long ago the policy was loaded; negative where it never was."""
        return steady_s() - self._ready_s

    def run(self) -> WorkerFault | WorkerChanged | None:
        """Serve until the worker faults (returned) or is asked to stop (None)."""
        self._open()
        while not self._worker._stop:
            self._start_due_step()
            timeout_s = self._next_wake_s() - steady_s()
            ready = self._selector.select(None if timeout_s == math.inf else max(0.0, timeout_s))
            for key, _ in ready:
                if key.fileobj is not self._socket:
                    os.eventfd_read(self._worker._wake_fd)
                    continue
                fault = self._receive()
                if fault is not None:
                    return fault
            if (late_s := steady_s() - self._deadline_s) > 0.0:
                doing, limit_s = self._task()
                if late_s > _OWN_STALL_S:
                    # We meant to wake up at the deadline: what was late is this process, the worker gets its time anew.
                    self._deadline_s = steady_s() + limit_s
                    continue
                self._count_pending_as("worker_fault")
                return WorkerFault(f"worker hung: {doing} took longer than {limit_s:g} s; it was killed", False)
        return None

    def _task(self) -> tuple[str, float]:
        """Return what the worker was asked for and how long it may take, seconds."""
        if self._worker._state is not WorkerState.READY:
            return "loading", self._options.load_timeout_s
        return "a policy step" if self._pending is not None else "a change of instruction", self._worker.step_timeout_s

    def _next_wake_s(self) -> float:
        """Return the steady time at which there is something to do without any message."""
        with self._worker._lock:
            waiting = self._worker._frame is not None
            outdated = self._sent_generation != self._worker._generation
        due_s = math.inf
        if self._idle and outdated:
            due_s = self._next_context_s
        elif self._idle and waiting:
            due_s = self._next_step_s
        return min(due_s, self._deadline_s)

    @property
    def _idle(self) -> bool:
        return self._worker._state is WorkerState.READY and self._pending is None and self._deadline_s == math.inf

    def _start_due_step(self) -> None:
        """Send a changed context, or the newest frame when its step is due, only while the worker waits."""
        if not self._idle:
            return
        worker = self._worker
        now_s = steady_s()
        with worker._lock:
            if self._sent_generation != worker._generation:
                if now_s >= self._next_context_s:
                    self._send_context()
                return
            frame = worker._frame
            if frame is None or now_s < self._next_step_s:
                return
            if (cause := self._broken_sequence(frame)) is not None:
                worker._generation += 1
                worker._counters.state_resets[cause] += 1
                self._send_context()
                return
            worker._frame = None
            generation = worker._generation
        self._hand_over(frame, generation, now_s)

    def _send_context(self) -> None:
        """Tell the worker the instruction in force and to clear its hidden state; the caller holds the lock."""
        worker = self._worker
        self._send({"op": "context", "generation": worker._generation, "instruction": worker._instruction})
        self._sent_generation = worker._generation
        self._last_stamp_s = None
        self._next_context_s = steady_s() + _CONTEXT_PERIOD_S
        self._deadline_s = steady_s() + self._worker.step_timeout_s

    def _broken_sequence(self, frame: Frame) -> str | None:
        """Return why the hidden state can't be carried over to `frame`, or None."""
        if self._last_stamp_s is None:
            return None
        step_s = frame.stamp_s - self._last_stamp_s
        if step_s < 0:
            return "time_backwards"
        return "image_gap" if step_s > self._options.state_gap_s else None

    def _hand_over(self, frame: Frame, generation: int, now_s: float) -> None:
        """Convert the frame into shared memory and ask for its step."""
        try:
            pixels = frame.load(self._worker._facts.image_size, self._worker._facts.image_keep_aspect)
        except FrameError as error:
            with self._worker._lock:
                self._worker._counters.dropped["unreadable"] += 1
            self._worker._publish_event(FrameRefused(str(error)))
            return
        self._shared.seek(0)
        self._shared.write(pixels.data)
        self._loaded_s = steady_s()
        self._pending, self._pending_generation = frame, generation
        self._started_s = now_s
        # A late step starts the period anew: a backlog of steps would run the LSTM's time too fast.
        self._next_step_s = now_s + self._worker._facts.step_period_s
        self._deadline_s = self._loaded_s + self._worker.step_timeout_s
        self._last_stamp_s = frame.stamp_s
        self._send({"op": "step", "generation": generation})

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended; the next receive says so
            self._socket.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)

    def _receive(self) -> WorkerFault | WorkerChanged | None:
        """Read one message of the worker; return a fault where it ended or failed."""
        try:
            data = self._socket.recv(MAX_MESSAGE_BYTES + 1)
        except ConnectionResetError:
            data = b""
        if not data:
            # The robot stops now; how the process ended is found out afterwards.
            self._count_pending_as("worker_fault")
            self._worker._set_state(WorkerState.RESTARTING)
            return WorkerFault(_describe_exit(self._await_exit(_EXIT_LIMIT_S), self._oom_kills), False)
        if len(data) > MAX_MESSAGE_BYTES:
            return WorkerFault(f"worker sent a message of more than {MAX_MESSAGE_BYTES} bytes; it was killed", False)
        message = json.loads(data)
        return getattr(self, f"_on_{message['op']}")(message)

    def _on_progress(self, message: dict[str, Any]) -> None:
        self._worker._progress = message["text"]
        self._worker._notify()

    def _on_ready(self, message: dict[str, Any]) -> WorkerChanged | None:
        worker, facts = self._worker, PolicyFacts.from_json(message["info"])
        if worker._facts is not None and (difference := worker._facts.difference(facts)):
            return WorkerChanged(
                f"the worker loaded another policy than at configure: {difference}; restore it or configure again"
            )
        worker._facts = facts
        worker._memory = message["memory"]
        size_px = worker._facts.image_size
        os.ftruncate(self._memory_fd, size_px * size_px * 3)
        self._shared = mmap.mmap(self._memory_fd, size_px * size_px * 3)
        worker._progress = ""
        self._ready_s = steady_s()
        self._deadline_s = math.inf
        worker._set_state(WorkerState.READY)
        return None

    def _on_context(self, message: dict[str, Any]) -> None:
        self._deadline_s = math.inf
        self._fresh_state = True
        if message["error"]:
            self._worker._publish_event(InstructionRefused(message["error"]))

    def _on_result(self, message: dict[str, Any]) -> WorkerFault | None:
        worker, frame = self._worker, self._pending
        if len(message["values"]) != len(worker._facts.action_axes):
            self._count_pending_as("worker_fault")
            return WorkerFault(
                f"worker gave {len(message['values'])} action values, expected {len(worker._facts.action_axes)}",
                False,
            )
        self._pending = None
        self._deadline_s = math.inf
        worker._memory = message["memory"]
        # JSON has no NaN of its own; Python writes and reads it, and the gate is who refuses it.
        result = StepResult(
            values=tuple(float(value) for value in message["values"]),
            stamp_s=frame.stamp_s,
            received_s=frame.received_s,
            captured_s=frame.captured_s,
            started_s=self._started_s,
            loaded_s=self._loaded_s,
            finished_s=steady_s(),
            step_s=message["step_s"],
            first_of_state=self._fresh_state,
        )
        self._fresh_state = False
        with worker._lock:
            worker._counters.stepped += 1
            current = self._pending_generation == worker._generation
            if current:
                worker._events.append(result)
            else:
                worker._counters.discarded_results += 1
        if current:
            worker._notify()
        return None

    def _on_step_failed(self, message: dict[str, Any]) -> None:
        self._pending = None
        self._deadline_s = math.inf
        self._fresh_state = True
        self._last_stamp_s = None
        with self._worker._lock:
            self._worker._counters.dropped["step_failed"] += 1
            self._worker._counters.state_resets["step_failed"] += 1
        self._worker._publish_event(StepFailed(message["message"]))

    def _on_failed(self, message: dict[str, Any]) -> WorkerFault:
        """The worker says why it can't go on; a checkpoint that doesn't load won't load the next time either."""
        self._count_pending_as("worker_fault")
        return WorkerFault(message["message"], message["final"])

    def _count_pending_as(self, cause: str) -> None:
        if self._pending is None:
            return
        with self._worker._lock:
            self._worker._counters.dropped[cause] += 1
        self._pending = None


def _describe_error(error: BaseException) -> str:
    """Return an exception as part of a sentence, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _count_oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory since it booted; -1 where it doesn't say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return -1


def _describe_exit(status: int | None, oom_kills_before: int) -> str:
    """Say in one sentence how a process ended (`Popen.returncode`; None: it has not) and what to do."""
    if status is None:
        return "worker left its connection but did not end; it was killed"
    if status == -signal.SIGKILL:
        if _count_oom_kills() > oom_kills_before:
            return (
                "worker was killed by the kernel (SIGKILL) because memory ran out, expected enough for the policy; "
                "see `mobile_vla inspect` for what it needs"
            )
        return "worker was killed by SIGKILL, not by the kernel's out-of-memory killer; find out who sent it"
    if status == -signal.SIGBUS:
        return (
            "worker was killed by SIGBUS: the checkpoint was cut or its disk failed while it was mapped, expected an "
            "unchanged file; copy it again"
        )
    if status < 0:
        return f"worker was killed by {signal.Signals(-status).name}; see its output above"
    return f"worker exited with status {status}; see its output above"
