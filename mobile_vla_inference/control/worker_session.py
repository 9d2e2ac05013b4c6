"""WorkerSession: one life of the worker process, from its start to its end.

Frames cross in anonymous shared memory (memfd: there is no name that could be left behind), messages as JSON over a
socket pair. Only this side writes frames, and only while the worker waits, so no frame is ever torn.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import selectors
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.mailbox import ContextOrder, Mailbox, StepOrder
from mobile_vla_inference.control.worker_events import (
    FrameRefused,
    InstructionRefused,
    StepResult,
    WorkerChanged,
    WorkerFault,
    WorkerState,
)
from mobile_vla_inference.control.worker_exit import count_oom_kills, describe_exit
from mobile_vla_inference.control.worker_options import WorkerOptions
from mobile_vla_inference.control.worker_status import WorkerControl, WorkerStatus
from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.policy_facts import MAX_MESSAGE_BYTES, PolicyFacts

#: A deadline that is noticed later than this was missed by this process itself, so it proves no fault of the worker.
_OWN_STALL_S = 0.25
#: How long the end of a process is waited for once it is certain; a driver may take longer to free its memory.
_EXIT_LIMIT_S = 5.0

#: What ends a session.
SessionEnd = WorkerFault | WorkerChanged


@dataclass(frozen=True)
class _Step:
    """A step that the worker computes."""

    order: StepOrder
    started_s: float
    loaded_s: float


class WorkerSession:
    """One worker process and what it shares with this one. A context manager for the supervising thread alone."""

    def __init__(self, options: WorkerOptions, control: WorkerControl, mailbox: Mailbox, status: WorkerStatus) -> None:
        """Prepare a session; `run` starts the process.

        Args:
            options: how to start and to watch it.
            control: whether to end, and how long a step may take.
            mailbox: what the worker is asked for, and where its answers go.
            status: where its state is reported.
        """
        self._options = options
        self._control = control
        self._mailbox = mailbox
        self._status = status
        self._step: _Step | None = None  # handed over, without an answer so far
        self._deadline_s = math.inf
        self._state_is_empty = True
        self._ready_s = math.inf
        self._shared: mmap.mmap | None = None
        self._process: subprocess.Popen | None = None
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> WorkerSession:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Kill the process if it still runs, reap it and release what the session holds."""
        if error is not None:  # reported first: the kernel takes its time to end a process
            self._status.fail(error)
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._await_exit()
        self._status.process = None
        self._resources.close()

    @property
    def ready_for_s(self) -> float:
        """How long ago the policy was loaded; negative if it never was."""
        return steady_s() - self._ready_s

    def run(self) -> SessionEnd | None:
        """Serve until the worker faults (returned) or the control asks to stop (None)."""
        self._open()
        while not self._control.stopping:
            self._send_due_order()
            timeout_s = self._next_wake_s() - steady_s()
            ready = self._selector.select(None if timeout_s == math.inf else max(0.0, timeout_s))
            for key, _ in ready:
                if key.fileobj is self._control:
                    self._control.clear()
                    continue
                end = self._receive()
                if end is not None:
                    return end
            end = self._check_deadline()
            if end is not None:
                return end
        return None

    # ---- the process ---------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Make what both processes share, and start the other one."""
        self._mailbox.begin_session()
        self._memory_fd = os.memfd_create("mobile_vla_frame", os.MFD_CLOEXEC)
        self._resources.callback(os.close, self._memory_fd)
        self._socket, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._resources.enter_context(self._socket)
        with remote:
            self._selector = self._resources.enter_context(selectors.DefaultSelector())
            self._oom_kills = count_oom_kills()
            self._spawn(remote)
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._control, selectors.EVENT_READ)
        self._deadline_s = steady_s() + self._options.load_timeout_s

    def _spawn(self, remote: socket.socket) -> None:
        descriptors = (remote.fileno(), self._memory_fd)
        command = [sys.executable, "-m", self._options.module, *map(str, descriptors), str(os.getpid())]
        self._status.process = self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors)
        self._send({"op": "load", "policy": self._options.policy})

    def _await_exit(self) -> int | None:
        """Return the exit status, or None if the process does not end in time."""
        try:
            return self._process.wait(_EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            return None

    # ---- what is due ---------------------------------------------------------------------------------------------

    @property
    def _idle(self) -> bool:
        """Whether the worker waits for an order."""
        return self._status.state is WorkerState.READY and self._step is None and self._deadline_s == math.inf

    def _next_wake_s(self) -> float:
        """Return the steady time at which there is something to do without any message."""
        return min(self._mailbox.next_order_s() if self._idle else math.inf, self._deadline_s)

    def _check_deadline(self) -> WorkerFault | None:
        """Return the fault of a worker that has not answered in time."""
        late_s = steady_s() - self._deadline_s
        if late_s <= 0.0:
            return None
        doing, limit_s = self._task()
        if late_s > _OWN_STALL_S:
            # This thread was to wake up at the deadline: this process was late, so the worker gets its time again.
            self._deadline_s = steady_s() + limit_s
            return None
        self._lose_step()
        return WorkerFault(f"worker hung: {doing} took longer than {limit_s:g} s; it was killed", False)

    def _task(self) -> tuple[str, float]:
        """Return what the worker was asked for and how long it may take, seconds."""
        if self._status.state is not WorkerState.READY:
            return "loading", self._options.load_timeout_s
        return "a policy step" if self._step is not None else "a change of instruction", self._control.step_timeout_s

    def _send_due_order(self) -> None:
        """Send a changed context, or the newest frame when its step is due, only while the worker waits."""
        if not self._idle:
            return
        now_s = steady_s()
        order = self._mailbox.next_order(now_s)
        if isinstance(order, ContextOrder):
            self._deadline_s = steady_s() + self._control.step_timeout_s
            self._send({"op": "context", "generation": order.generation, "instruction": order.instruction})
        elif order is not None:
            self._hand_over(order, now_s)

    def _hand_over(self, order: StepOrder, due_s: float) -> None:
        """Convert the frame into shared memory and ask for its step."""
        facts = self._status.facts
        try:
            pixels = order.frame.load(facts.image_size, facts.image_keep_aspect)
        except FrameError as error:
            self._mailbox.step_lost("unreadable")
            self._status.publish(FrameRefused(str(error)))
            return
        self._shared.seek(0)
        self._shared.write(pixels.data)
        loaded_s = steady_s()
        self._step = _Step(order, due_s, loaded_s)
        self._mailbox.step_started(order, due_s, facts.step_period_s)
        self._deadline_s = loaded_s + self._control.step_timeout_s
        self._send({"op": "step", "generation": order.generation})

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended; `_receive` finds out how
            self._socket.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)

    # ---- what the worker answers ---------------------------------------------------------------------------------

    def _receive(self) -> SessionEnd | None:
        """Read one message of the worker; return a fault if it ended or failed."""
        try:
            data = self._socket.recv(MAX_MESSAGE_BYTES + 1)
        except ConnectionResetError:
            data = b""
        if not data:
            # The robot stops now; how the process ended is found out afterwards.
            self._lose_step()
            self._status.set_state(WorkerState.RESTARTING)
            return WorkerFault(describe_exit(self._await_exit(), self._oom_kills), False)
        if len(data) > MAX_MESSAGE_BYTES:
            return WorkerFault(f"worker sent a message of more than {MAX_MESSAGE_BYTES} bytes; it was killed", False)
        return self._handle(json.loads(data))

    def _handle(self, message: dict[str, Any]) -> SessionEnd | None:
        """Act on a message; return what ends the session, if it does."""
        match message["op"]:
            case "progress":
                self._status.set_progress(message["text"])
                return None
            case "ready":
                return self._on_ready(message)
            case "context":
                return self._on_context(message)
            case "result":
                return self._on_result(message)
            case "step_failed":
                return self._on_step_failed(message)
            case "failed":
                return self._on_failed(message)
        raise ValueError(f"unknown message {message['op']!r}")

    def _on_ready(self, message: dict[str, Any]) -> WorkerChanged | None:
        status, facts = self._status, PolicyFacts.from_json(message["info"])
        if status.facts is not None and (difference := status.facts.difference(facts)):
            return WorkerChanged(
                f"the worker loaded another policy than at configure: {difference}; restore it or configure again"
            )
        status.facts = facts
        status.memory = message["memory"]
        size_bytes = facts.image_size * facts.image_size * 3
        os.ftruncate(self._memory_fd, size_bytes)
        self._shared = self._resources.enter_context(mmap.mmap(self._memory_fd, size_bytes))
        status.progress = ""
        self._ready_s = steady_s()
        self._deadline_s = math.inf
        status.set_state(WorkerState.READY)
        return None

    def _on_context(self, message: dict[str, Any]) -> None:
        self._deadline_s = math.inf
        self._state_is_empty = True
        if message["error"]:
            self._status.publish(InstructionRefused(message["error"]))

    def _on_result(self, message: dict[str, Any]) -> WorkerFault | None:
        axes = len(self._status.facts.action_axes)
        if len(message["values"]) != axes:
            self._lose_step()
            return WorkerFault(f"worker returned {len(message['values'])} action values, expected {axes}", False)
        (step, self._step), self._deadline_s = (self._step, None), math.inf
        self._status.memory = message["memory"]
        frame = step.order.frame
        result = StepResult(
            # JSON has no NaN, but Python's writes and reads it: the gate refuses values that are not finite.
            values=tuple(float(value) for value in message["values"]),
            stamp_s=frame.stamp_s,
            received_s=frame.received_s,
            captured_s=frame.captured_s,
            started_s=step.started_s,
            loaded_s=step.loaded_s,
            finished_s=steady_s(),
            step_s=message["step_s"],
            first_of_state=self._state_is_empty,
        )
        self._state_is_empty = False
        if self._mailbox.step_finished(step.order, result):
            self._status.notify()
        return None

    def _on_step_failed(self, message: dict[str, Any]) -> None:
        self._step, self._deadline_s = None, math.inf
        self._state_is_empty = True
        self._mailbox.step_failed(message["message"])
        self._status.notify()

    def _on_failed(self, message: dict[str, Any]) -> WorkerFault:
        """Return the worker's own reason; a checkpoint that does not load will not load at a restart either."""
        self._lose_step()
        return WorkerFault(message["message"], message["final"])

    def _lose_step(self) -> None:
        """Count the frame of a step that will have no result."""
        if self._step is not None:
            self._mailbox.step_lost("worker_fault")
            self._step = None
