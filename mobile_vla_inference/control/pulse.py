"""Pulse: call a function once each period in a thread of its own, independent of the load of other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mobile_vla_inference.control.clock import steady_s


class Pulse:
    """Call `beat` each period, on the steady clock, until `close`; no event delays a beat.

    An exception in a beat ends the pulse and is passed to `failed`. Thread-safe.
    """

    def __init__(
        self, beat: Callable[[], object], period_s: float, failed: Callable[[BaseException], None], name: str = "pulse"
    ) -> None:
        """Start the thread; the first beat is one period from now.

        Args:
            beat: what to call.
            period_s: seconds from one beat to the next.
            failed: called with the exception of a beat; the thread ends afterwards.
            name: name of the thread.
        """
        self._beat = beat
        self._failed = failed
        self._changed = threading.Condition()
        self._period_s = period_s
        self._last_beat_s = steady_s()
        self._due_s = self._last_beat_s + period_s
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def last_beat_s(self) -> float:
        """When the last beat ended (before the first: when the pulse was created), steady clock."""
        return self._last_beat_s

    @property
    def period_s(self) -> float:
        """Seconds from one beat to the next; a new value counts from the last beat, the same value changes nothing."""
        return self._period_s

    @period_s.setter
    def period_s(self, period_s: float) -> None:
        with self._changed:
            self._due_s += period_s - self._period_s
            self._period_s = period_s
            self._changed.notify()

    def close(self) -> None:
        """End the thread and wait for it; safe to call more than once, not allowed in a beat."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                self._beat()
                self._last_beat_s = steady_s()
        except BaseException as error:  # of any class: without the beats nothing stops the robot in time
            self._failed(error)

    def _wait(self) -> bool:
        """Wait until a beat is due, and plan the next one; return False when closed."""
        with self._changed:
            while not self._closed:
                now_s = steady_s()
                if now_s >= self._due_s:
                    self._due_s += self._period_s
                    if self._due_s <= now_s:  # missed beats are skipped, not made up for
                        self._due_s = now_s + self._period_s
                    return True
                self._changed.wait(self._due_s - now_s)
            return False
