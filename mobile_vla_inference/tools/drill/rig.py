"""What the drill's faults are made of: a `Fault` is plain data with small functions on a `Rig`, the running node."""

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
from mobile_vla_inference.tools.drill.worker import DrillPanel

if TYPE_CHECKING:
    from mobile_vla_inference.tools.drill.graph import DrillGraph

INSTRUCTION = "go around the box on the left to the cup"

#: What the drill gives the node; the timeouts are the shortest that a step of STEP_S on a busy machine allows.
IMAGE_TIMEOUT_S = 0.5
STEP_TIMEOUT_S = 1.0
RESUME_WITHIN_S = 2.0
STOP_HOLD_S = 1.0
#: How fast the robot is to be, so that every fault meets it at full speed and it needs little room on its blocks.
FULL_SPEED_MPS = 0.2
FULL_TURN_RADPS = 0.5
#: A step takes at least so long, longer than the node may take to stop: a result is under way at most faults.
STEP_S = 0.15

#: How long something that has to happen is waited for.
EVENT_LIMIT_S = 5.0
_WORKER_LIMIT_S = 90.0


class DrillError(MobileVlaError):
    """A fault could not be injected, or the node does not do what the drill needs."""


class Recovery(Enum):
    """How the robot comes back to motion after the fault is lifted, by design."""

    BY_ITSELF = "by itself"
    AFTER_ENABLE = "after ~/enable"
    AFTER_ACTIVATE = "after activate"
    AS_TOLD = "by itself, or after ~/enable where the status says latched"
    AFTER_RESTART = "no: until the node is started again"
    NEVER = "no: the node left"


@dataclass
class Rig:
    """A running node and everything that can be done to it.

    Attributes:
        node: its process.
        graph: what is sent to it and comes from it.
        panel: what is shared with it and its worker.
        checkpoint: the file that its worker loads: a copy of the drill's own, that a fault may change.
        worker_pid: the worker's process when the robot was brought to motion.
    """

    node: NodeProcess
    graph: DrillGraph
    panel: DrillPanel
    checkpoint: Path
    worker_pid: int = 0

    def signal_worker(self, number: signal.Signals) -> float:
        """Send a signal to the worker that loaded last; return when, or raise DrillError where it has ended."""
        sent_s = time.monotonic()
        try:
            os.kill(int(self.panel.worker_pid), number)
        except ProcessLookupError as error:
            raise DrillError("the worker was ended before its time") from error
        return sent_s

    def kill_worker(self) -> Onset:
        """Kill the worker; nobody can know before the kernel has ended it, which takes longer the more it holds."""
        process = os.pidfd_open(int(self.panel.worker_pid))
        try:
            sent_s = self.signal_worker(signal.SIGKILL)
            select.select([process], [], [], EVENT_LIMIT_S)
            return Onset(sent_s, time.monotonic() - sent_s)
        finally:
            os.close(process)

    def await_another_worker(self) -> None:
        """Wait until the node has started the worker again."""
        fault_s = time.monotonic()
        if not self.graph.wait_for(lambda: self.panel.loaded_s > fault_s, _WORKER_LIMIT_S):
            raise DrillError(f"the worker was not started again within {_WORKER_LIMIT_S:g} s")

    def await_step(self, since_s: float) -> None:
        """Wait until a step starts that started later than `since_s`."""
        if not self.graph.wait_for(lambda: self.panel.started_s > since_s, EVENT_LIMIT_S, poll_s=0.002):
            raise DrillError(f"no step was made within {EVENT_LIMIT_S:g} s")

    def stop_images(self) -> Onset:
        """Let the camera fall silent."""
        self.graph.camera.stop()
        return Onset(self.graph.camera.last_good_s, IMAGE_TIMEOUT_S, time.monotonic())

    def good_images(self) -> None:
        """Let the camera send good images again."""
        self.graph.camera.start()

    def set_parameters(self, **values: bool | float) -> None:
        """Set parameters of the node; raise DrillError where it refuses one."""
        for name, value in values.items():
            answer = self.graph.set_parameter(name, value)
            if not answer.successful:
                raise DrillError(f"parameter {name} can't be set to {value}: {answer.reason}")


def leave(rig: Rig) -> None:
    """Leave a fault to pass by itself."""


@dataclass(frozen=True)
class Fault:
    """One fault of the catalogue.

    Attributes:
        name: for the table and `--only`.
        injection: how it is injected, for people.
        inject: brings it about and returns when it began.
        lift: takes it away again.
        reasons: one of these has to be the first that the node gives; empty: it may leave before it gives one.
        recovery: how motion comes back.
        transport: the image transport of the node that it needs.
        step_s: how long a policy step takes at least.
        hold_s: how long it stays after the first zero.
        momentary: it is over with the first zero.
        from_rest: it is injected into a robot that has not moved yet, and must not start.
        repeats: how often it is injected, each time into a robot at full speed; the first miss ends that.
        latched_s: how long a latched robot has to keep still although nothing is wrong any more.
        last_reasons: after AFTER_RESTART, one of these is in force once `~/enable` was asked for in vain.
        tells: what the node has to say in its status, its diagnostics or its log, or as its last error where it leaves.
        leaves_with_error: the node has to leave with an exit status above 0.
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
    tells: str = ""
    leaves_with_error: bool = False
