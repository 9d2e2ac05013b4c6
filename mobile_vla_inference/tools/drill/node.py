"""The drill's node: vla_node as it is, whose worker and threads fail on demand.

Errors are injected into the node's own threads: into the beat of the pulse, where the executor waits for work, and into
the thread that supervises the worker. The panel says when.
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
from mobile_vla_inference.tools.drill import worker
from mobile_vla_inference.tools.drill.panel import INJECTED, NODE_FAULTS, PANEL_VARIABLE, DrillPanel

_POLL_S = 0.02


class _Injected:
    """An error that no code of the node expects; it notes when it was raised."""

    panel: DrillPanel

    def __init__(self) -> None:
        super().__init__(INJECTED)
        # The interpreter makes the error in the thread that raises it: now.
        self.panel.node_fired_s = time.monotonic()


class InjectedError(_Injected, Exception):
    """An error."""


class InjectedEnd(_Injected, BaseException):
    """An exception that ends a thread although every Exception is caught there."""


#: The panel's fault -> what is raised in the thread that supervises the worker.
_SUPERVISOR_FAULTS = {
    NODE_FAULTS.index("supervisor"): InjectedEnd,
    NODE_FAULTS.index("supervisor_error"): InjectedError,
}


def _raise_on_demand(panel: DrillPanel, kind: str, error: Exception, *, once: bool = True) -> None:
    """Raise if the panel asks for it: `once`, or each time from then on."""
    if panel.node_fault != NODE_FAULTS.index(kind):
        return
    if panel.node_fired_s == 0.0:
        panel.node_fired_s = time.monotonic()
    if once:
        panel.node_fault = 0
    raise error


def _trap_pulse(panel: DrillPanel) -> None:
    """Let a beat fail like a publisher with a broken middleware: rclpy's RCLError is a RuntimeError."""
    make = Pulse.__init__

    @wraps(make)
    def make_trapped(self: Pulse, beat: Callable[[], object], *others: Any, **options: Any) -> None:
        def trapped_beat() -> object:
            _raise_on_demand(panel, "pulse", RuntimeError(INJECTED))
            return beat()

        make(self, trapped_beat, *others, **options)

    Pulse.__init__ = make_trapped


def _trap_executor(panel: DrillPanel) -> None:
    """Let the wait for work fail: once with an unexpected error, or each time like a broken middleware."""
    wait = NodeExecutor.wait_for_ready_callbacks

    @wraps(wait)
    def trapped_wait(self: NodeExecutor, *arguments: Any, **options: Any) -> Any:
        _raise_on_demand(panel, "executor", ValueError(INJECTED))
        _raise_on_demand(panel, "executor_deaf", RuntimeError(INJECTED), once=False)
        return wait(self, *arguments, **options)

    NodeExecutor.wait_for_ready_callbacks = trapped_wait


def _trap_supervisor(panel: DrillPanel) -> None:
    """Raise an error in the supervising thread, wherever it is."""
    supervise = PolicyWorker._supervise
    _Injected.panel = panel

    def watch(thread: threading.Thread) -> None:
        while thread.is_alive():
            error = _SUPERVISOR_FAULTS.get(panel.node_fault)
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
    panel = DrillPanel.open(os.environ[PANEL_VARIABLE])
    panel.node_fault, panel.node_fired_s = 0, 0.0
    for trap in (_trap_pulse, _trap_executor, _trap_supervisor):
        trap(panel)
    return node.main(worker_module=worker.__name__)


if __name__ == "__main__":
    raise SystemExit(main())
