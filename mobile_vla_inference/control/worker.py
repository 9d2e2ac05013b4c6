"""PolicyWorker: the policy in its own process, started, watched and restarted from here.

A hang in CUDA, a segmentation fault or the OOM killer ends the worker process, never the node. One thread supervises
it: it hands over the newest frame when a step is due, receives actions, notices a crash or a hang, and starts the
process again. `mailbox` holds what is exchanged, `worker_session` is one life of the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.mailbox import Frame, Mailbox, WorkerCounters
from mobile_vla_inference.control.reset_cause import ResetCause
from mobile_vla_inference.control.worker_events import WorkerChanged, WorkerEvent, WorkerFault, WorkerState
from mobile_vla_inference.control.worker_options import WorkerOptions
from mobile_vla_inference.control.worker_session import SessionEnd, WorkerSession
from mobile_vla_inference.control.worker_status import WorkerControl, WorkerStatus, describe_error
from mobile_vla_inference.policy_facts import PolicyFacts

_RESTART_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_LOADED = (WorkerState.READY, WorkerState.FAILED, WorkerState.STOPPED)


class PolicyWorker:
    """Run the policy in a child process and keep it alive.

    Thread-safe. After `close` every call is harmless and has no effect.
    """

    def __init__(
        self, options: WorkerOptions, notify: Callable[[], None], died: Callable[[BaseException], None] = lambda _: None
    ) -> None:
        """Prepare the worker; `start` starts it.

        Args:
            options: how to start and to watch it.
            notify: called from the supervising thread whenever `take_events` or the state has news.
            died: called by the supervising thread with the error that ended it, should it ever fail itself.
        """
        self._options = options
        self._mailbox = Mailbox(options.state_gap_s)
        self._status = WorkerStatus(self._mailbox, notify, died)
        self._control = WorkerControl(options.step_timeout_s)
        self._thread: threading.Thread | None = None

    # ---- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the supervising thread and with it the worker process."""
        self._control.stopping = False
        self._status.set_state(WorkerState.LOADING, notify=False)
        self._thread = threading.Thread(target=self._run, name="policy_worker", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the worker process and its thread; safe to call more than once."""
        self._control.stop()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._status.set_state(WorkerState.STOPPED, notify=False)

    def close(self) -> None:
        """Stop, and release the file descriptor; safe to call more than once."""
        self.stop()
        self._control.close()

    def wait_until_loaded(self) -> None:
        """Block until the worker is ready, has failed for good or was stopped."""
        self._status.wait_for(lambda: self._status.state in _LOADED or self._control.stopping)

    # ---- frames and instructions ---------------------------------------------------------------------------------

    def allow_steps(self, allowed: bool) -> None:
        """Allow steps or not; either way the hidden state is reset."""
        self._mailbox.allow_steps(allowed)
        self._control.wake_up()

    def submit(self, frame: Frame) -> None:
        """Offer a frame; an older one that still waits is dropped and counted."""
        self._mailbox.submit(frame)
        self._control.wake_up()

    def count_refused(self, cause: str) -> None:
        """Count an image that was refused before it became a frame."""
        self._mailbox.count_refused(cause)

    def set_instruction(self, text: str) -> bool:
        """Put a checked instruction in force; a changed text resets the hidden state. Return whether it changed."""
        changed = self._mailbox.set_instruction(text)
        if changed:
            self._control.wake_up()
        return changed

    def reset(self, cause: ResetCause = ResetCause.REQUEST) -> None:
        """Reset the hidden state before the next step and discard the result of a step under way."""
        self._mailbox.reset(cause)
        self._control.wake_up()

    def take_events(self) -> list[WorkerEvent]:
        """Return and forget the events since the last call; results of older generations are not among them."""
        return self._mailbox.take_events()

    def counters(self) -> WorkerCounters:
        """Return a copy of the counters."""
        return self._mailbox.counters()

    # ---- status --------------------------------------------------------------------------------------------------

    @property
    def step_timeout_s(self) -> float:
        """A step that takes longer counts as a hang; may change while the worker runs."""
        return self._control.step_timeout_s

    @step_timeout_s.setter
    def step_timeout_s(self, limit_s: float) -> None:
        self._control.step_timeout_s = limit_s

    @property
    def state(self) -> WorkerState:
        """What the worker does."""
        return self._status.state

    @property
    def pid(self) -> int | None:
        """Process id of the worker, if one runs."""
        return self._status.pid

    @property
    def facts(self) -> PolicyFacts | None:
        """The loaded policy; None before one is loaded."""
        return self._status.facts

    @property
    def memory(self) -> dict[str, float]:
        """GPU memory that the worker last reported, MiB."""
        return self._status.memory

    @property
    def progress(self) -> str:
        """What the worker does while it loads, for people."""
        return self._status.progress

    @property
    def last_error(self) -> str:
        """The sentence of the last fault; empty if there was none."""
        return self._status.last_error

    # ---- the supervising thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        """Supervise, and report whatever ends that: a worker that nobody watches must not move a robot."""
        try:
            self._supervise()
        except BaseException as error:
            self._status.fail(error)

    def _supervise(self) -> None:
        """Start the worker, again after faults, until stopped or given up."""
        attempt = 0
        while not self._control.stopping:
            self._status.set_state(WorkerState.LOADING)
            with WorkerSession(self._options, self._control, self._mailbox, self._status) as session:
                try:
                    end = session.run()
                except Exception as error:  # no free descriptor, a message that makes no sense, whatever else
                    end = WorkerFault(f"worker could not be run: {describe_error(error)}", False)
                if self._control.stopping or end is None:
                    return
                if session.ready_for_s >= self._options.healthy_after_s:
                    attempt = 0
                # Reported before the process is ended: the kernel takes its time to free gigabytes, and until the
                # fault is known the robot moves on.
                final = self._report_end(end, attempt)
            if final:
                return
            delay_s = _RESTART_DELAYS_S[min(attempt, len(_RESTART_DELAYS_S) - 1)]
            attempt += 1
            self._mailbox.count_restart()
            self._sleep(delay_s)

    def _report_end(self, end: SessionEnd, attempt: int) -> bool:
        """Publish why a session ended; return whether the worker is given up."""
        status = self._status
        status.last_error = end.message
        if isinstance(end, WorkerChanged):
            self._mailbox.post(end)
            status.set_state(WorkerState.FAILED)
            return True
        # A policy that never loaded is not tried again.
        final = end.final or status.facts is None or attempt >= self._options.max_restarts
        message = end.message
        if final and not end.final and status.facts is not None:
            message = f"{message}; gave up after {attempt} restarts"
        self._mailbox.post(WorkerFault(message, final))
        status.set_state(WorkerState.FAILED if final else WorkerState.RESTARTING)
        return final

    def _sleep(self, duration_s: float) -> None:
        """Wait, but return at once when stopped."""
        deadline_s = steady_s() + duration_s
        while not self._control.stopping and (remaining_s := deadline_s - steady_s()) > 0:
            time.sleep(min(remaining_s, 0.05))
