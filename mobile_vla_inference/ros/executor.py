"""NodeExecutor: runs callbacks one after the other; those of one group, which can block, each in a thread of its own.

rclpy's MultiThreadedExecutor passes every callback to a pool. With images at 30 Hz and services at 50 Hz, its threads
and the one that waits for work contend for the global interpreter lock until commands are 300 ms late, on an idle core
(docs/benchmarks.md). Here a callback needs no change of thread, and a transition that takes a minute delays nothing.
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
    """A service could not answer: the caller has exited, or (up to Jazzy) a lifecycle transition is not allowed now."""


class NodeExecutor(SingleThreadedExecutor):
    """Run callbacks in the thread that spins, and those of `blocking_group` each in a thread of its own.

    `spin` raises the exception of a callback, whichever thread it ran in. The RuntimeError of a service (rclpy's
    RCLError is one) is raised as RequestError.
    """

    def __init__(self, blocking_group: CallbackGroup, context: Context | None = None) -> None:
        """Create an executor for a node; `blocking_group` is a reentrant group of that node."""
        super().__init__(context=context)
        self._blocking_group = blocking_group
        self._failures: deque[BaseException] = deque()

    def spin(self) -> None:
        """Run callbacks until the executor or its context is shut down.

        rclpy's own `spin` calls `spin_once` in some releases and a private method in others (Jazzy from 7.1.9, Kilted
        from 9.1.5, Lyrical), which would bypass the `spin_once` below.
        """
        while self.context.ok() and self._run_next(None):
            pass

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Wait for a callback to be ready, and run it; without a timeout if None."""
        self._run_next(timeout_sec)

    def _run_next(self, timeout_sec: float | None) -> bool:
        """Do as `spin_once`; return False if the executor was shut down."""
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
