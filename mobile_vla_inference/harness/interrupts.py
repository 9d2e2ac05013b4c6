"""Ctrl-C that ends a tool in order: everything that was opened is closed, and no second Ctrl-C interrupts this.

A process that exits with a ROS graph half open is ended by `std::terminate`, because threads of the middleware still
run when the interpreter ends.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from mobile_vla_inference.control.exit_request import ExitRequest

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Cleanup(contextlib.ExitStack):
    """An ExitStack that SIGINT, SIGTERM and SIGHUP can end, but not interrupt; for the main thread.

    The first signal raises KeyboardInterrupt, but only within `interruptible` and outside `held`; a signal at another
    time waits until then. Further signals are ignored. Use:

        with Cleanup() as cleanup, cleanup.interruptible():
            with cleanup.held():
                graph = Graph()
                cleanup.callback(graph.close)
            ...
    """

    def __init__(self) -> None:
        super().__init__()
        self._armed = False
        self._raised = False
        self._waiting = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Cleanup:
        """Take the signals over; an ignored signal stays ignored, as behind nohup."""
        for number in _SIGNALS:
            former = signal.getsignal(number)
            if former is not signal.SIG_IGN:
                self._former[number] = former
                signal.signal(number, self._on_signal)
        return super().__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        """Close everything, restore the signal handlers, and raise KeyboardInterrupt if a signal waits."""
        try:
            return super().__exit__(*error)
        finally:
            for number, former in self._former.items():
                signal.signal(number, former)
            if self._waiting and not self._raised:
                raise KeyboardInterrupt

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal raise KeyboardInterrupt within this context."""
        # A signal while this context is left raises, and the handler disarms itself.
        self._arm()
        try:
            yield
        finally:
            self._armed = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let signals wait within this context, in which something is opened and registered for closing, or closed."""
        armed, self._armed = self._armed, False
        try:
            yield
        finally:
            if armed:
                self._arm()

    def _arm(self) -> None:
        self._armed = not self._raised
        if self._waiting and self._armed:
            self._raise()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._waiting = True
        if self._armed:
            self._raise()

    def _raise(self) -> None:
        self._armed, self._raised = False, True
        raise KeyboardInterrupt


@contextlib.contextmanager
def exit_on_signals() -> Iterator[ExitRequest]:
    """Return a request that SIGINT and SIGTERM set instead of ending the process."""
    request = ExitRequest()
    numbers = (signal.SIGINT, signal.SIGTERM)
    former = [signal.signal(number, lambda *_: request.set()) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, former):
            signal.signal(number, handler)
