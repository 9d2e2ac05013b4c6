"""The parts of the drill's faults: a `Fault` is plain data with small functions on a `Rig`, the running node."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_vla_inference.control.gate import Reason
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.processes import NodeProcess
from mobile_vla_inference.tools.drill.judge import Onset
from mobile_vla_inference.tools.drill.panel import DrillPanel

if TYPE_CHECKING:
    from mobile_vla_inference.tools.drill.graph import DrillGraph

INSTRUCTION = "go around the box on the left to the cup"

#: Parameters of the node; the timeouts are the shortest that a step of STEP_S on a busy machine allows.
IMAGE_TIMEOUT_S = 0.5
STEP_TIMEOUT_S = 1.0
RESUME_WITHIN_S = 2.0
STOP_HOLD_S = 1.0
#: The speed limits: every fault is injected at full speed, and a slow robot is enough for that.
FULL_SPEED_MPS = 0.2
FULL_TURN_RADPS = 0.5
#: A step takes at least so long, longer than the limit of a stop, so that most faults happen during a step.
STEP_S = 0.15

#: How long the drill waits for an event.
EVENT_LIMIT_S = 5.0
_WORKER_LIMIT_S = 90.0


class DrillError(MobileVlaError):
    """A fault could not be injected, or the node did not do what the drill needs."""


class Recovery(Enum):
    """How the robot moves again after the fault is lifted, by design."""

    BY_ITSELF = "by itself"
    AFTER_ENABLE = "after ~/enable"
    AFTER_ACTIVATE = "after activate"
    AS_REPORTED = "by itself; after ~/enable if the gap was longer than resume_within_s"
    AFTER_RESTART = "no: until the node is configured again"
    NEVER = "no: the node exited"


@dataclass
class Rig:
    """A running node, and what the drill does to it.

    Attributes:
        node: its process.
        graph: the topics and services between the drill and the node.
        panel: the numbers shared with it and its worker.
        checkpoint: the folder that its worker loads: a copy, which a fault may change.
        worker_pid: the worker's process when the robot was brought to motion.
    """

    node: NodeProcess
    graph: DrillGraph
    panel: DrillPanel
    checkpoint: Path
    worker_pid: int = 0

    def signal_worker(self, number: signal.Signals) -> float:
        """Send a signal to the worker that loaded last; return when, or raise DrillError if it has ended."""
        sent_s = time.monotonic()
        try:
            os.kill(self.panel.worker_pid, number)
        except ProcessLookupError as error:
            raise DrillError("the worker has ended, expected it to run until the drill ends it") from error
        return sent_s

    def kill_worker(self) -> Onset:
        """Kill the worker; the fault can be known once the kernel has ended it, later the more memory it has."""
        process = os.pidfd_open(self.panel.worker_pid)
        try:
            sent_s = self.signal_worker(signal.SIGKILL)
            select.select([process], [], [], EVENT_LIMIT_S)
            return Onset(sent_s, time.monotonic() - sent_s)
        finally:
            os.close(process)

    def await_another_worker(self) -> None:
        """Wait until the node has started the worker again."""
        fault_s = time.monotonic()
        if not self.graph.wait_until(lambda: self.panel.loaded_s > fault_s, _WORKER_LIMIT_S):
            raise DrillError(f"the worker was not started again within {_WORKER_LIMIT_S:g} s")

    def await_step(self, since_s: float) -> None:
        """Wait until a step starts later than `since_s`."""
        if not self.graph.wait_until(lambda: self.panel.started_s > since_s, EVENT_LIMIT_S, poll_s=0.002):
            raise DrillError(f"no step was made within {EVENT_LIMIT_S:g} s")

    def stop_images(self) -> Onset:
        """Stop the camera."""
        self.graph.camera.stop()
        return Onset(self.graph.camera.last_good_s, IMAGE_TIMEOUT_S, time.monotonic())

    def good_images(self) -> None:
        """Let the camera send good images again."""
        self.graph.camera.start()

    def set_parameters(self, **values: bool | float) -> None:
        """Set parameters of the node; raise DrillError if it refuses one."""
        for name, value in values.items():
            answer = self.graph.set_parameter(name, value)
            if not answer.successful:
                raise DrillError(f"parameter {name} can't be set to {value}: {answer.reason}")


def nothing_to_lift(rig: Rig) -> None:
    """Do nothing, for a fault that passes by itself."""


@dataclass(frozen=True)
class Fault:
    """One fault of the catalogue.

    Attributes:
        name: for the table and `--only`.
        injection: how it is injected, as text.
        inject: injects it and returns when it began.
        lift: ends it.
        reasons: one of these has to be the first reason of the node; empty: it may exit before it reports one.
        recovery: how the robot moves again.
        transport: the image transport of the node that it needs.
        step_s: how long a policy step takes at least.
        hold_s: how long it lasts after the first zero.
        momentary: it ends with the first zero.
        from_rest: it is injected while the robot stands, which must not start.
        repeats: how often it is injected, each time at full speed, up to the first miss.
        latched_s: how long a latched robot has to stand although the fault is lifted.
        last_reasons: with AFTER_RESTART, one of these is in force after `~/enable` was refused.
        expected_text: the node has to report it in its status, its diagnostics or its log, or in its last error if it
            exits.
        exits_with_error: the node has to exit with a status above 0.
    """

    name: str
    injection: str
    inject: Callable[[Rig], Onset]
    lift: Callable[[Rig], None]
    reasons: tuple[Reason, ...]
    recovery: Recovery = Recovery.BY_ITSELF
    transport: str = "raw"
    step_s: float = STEP_S
    hold_s: float = 0.4
    momentary: bool = False
    from_rest: bool = False
    repeats: int = 1
    latched_s: float = 0.4
    last_reasons: tuple[Reason, ...] = ()
    expected_text: str = ""
    exits_with_error: bool = False
