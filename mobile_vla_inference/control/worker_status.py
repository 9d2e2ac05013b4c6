"""WorkerStatus: what is known of the worker. WorkerControl: what its users want of the thread that supervises it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable

from mobile_vla_inference.control.mailbox import Mailbox
from mobile_vla_inference.control.worker_events import WorkerEvent, WorkerFault, WorkerState
from mobile_vla_inference.policy_facts import PolicyFacts


class WorkerStatus:
    """What is known of the worker. The supervising thread writes it, any thread may read it.

    Attributes:
        state: what the worker does.
        progress: what it does while it loads, for people.
        last_error: the sentence of the last fault; empty if there was none.
        facts: the loaded policy; None before one is loaded.
        memory: GPU memory that the worker last reported, MiB.
        process: the worker process; None while there is none.
    """

    def __init__(self, mailbox: Mailbox, notify: Callable[[], None], died: Callable[[BaseException], None]) -> None:
        """Start with a stopped worker; arguments as PolicyWorker has them."""
        self.state = WorkerState.STOPPED
        self.progress = ""
        self.last_error = ""
        self.facts: PolicyFacts | None = None
        self.memory: dict[str, float] = {}
        self.process: subprocess.Popen | None = None
        self._mailbox = mailbox
        self._notify = notify
        self._died = died
        self._changed = threading.Condition()
        self._failed = False

    @property
    def pid(self) -> int | None:
        """Process id of the worker, if one runs."""
        process = self.process
        return process.pid if process is not None and process.poll() is None else None

    def set_state(self, state: WorkerState, *, notify: bool = True) -> None:
        """Change the state; the mailbox accepts frames in READY only."""
        self._mailbox.set_worker_ready(state is WorkerState.READY)
        with self._changed:
            self.state = state
            self._changed.notify_all()
        if notify:
            self._notify()

    def set_progress(self, text: str) -> None:
        """Show what the worker does while it loads."""
        self.progress = text
        self._notify()

    def publish(self, event: WorkerEvent) -> None:
        """Pass an event on to the node."""
        self._mailbox.post(event)
        self._notify()

    def notify(self) -> None:
        """Let the node look for events."""
        self._notify()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Block until a change of the state finds `condition` true."""
        with self._changed:
            self._changed.wait_for(condition)

    def fail(self, error: BaseException) -> None:
        """Report, once, that the supervision itself has ended by an error: a final fault."""
        if self._failed:
            return
        self._failed = True
        self.last_error = f"the worker's supervision failed: {describe_error(error)}"
        self._mailbox.post(WorkerFault(self.last_error, True))
        self.set_state(WorkerState.FAILED, notify=False)
        self._died(error)


class WorkerControl:
    """What the worker's users want of the supervising thread. Thread-safe, and harmless after `close`.

    A selector can wait for it: it is readable from `wake_up` until `clear`.

    Attributes:
        stopping: whether the supervision shall end.
        step_timeout_s: a step that takes longer counts as a hang; may change while the worker runs.
    """

    def __init__(self, step_timeout_s: float) -> None:
        self.stopping = False
        self.step_timeout_s = step_timeout_s
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Guards the descriptor: after `close` its number may belong to another file.
        self._lock = threading.Lock()
        self._closed = False

    def fileno(self) -> int:
        """Return the descriptor that a selector waits for."""
        return self._wake_fd

    def stop(self) -> None:
        """Let the supervision end."""
        self.stopping = True
        self.wake_up()

    def wake_up(self) -> None:
        """Let the supervising thread look at the mailbox."""
        with self._lock, contextlib.suppress(BlockingIOError):  # it is awake already
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def clear(self) -> None:
        """Take note of all calls of `wake_up` so far."""
        os.eventfd_read(self._wake_fd)

    def close(self) -> None:
        """Release the descriptor; safe to call more than once."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._wake_fd)


def describe_error(error: BaseException) -> str:
    """Return an exception as part of a sentence, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
