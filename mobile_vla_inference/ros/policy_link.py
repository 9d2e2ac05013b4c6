"""PolicyLink: the node's policy worker, which exists between configure and cleanup only."""

from __future__ import annotations

from collections.abc import Callable

from mobile_vla_inference.control.mailbox import Frame, WorkerCounters
from mobile_vla_inference.control.reset_cause import ResetCause
from mobile_vla_inference.control.worker import PolicyWorker
from mobile_vla_inference.control.worker_options import WorkerOptions
from mobile_vla_inference.policy_facts import PolicyFacts


class PolicyLink:
    """Pass on to the worker what concerns it; without a worker, nothing happens. Any thread may call this.

    Attributes:
        instruction: the text in force; empty: none. It stays when the worker is replaced.
    """

    def __init__(self, news: Callable[[], None], died: Callable[[BaseException], None]) -> None:
        """Begin without a worker.

        Args:
            news: called by the worker's thread when it has events or another state.
            died: called by the worker's thread with the exception that ended its supervision.
        """
        self.instruction = ""
        self._news = news
        self._died = died
        self._worker: PolicyWorker | None = None

    @property
    def worker(self) -> PolicyWorker | None:
        """The worker, if there is one."""
        return self._worker

    @property
    def facts(self) -> PolicyFacts | None:
        """The facts of the loaded policy; None before it is loaded."""
        worker = self._worker
        return worker.facts if worker is not None else None

    def load(self, options: WorkerOptions) -> PolicyWorker:
        """Start a worker with the instruction in force, and wait until it is ready, failed or stopped."""
        worker = self._worker = PolicyWorker(options, self._news, self._died)
        text = None
        # An instruction can arrive while an older one is passed on; without a lock its callback never waits.
        while text != self.instruction:
            text = self.instruction
            worker.set_instruction(text)
        worker.start()
        worker.wait_until_loaded()
        return worker

    def release(self) -> None:
        """End the worker process; safe to call more than once."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def set_instruction(self, text: str) -> None:
        """Put a checked instruction in force; empty: none."""
        self.instruction = text
        worker = self._worker
        if worker is not None:
            worker.set_instruction(text)

    def set_step_timeout(self, step_timeout_s: float) -> None:
        """Change after how many seconds a step counts as a hang."""
        worker = self._worker
        if worker is not None:
            worker.step_timeout_s = step_timeout_s

    def allow_steps(self, allowed: bool) -> None:
        """Let steps happen or not; either way the LSTM state is cleared."""
        worker = self._worker
        if worker is not None:
            worker.allow_steps(allowed)

    def reset(self, cause: ResetCause) -> bool:
        """Clear the LSTM state; return whether there is a worker."""
        worker = self._worker
        if worker is not None:
            worker.reset(cause)
        return worker is not None

    def submit(self, frame: Frame) -> None:
        """Offer an image for the next step."""
        worker = self._worker
        if worker is not None:
            worker.submit(frame)

    def count_refused(self, cause: str) -> None:
        """Count an image that was refused before it became a frame."""
        worker = self._worker
        if worker is not None:
            worker.count_refused(cause)

    def counters(self) -> WorkerCounters:
        """Return what happened to the frames so far."""
        worker = self._worker
        return worker.counters() if worker is not None else WorkerCounters()
