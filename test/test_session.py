"""NodeSession: nodes are started, watched and ended in order, whatever ends the session."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.session import NodeSession

pytest.importorskip("rclpy")

REPOSITORY = Path(__file__).resolve().parent.parent

#: Modules that are started as nodes; they need no ROS.
MODULES = {
    "runs": "import signal; print('started', flush=True); signal.pause()",
    "fails": "print('[INFO] [1.5] [fails]: hello'); raise SystemExit('[ERROR] [1.6] [fails]: the disk is full')",
}


class Graph:
    """A graph on which nothing arrives."""

    advice = "no image"

    def __init__(self) -> None:
        self.closed_s = None

    def wait_until(self, condition: Callable[[], bool], limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        while not (holds := condition()) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        return holds

    def close(self) -> None:
        self.closed_s = time.monotonic()


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch) -> None:
    """Keep the environment of the tests, which a session changes for its own graph; add the modules."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(os, "environ", {**os.environ, "PYTHONPATH": str(tmp_path)})


def children() -> list[psutil.Process]:
    return psutil.Process().children()


def test_a_session_has_a_private_domain_and_leaves_no_process_and_no_folder():
    before = children()
    with NodeSession("test") as session, session.interruptible():
        assert os.environ["ROS_DOMAIN_ID"] == str(session.domain_id)
        graph = session.join(Graph)
        node = session.start("vla_node", "runs", {})
        log = session.folder / "vla_node.log"
        session.wait_for("the node to start", lambda: "started" in log.read_text(), 30.0)
        folder = session.folder
    assert node.status == -signal.SIGTERM
    assert children() == before
    assert graph.closed_s is not None and not folder.exists()


def test_what_did_not_happen_is_named_with_the_nodes_advice():
    with NodeSession("test") as session:
        session.join(Graph)
        session.start("vla_node", "runs", {})
        assert not session.wait_until(lambda: False, 0.05)
        with pytest.raises(MobileVlaError, match=r"waited 0\.1 s for the moon, .* vla_node reports: no image"):
            session.wait_for("the moon", lambda: False, 0.1)


def test_a_node_that_ends_is_named_with_its_last_error_while_anything_is_awaited():
    with NodeSession("test") as session:
        session.join(Graph)
        session.start("vla_node", "fails", {})
        with pytest.raises(MobileVlaError, match=r"^vla_node ended with status 1: the disk is full$"):
            session.wait_for("motion", lambda: False, 30.0)


def test_a_node_that_ends_is_named_although_its_log_is_gone():
    with NodeSession("test") as session:
        session.join(Graph)
        node = session.start("vla_node", "fails", {})
        assert session.wait_until(lambda: True, 30.0)
        (session.folder / "vla_node.log").unlink()
        with pytest.raises(MobileVlaError, match=r"^vla_node ended with status 1: its log can't be read"):
            session.wait_for("motion", lambda: False, 30.0)
        assert node.status == 1


def test_without_a_place_for_the_logs_one_sentence_says_so(monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    with pytest.raises(MobileVlaError, match=r"no folder for logs can be made .* set TMPDIR"), NodeSession("test"):
        pass
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_node_that_was_ended_is_watched_no_more():
    with NodeSession("test") as session:
        session.join(Graph)
        first, second = session.start("first", "runs", {}), session.start("second", "runs", {})
        session.end(second)
        assert second.status is not None and first.status is None
        session.listen(0.05)
        session.end()
        assert first.status is not None
        session.listen(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_any_number_of_signals_ends_a_session_once_and_in_order(number):
    before = children()
    ended: list[str] = []
    with (
        contextlib.suppress(KeyboardInterrupt),
        NodeSession("test") as session,
        session.interruptible(),
    ):
        session.join(Graph)
        session.start("vla_node", "runs", {})
        session.callback(lambda: (os.kill(os.getpid(), number), ended.append("last opened")))
        session.wait_until(lambda: os.kill(os.getpid(), number) is not None, 30.0)
        ended.append("not interrupted")
    assert ended == ["last opened"]
    assert children() == before


def test_what_can_not_be_reserved_gives_the_signals_back(monkeypatch):
    handler = signal.getsignal(signal.SIGINT)

    def refuse() -> None:
        raise MobileVlaError("every ROS domain is in use")

    monkeypatch.setattr("mobile_vla_inference.harness.session.isolate", refuse)
    with pytest.raises(MobileVlaError, match="every ROS domain"), NodeSession("test"):
        pass
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list(Path("/tmp").glob("mobile_vla_test.*"))


#: Runs a command that sends itself SIGINT a moment after its first child process started, and again when a function is
#: called for the first time after that.
INTERRUPTED = """
import importlib, os, signal, sys, threading
from mobile_vla_inference.harness import processes
from mobile_vla_inference.tools import cli

signal.signal(signal.SIGINT, signal.default_int_handler)
module, owner, name = sys.argv[1:4]
asked = threading.Event()


def ask():
    asked.set()
    os.kill(os.getpid(), signal.SIGINT)


def again(function):
    def wrapped(*arguments, **options):
        if asked.is_set() and threading.current_thread() is threading.main_thread():
            asked.clear()
            os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **options)
    return wrapped


owner = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
setattr(owner, name, again(getattr(owner, name)))
start = processes.NodeProcess.__init__


def start_and_ask(*arguments, **options):
    processes.NodeProcess.__init__ = start
    start(*arguments, **options)
    threading.Timer(0.2, ask).start()


processes.NodeProcess.__init__ = start_and_ask
sys.exit(cli.main(sys.argv[4:]))
"""


DRILL = ("drill", "--only", "disable")
#: Every tool that starts nodes, but `replay --node`, which needs a bag (test_replay.py).
TOOLS = (DRILL, ("demo",), ("drive", "--ros"), ("bench", "node"), ("bench", "stop"))


@pytest.mark.parametrize(
    ("command", "module", "owner", "name"),
    [
        *((command, "mobile_vla_inference.harness.processes", "NodeProcess", "stop") for command in TOOLS),
        (DRILL, "rclpy.executors", "SingleThreadedExecutor", "shutdown"),
        (DRILL, "threading", "Thread", "join"),
        (DRILL, "rclpy.node", "Node", "destroy_node"),
        (DRILL, "rclpy", "", "try_shutdown"),
        (DRILL, "mobile_vla_inference.tools.drill.graph", "DrillGraph", "close"),
    ],
)
def test_ctrl_c_ends_a_tool_in_order_wherever_a_second_one_hits(tmp_path, command, module, owner, name):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, owner, name, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "terminate" not in done.stderr and "Traceback" not in done.stderr
