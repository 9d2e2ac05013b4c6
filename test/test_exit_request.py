"""ExitRequest: signal handlers set it at any moment, also while they interrupt the thread that waits for it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

from mobile_vla_inference.control.exit_request import ExitRequest

PATIENCE_S = 30.0


def test_a_request_wakes_the_waiting_thread_and_stays():
    request = ExitRequest()
    assert not request.wait(0.01)
    threading.Timer(0.05, request.set).start()
    began_s = time.monotonic()
    assert request.wait(PATIENCE_S)
    assert time.monotonic() - began_s < PATIENCE_S / 2
    assert request.is_set()
    assert request.wait(PATIENCE_S)


def test_a_request_that_is_dropped_holds_no_descriptor():
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        ExitRequest().set()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


#: A process whose second thread sends signals to the first one without a pause, from `prepare` to the end of `wait`.
UNDER_SIGNALS = """
import signal, threading
from mobile_vla_inference.control.exit_request import ExitRequest
from mobile_vla_inference.harness.interrupts import exit_on_signals

{prepare}
main = threading.main_thread().ident
going = True

def attack():
    while going:
        signal.pthread_kill(main, signal.SIGTERM)
        signal.pthread_kill(main, signal.SIGINT)

thread = threading.Thread(target=attack)
thread.start()
{wait}
going = False
thread.join()
"""


def run_under_signals(prepare: str, wait: str) -> int:
    """Run the two parts in a process of their own; return its exit status."""
    script = UNDER_SIGNALS.format(prepare=textwrap.dedent(prepare), wait=textwrap.dedent(wait))
    return subprocess.run([sys.executable, "-c", script], timeout=PATIENCE_S).returncode


def test_signals_that_interrupt_each_other_and_the_wait_never_hang_it():
    prepare = """
        current = [ExitRequest()]
        signal.signal(signal.SIGTERM, lambda *_: current[0].set())
        signal.signal(signal.SIGINT, lambda *_: current[0].set())
    """
    wait = """
        for _ in range(500):
            assert current[0].wait(10.0)
            current[0] = ExitRequest()
    """
    assert run_under_signals(prepare, wait) == 0


def test_signals_that_interrupt_each_other_and_the_wait_never_hang_a_tool():
    prepare = """
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
    """
    wait = """
        for _ in range(200):
            with exit_on_signals() as request:
                assert request.wait(10.0)
    """
    assert run_under_signals(prepare, wait) == 0
