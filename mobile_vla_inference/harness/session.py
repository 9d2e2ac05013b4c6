"""Nodes as child processes on a ROS 2 graph: started together, watched while something is awaited, ended in order."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.domain import isolate, require_rclpy
from mobile_vla_inference.harness.interrupts import Cleanup
from mobile_vla_inference.harness.processes import ChildProcess, NodeProcess

if TYPE_CHECKING:
    from mobile_vla_inference.harness.node_listener import NodeListener

_STOP_LIMIT_S = 10.0

Process = TypeVar("Process", bound=ChildProcess)
Graph = TypeVar("Graph", bound="NodeListener")


class NodeSession(Cleanup):
    """Nodes on a graph of their own, with a folder for their logs. What was started last ends first.

    A signal (Ctrl-C) raises KeyboardInterrupt once, within `interruptible`; no signal interrupts the end. Use:

        with NodeSession("demo") as session, session.interruptible():
            session.start("vla_node", "mobile_vla_inference.ros.node", parameters)
            graph = session.join(lambda: NodeListener("demo", "vla_node"))
            session.wait_for("the policy to be loaded", lambda: graph.reason != "", limit_s=60.0)

    Attributes:
        folder: for logs and other files, removed at the end.
        domain_id: the private ROS domain; None on the graph that the environment names.
    """

    def __init__(self, name: str, *, isolated: bool = True) -> None:
        """Prepare a session.

        Args:
            name: of the tool; the folder is named after it.
            isolated: use a private domain on this machine; else the graph that the environment names.
        """
        super().__init__()
        self.domain_id: int | None = None
        self._name = name
        self._isolated = isolated
        self._processes: list[ChildProcess] = []
        self._graph: NodeListener | None = None

    def __enter__(self) -> NodeSession:
        """Take the signals over, reserve a domain and make the folder.

        Raises:
            MobileVlaError: rclpy, a free domain or a place for the folder is missing.
        """
        require_rclpy()
        with contextlib.ExitStack() as undo:
            undo.push(super().__enter__())
            if self._isolated:
                reservation = isolate()
                self.callback(reservation.close)
                self.domain_id = reservation.domain_id
            self.folder = Path(self.enter_context(self._make_folder()))
            undo.pop_all()
        return self

    def _make_folder(self) -> tempfile.TemporaryDirectory:
        try:
            return tempfile.TemporaryDirectory(prefix=f"mobile_vla_{self._name}.")
        except OSError as error:
            raise MobileVlaError(
                f"no folder for logs can be made ({error}), expected a temporary folder to write to; set TMPDIR to one"
            ) from error

    def start(
        self,
        name: str,
        module: str,
        parameters: Mapping[str, str | float],
        remappings: Mapping[str, str] | None = None,
        *,
        piped: bool = False,
    ) -> NodeProcess:
        """Start a node (see NodeProcess) and watch it; its log is `<name>.log` in the folder."""
        return self.add(
            lambda: NodeProcess(name, module, parameters, self.folder / f"{name}.log", remappings, piped=piped)
        )

    def add(self, start: Callable[[], Process]) -> Process:
        """Start a ChildProcess and watch it until `end`."""
        with self.held():
            process = start()
            self._processes.append(process)
            self.callback(self.end, process)
        return process

    def join(self, open_graph: Callable[[], Graph]) -> Graph:
        """Open the session's own node, a NodeListener, by which `wait_for` and `wait_until` wait."""
        with self.held():
            self._graph = open_graph()
            self.callback(self._graph.close)
        return self._graph

    def end(self, *processes: ChildProcess) -> None:
        """End processes, the last one first; without arguments all that still run."""
        with self.held():
            for process in reversed(processes or tuple(self._processes)):
                process.stop(_STOP_LIMIT_S)
                if process in self._processes:
                    self._processes.remove(process)

    def require_running(self) -> None:
        """Raise MobileVlaError, with the last error in its log, if a process has ended."""
        for process in self._processes:
            if (fault := process.fault()) is not None:
                raise MobileVlaError(fault)

    def wait_until(
        self, condition: Callable[[], bool], limit_s: float, *, meanwhile: Callable[[], object] = lambda: None
    ) -> bool:
        """Receive messages until a condition holds; return False after `limit_s`.

        Args:
            condition: what is awaited.
            limit_s: how long, in seconds.
            meanwhile: called at each look at the condition, such as to show progress.

        Raises:
            MobileVlaError: a process has ended.
        """

        def holds() -> bool:
            self.require_running()
            meanwhile()
            return condition()

        return self._graph.wait_until(holds, limit_s)

    def wait_for(
        self,
        what: str,
        condition: Callable[[], bool],
        limit_s: float,
        *,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        """Receive messages until a condition holds, as `wait_until` does.

        Raises:
            MobileVlaError: a process has ended, or `what` did not happen within `limit_s`.
        """
        if not self.wait_until(condition, limit_s, meanwhile=meanwhile):
            raise MobileVlaError(
                f"waited {limit_s:g} s for {what}, expected it within this time; vla_node reports: {self._graph.advice}"
            )

    def listen(self, duration_s: float, *, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Receive messages for a time; raise MobileVlaError if a process has ended."""
        self.wait_until(lambda: False, duration_s, meanwhile=meanwhile)
