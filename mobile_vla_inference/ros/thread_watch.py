"""ThreadWatch: the node's own threads; if one of them fails or hangs, the node publishes zero and exits."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.exit_request import ExitRequest
from mobile_vla_inference.control.gate import STALL_S
from mobile_vla_inference.control.pulse import Pulse
from mobile_vla_inference.control.reporter import Reporter

#: How often the executor shows that it runs callbacks, and the main thread checks all threads.
WATCH_PERIOD_S = 0.1
#: A thread that has shown no work for this long hangs: the node exits.
THREAD_LIMIT_S = 2.0
#: A callback that runs this late has waited for others.
_EXECUTOR_LATE_S = 0.3
#: The callbacks that have waited are handled within this time.
_CATCH_UP_S = 1.0


class ThreadWatch:
    """Start and watch the node's pulses, watch the executor's thread, and record what failed.

    Attributes:
        exit_request: set when the node has to exit.
        failure: what made the node exit; None: nothing failed.
    """

    def __init__(self, node_name: str, reporter: Reporter, is_running: Callable[[], bool]) -> None:
        """Watch nothing yet.

        Args:
            node_name: for the error message.
            reporter: prints it.
            is_running: whether the ROS context is valid; its end also ends the threads, which is no failure.
        """
        self.exit_request = ExitRequest()
        self.failure: BaseException | None = None
        self._node_name = node_name
        self._reporter = reporter
        self._is_running = is_running
        self._pulses: dict[str, Pulse] = {}
        self._executor_seen_s = steady_s()
        self._caught_up_from_s = -math.inf

    def start_pulse(self, name: str, beat: Callable[[], object], period_s: float) -> Pulse:
        """Call `beat` each period in a thread of its own, which is watched from now on."""
        self._pulses[name] = Pulse(beat, period_s, self.fail, name=name)
        return self._pulses[name]

    def close(self) -> None:
        """End the pulses; safe to call more than once."""
        for pulse in self._pulses.values():
            pulse.close()

    def fail(self, error: BaseException) -> None:
        """Make the node stop the robot and exit, because a part of it has failed; any thread may call this."""
        if not self._is_running():
            return
        if self.failure is None:
            self.failure = error
            sentence = f"a part of the node failed, so the node exits: {type(error).__name__}: {error}"
            details = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            self._reporter.post(lambda: print(f"{details}{self._node_name}: error: {sentence}", file=sys.stderr))
        self.exit_request.set()

    def wait(self) -> None:
        """Watch the other threads until the node has to exit; runs in the main thread."""
        looked_s = steady_s()
        while not self.exit_request.wait(WATCH_PERIOD_S):
            now_s, before_s = steady_s(), looked_s
            looked_s = now_s
            if now_s - before_s > STALL_S:  # the whole process stood still: give the others time to run
                time.sleep(WATCH_PERIOD_S)
                continue
            seen_s = {name: pulse.last_beat_s for name, pulse in self._pulses.items()}
            for name, at_s in (*seen_s.items(), ("executor", self._executor_seen_s)):
                if now_s - at_s > THREAD_LIMIT_S:
                    self.fail(RuntimeError(f"thread {name} has done nothing for {now_s - at_s:.1f} s"))

    def note_executor(self) -> None:
        """Note that the executor runs a callback now, and whether it runs late; for the executor's thread."""
        now_s, before_s = steady_s(), self._executor_seen_s
        self._executor_seen_s = now_s
        if now_s - before_s > _EXECUTOR_LATE_S:
            self._caught_up_from_s = now_s

    def executor_stalls(self) -> bool:
        """Whether the executor has run no callback for so long that a stop would not be received."""
        return steady_s() - self._executor_seen_s > STALL_S

    def pulse_is_late(self, name: str) -> bool:
        """Whether a pulse has not beaten for too long, by the time of the executor's last callback."""
        return self._executor_seen_s - self._pulses[name].last_beat_s > STALL_S

    def is_catching_up_since(self, moment_s: float) -> bool:
        """Whether a message of `moment_s` may have waited while the executor ran no callback, so its order is unknown.

        True for about a second after such a stall, for messages that were handled after it.
        """
        return moment_s >= self._caught_up_from_s and steady_s() - self._caught_up_from_s < _CATCH_UP_S
