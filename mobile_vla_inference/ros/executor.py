"""The node's executor: callbacks one after the other, but those of one group, which may block, in threads of their own.

rclpy's MultiThreadedExecutor hands every callback to a pool. With images at 30 Hz and services at 50 Hz its threads and
the one that waits for work contend for the interpreter's lock until commands are late by 300 ms, on an idle core
(docs/benchmarks.md). Here a callback costs no change of thread, and a transition that loads for a minute delays nobody.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.context import Context
from rclpy.executors import ShutdownException, SingleThreadedExecutor, TimeoutException
from rclpy.service import Service


class RequestError(Exception):
    """A service could not answer: the caller is gone, or (up to Jazzy) a lifecycle transition is not allowed now."""


class NodeExecutor(SingleThreadedExecutor):
    """Run callbacks in the thread that spins, and those of `blocking_group` each in a thread of its own.

    What a callback raises comes out of `spin`, whichever thread it ran in; as RequestError, where it is the
    RuntimeError (rclpy's RCLError is one) of a service.
    """

    def __init__(self, blocking_group: CallbackGroup, context: Context | None = None) -> None:
        """Create an executor for a node; `blocking_group` is a reentrant group of that node."""
        super().__init__(context=context)
        self._blocking_group = blocking_group
        self._failures: deque[BaseException] = deque()

    def spin(self) -> None:
        """Run callbacks until the executor or its context is shut down.

        rclpy's own `spin` calls `spin_once` in some releases and a private method in others (Jazzy from 7.1.9, Kilted
        from 9.1.5, Lyrical): there it would pass over the one below.
        """
        while self.context.ok() and self._run_next(None):
            pass

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Wait for a callback to be ready, and run it; None waits for ever."""
        self._run_next(timeout_sec)

    def _run_next(self, timeout_sec: float | None) -> bool:
        """Do as `spin_once`; return whether the executor can go on, which it can't once it is shut down."""
        if self._failures:
            raise self._failures.popleft()
        try:
            handler, entity, _ = self.wait_for_ready_callbacks(timeout_sec=timeout_sec)
        except TimeoutException:
            return True
        except ShutdownException:
            return False
        if getattr(entity, "callback_group", None) is self._blocking_group:
            threading.Thread(target=self._run_apart, args=(handler, entity), name="transition", daemon=True).start()
            return True
        handler()
        if handler.exception() is not None:
            raise _failure(handler.exception(), entity)
        return True

    def _run_apart(self, handler: Any, entity: Any) -> None:
        handler()
        if handler.exception() is not None:
            self._failures.append(_failure(handler.exception(), entity))
            self.wake()


def _failure(error: BaseException, entity: Any) -> BaseException:
    if not (isinstance(entity, Service) and isinstance(error, RuntimeError)):
        return error
    failure = RequestError(f"request of {entity.srv_name} failed: {error}")
    failure.__cause__ = error
    return failure
