"""The drill's node: vla_node as it is, with the worker that fails on demand and threads that do.

What is injected is an error in the node's own threads: in the beat of the pulse, where the executor waits for work, and
in the thread that supervises the worker. The panel says when.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from mobile_vla_inference.control.pulse import Pulse
from mobile_vla_inference.control.worker import PolicyWorker
from mobile_vla_inference.ros import node
from mobile_vla_inference.ros.executor import NodeExecutor
from mobile_vla_inference.tools.drill import worker as drill_worker
from mobile_vla_inference.tools.drill.worker import INJECTED, NODE_FAULTS, PANEL_VARIABLE, DrillPanel

_POLL_S = 0.02


class _Injected:
    """What no code of the node expects, and when it came."""

    panel: DrillPanel

    def __init__(self) -> None:
        super().__init__(INJECTED)
        # The interpreter makes the error where it raises it, in the thread that was told to: now.
        self.panel.node_fired_s = time.monotonic()


class InjectedError(_Injected, Exception):
    """An error."""


class InjectedEnd(_Injected, BaseException):
    """What ends a thread although every error is caught there."""


#: What is raised in the thread that supervises the worker, by the panel's fault.
_SUPERVISOR_FAULTS = {
    NODE_FAULTS.index("supervisor"): InjectedEnd,
    NODE_FAULTS.index("supervisor_error"): InjectedError,
}


def _raise_if_told(panel: DrillPanel, kind: str, error: Exception, *, once: bool = True) -> None:
    """Raise where the panel asks for it; `once`, or each time from then on."""
    if int(panel.node_fault) != NODE_FAULTS.index(kind):
        return
    if panel.node_fired_s == 0.0:
        panel.node_fired_s = time.monotonic()
    if once:
        panel.node_fault = 0
    raise error


def _trap_pulse(panel: DrillPanel) -> None:
    """Let a beat fail as a publisher does whose middleware has gone wrong: rclpy's RCLError is a RuntimeError."""
    make = Pulse.__init__

    @wraps(make)
    def make_trapped(self: Pulse, beat: Callable[[], object], *others: Any, **options: Any) -> None:
        def trapped_beat() -> object:
            _raise_if_told(panel, "pulse", RuntimeError(INJECTED))
            return beat()

        make(self, trapped_beat, *others, **options)

    Pulse.__init__ = make_trapped


def _trap_executor(panel: DrillPanel) -> None:
    """Let the wait for work fail: once with an error of any class, or each time as a broken middleware does."""
    wait = NodeExecutor.wait_for_ready_callbacks

    @wraps(wait)
    def trapped_wait(self: NodeExecutor, *arguments: Any, **options: Any) -> Any:
        _raise_if_told(panel, "executor", ValueError(INJECTED))
        _raise_if_told(panel, "executor_deaf", RuntimeError(INJECTED), once=False)
        return wait(self, *arguments, **options)

    NodeExecutor.wait_for_ready_callbacks = trapped_wait


def _trap_supervisor(panel: DrillPanel) -> None:
    """Let an error appear wherever the supervising thread happens to be."""
    supervise = PolicyWorker._supervise
    _Injected.panel = panel

    def watch(thread: threading.Thread) -> None:
        while thread.is_alive():
            error = _SUPERVISOR_FAULTS.get(int(panel.node_fault))
            if error is not None:
                panel.node_fault = 0
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error))
            time.sleep(_POLL_S)

    @wraps(supervise)
    def trapped_supervise(self: PolicyWorker) -> None:
        threading.Thread(target=watch, args=(threading.current_thread(),), name="trap", daemon=True).start()
        supervise(self)

    PolicyWorker._supervise = trapped_supervise


def main() -> int:
    """Run the node."""
    panel = DrillPanel(os.environ[PANEL_VARIABLE])
    panel.node_fault = panel.node_fired_s = 0
    for trap in (_trap_pulse, _trap_executor, _trap_supervisor):
        trap(panel)
    return node.main(worker_module=drill_worker.__name__)


if __name__ == "__main__":
    raise SystemExit(main())
