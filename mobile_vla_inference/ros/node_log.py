"""NodeLog: the node's log; sentences go through the reporter, because logging can block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.reporter import Reporter

#: One line for each severity: rclpy ties a severity to the line that logs.
_WRITE: dict[str, Callable[[Any, str], object]] = {
    "info": lambda logger, text: logger.info(text),
    "warning": lambda logger, text: logger.warning(text),
    "error": lambda logger, text: logger.error(text),
}


class NodeLog:
    """Log sentences of severity `info`, `warning` or `error`. Any thread may call `say` and `say_once`."""

    def __init__(self, logger: Any, reporter: Reporter) -> None:
        self._logger = logger
        self._reporter = reporter
        self._said_s: dict[str, float] = {}

    def say(self, severity: str, text: str) -> None:
        """Log a sentence in the reporter's thread, after all earlier reports."""
        self._reporter.post(lambda: self.write(severity, text))

    def say_once(self, every_s: float, kind: str, severity: str, text: str) -> None:
        """Log a sentence unless one of its kind was logged in the last `every_s` seconds."""
        now_s = steady_s()
        if now_s - self._said_s.get(kind, -math.inf) >= every_s:
            self._said_s[kind] = now_s
            self.say(severity, text)

    def write(self, severity: str, text: str) -> None:
        """Log a sentence now; for the reporter's own thread, because this can block."""
        _WRITE[severity](self._logger, text)
