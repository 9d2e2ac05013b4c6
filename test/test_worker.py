"""PolicyWorker: frames, generations, faults, restarts, and no leaked process or descriptor."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.mailbox import Frame
from mobile_vla_inference.control.worker import PolicyWorker
from mobile_vla_inference.control.worker_events import (
    FrameRefused,
    StepResult,
    WorkerChanged,
    WorkerEvent,
    WorkerFault,
    WorkerState,
)
from mobile_vla_inference.control.worker_options import WORKER_MODULE, WorkerOptions
from mobile_vla_inference.errors import FrameError

TEST_FOLDER = Path(__file__).resolve().parent


class Watched:
    """A PolicyWorker whose events can be waited for."""

    def __init__(self, script: str, **options) -> None:
        self._news = threading.Condition()
        self.events: list[WorkerEvent] = []
        #: Raised in the supervising thread wherever it has news.
        self.notify_error: BaseException | None = None
        options = {"policy": {"path": f"/scripts/{script}"}, "module": "scripted_worker", **options}
        self.deaths: list[BaseException] = []
        self.worker = PolicyWorker(WorkerOptions(**options), self._notify, self.deaths.append)

    def _notify(self) -> None:
        if self.notify_error is not None:
            raise self.notify_error
        with self._news:
            self._news.notify_all()

    def wait_for(self, predicate, timeout_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        with self._news:
            while not predicate():
                remaining_s = deadline_s - time.monotonic()
                assert remaining_s > 0, f"not seen in {timeout_s} s; state {self.worker.state}, events {self.events}"
                self._news.wait(min(remaining_s, 0.05))
                self.events += self.worker.take_events()

    def of(self, kind: type) -> list:
        self.events += self.worker.take_events()
        return [event for event in self.events if isinstance(event, kind)]

    def ready(self) -> None:
        self.worker.start()
        self.worker.wait_until_loaded()
        assert self.worker.state is WorkerState.READY, self.worker.last_error
        self.worker.set_instruction("go")
        self.worker.allow_steps(True)

    def submit(self, value: int, stamp_s: float, loaded: threading.Event | None = None) -> None:
        def load(size_px: int, keep_aspect: bool) -> np.ndarray:
            if loaded is not None:
                loaded.set()
            return np.full((size_px, size_px, 3), value, np.uint8)

        self.worker.submit(Frame(stamp_s, steady_s(), steady_s(), load))


@pytest.fixture
def watch(monkeypatch) -> Iterator:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TEST_FOLDER), os.environ.get("PYTHONPATH", "")]))
    watched: list[Watched] = []

    def make(script: str, **options) -> Watched:
        watched.append(Watched(script, **options))
        return watched[-1]

    yield make
    for one in watched:
        one.worker.close()
        assert one.worker.pid is None


def test_the_frame_that_is_handed_over_is_the_frame_that_is_stepped(watch):
    watched = watch("ok")
    watched.ready()
    for index, value in enumerate((10, 200, 30)):
        watched.submit(value, stamp_s=1.0 + index)
        watched.wait_for(lambda count=index + 1: len(watched.of(StepResult)) == count)
    results = watched.of(StepResult)
    assert [result.values[0] for result in results] == [10.0, 200.0, 30.0]
    assert [result.values[1] for result in results] == [1.0, 2.0, 3.0], "the state is carried from step to step"
    assert [result.stamp_s for result in results] == [1.0, 2.0, 3.0]
    assert [result.first_of_state for result in results] == [True, False, False]


def test_only_the_newest_frame_waits_and_the_accounting_closes(watch):
    watched = watch("slow")
    watched.ready()
    for index in range(50):
        watched.submit(index, stamp_s=1.0 + index * 0.01)
    watched.wait_for(lambda: watched.of(StepResult) and watched.of(StepResult)[-1].values[0] == 49.0)
    counters = watched.worker.counters()
    assert counters.received == 50
    assert counters.stepped + sum(counters.dropped.values()) == 50
    assert counters.dropped["superseded"] == 50 - counters.stepped


def test_steps_keep_the_period_of_the_policy(watch):
    watched = watch("ok")
    watched.ready()
    for index in range(5):
        watched.submit(index, stamp_s=1.0 + index)
        watched.wait_for(lambda count=index + 1: len(watched.of(StepResult)) == count)
    started = [result.started_s for result in watched.of(StepResult)]
    assert all(later - earlier >= 0.05 for earlier, later in itertools.pairwise(started))


def test_a_changed_instruction_or_a_reset_resets_the_state_and_discards_the_step_under_way(watch):
    watched = watch("slow")
    watched.ready()
    loaded = threading.Event()
    watched.submit(1, stamp_s=1.0, loaded=loaded)
    assert loaded.wait(20.0), "the step is under way"
    assert watched.worker.set_instruction("go left")
    assert not watched.worker.set_instruction("go left"), "the same text again changes nothing"
    watched.submit(2, stamp_s=2.0)
    watched.wait_for(lambda: len(watched.of(StepResult)) == 1)
    assert watched.of(StepResult)[0].values == (2.0, 1.0), "the result of the older generation is discarded"
    assert watched.worker.counters().discarded_results == 1
    watched.worker.reset()
    watched.submit(3, stamp_s=3.0)
    watched.wait_for(lambda: len(watched.of(StepResult)) == 2)
    assert watched.of(StepResult)[1].values == (3.0, 1.0)


def test_after_a_flood_of_instructions_the_last_one_is_in_force(watch):
    watched = watch("follow")
    watched.ready()
    for count in range(300):
        watched.worker.set_instruction(f"go {count}")
    watched.submit(7, stamp_s=1.0)
    watched.wait_for(lambda: watched.of(StepResult))
    assert watched.of(StepResult)[-1].values == (299.0, 1.0)


@pytest.mark.parametrize(("second_stamp_s", "cause"), [(0.5, "time_backwards"), (60.0, "image_gap")])
def test_a_broken_sequence_of_images_resets_the_state(watch, second_stamp_s, cause):
    watched = watch("ok")
    watched.ready()
    watched.submit(1, stamp_s=1.0)
    watched.wait_for(lambda: len(watched.of(StepResult)) == 1)
    watched.submit(2, stamp_s=second_stamp_s)
    watched.wait_for(lambda: len(watched.of(StepResult)) == 2)
    assert watched.of(StepResult)[1].values == (2.0, 1.0)
    assert watched.worker.counters().state_resets[cause] == 1


def test_frames_that_can_not_be_stepped_are_counted_by_cause(watch):
    watched = watch("ok")
    watched.submit(1, stamp_s=1.0)
    watched.worker.start()
    watched.worker.wait_until_loaded()
    watched.submit(1, stamp_s=1.0)
    watched.worker.allow_steps(True)
    watched.submit(1, stamp_s=1.0)
    assert dict(watched.worker.counters().dropped) == {"worker_not_ready": 1, "inactive": 1, "no_instruction": 1}


def test_an_unreadable_frame_is_reported_and_the_next_one_steps(watch):
    watched = watch("ok")
    watched.ready()

    def unreadable(size_px: int, keep_aspect: bool) -> np.ndarray:
        raise FrameError("scripted: not an image")

    watched.worker.submit(Frame(1.0, steady_s(), steady_s(), unreadable))
    watched.wait_for(lambda: watched.of(FrameRefused))
    watched.submit(7, stamp_s=2.0)
    watched.wait_for(lambda: watched.of(StepResult))
    assert watched.worker.counters().dropped["unreadable"] == 1


@pytest.mark.parametrize(
    ("script", "expected"),
    [("crash", "SIGSEGV"), ("hang", "hung: a policy step took longer than 0.3 s"), ("raise", "scripted failure")],
)
def test_a_fault_is_reported_and_the_worker_is_started_again(watch, script, expected):
    watched = watch(script, step_timeout_s=0.3)
    watched.ready()
    first_pid = watched.worker.pid
    watched.submit(1, stamp_s=1.0)
    watched.wait_for(lambda: watched.of(WorkerFault))
    fault = watched.of(WorkerFault)[0]
    assert expected in fault.message
    assert not fault.final
    watched.wait_for(lambda: watched.worker.state is WorkerState.READY)
    assert watched.worker.pid != first_pid
    assert not psutil.pid_exists(first_pid)
    counters = watched.worker.counters()
    assert counters.restarts == 1
    assert counters.received == counters.stepped + sum(counters.dropped.values())


def test_a_checkpoint_that_is_cut_while_it_is_mapped_is_named(watch, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint.parent, tmp_path / "cut")
    checkpoint = folder / tiny_checkpoint.name
    watched = watch("", policy={"path": str(checkpoint), "device": "cpu"}, module=WORKER_MODULE, max_restarts=0)
    watched.ready()
    os.truncate(checkpoint, 4096)
    watched.submit(1, stamp_s=1.0)
    watched.wait_for(lambda: watched.of(WorkerFault))
    (fault,) = watched.of(WorkerFault)
    assert "SIGBUS" in fault.message
    assert "copy it again" in fault.message


def test_a_refused_checkpoint_is_final(watch):
    watched = watch("refuse")
    watched.worker.start()
    watched.worker.wait_until_loaded()
    assert watched.worker.state is WorkerState.FAILED
    assert watched.worker.last_error == "scripted refusal"


def test_it_gives_up_after_the_allowed_restarts(watch):
    watched = watch("crash", max_restarts=0)
    watched.ready()
    watched.submit(1, stamp_s=1.0)
    watched.wait_for(lambda: watched.worker.state is WorkerState.FAILED)
    assert watched.of(WorkerFault)[-1].final
    assert "gave up after 0 restarts" in watched.of(WorkerFault)[-1].message


def test_a_worker_that_was_healthy_is_started_again_however_often(watch):
    watched = watch("crash", max_restarts=1, healthy_after_s=0.0)
    watched.ready()
    for faults in (1, 2, 3):
        watched.wait_for(lambda: watched.worker.state is WorkerState.READY)
        watched.submit(1, stamp_s=float(faults))
        watched.wait_for(lambda expected=faults: len(watched.of(WorkerFault)) == expected)
    assert not any(fault.final for fault in watched.of(WorkerFault))


@pytest.mark.parametrize("change", ["scale", "checkpoint", "size", "assumed"])
def test_a_restarted_worker_that_loads_something_else_is_refused(watch, monkeypatch, tmp_path, change):
    monkeypatch.setenv("SCRIPTED_CHANGE_ONCE", str(tmp_path / "loaded"))
    monkeypatch.setenv("SCRIPTED_CHANGE", change)
    watched = watch("ok")
    watched.ready()
    psutil.Process(watched.worker.pid).kill()
    watched.wait_for(lambda: watched.of(WorkerChanged))
    named = {
        "scale": "action_scale",
        "checkpoint": "checkpoint_id",
        "size": "image_size",
        "assumed": "assumed_settings",
    }
    assert named[change] in watched.of(WorkerChanged)[0].message
    watched.wait_for(lambda: watched.worker.state is WorkerState.FAILED)
    assert named[change] in watched.worker.last_error
    watched.wait_for(lambda: watched.worker.pid is None)
    assert not watched.of(StepResult)


def test_without_a_free_descriptor_the_fault_is_reported_and_the_worker_comes_back_later(watch):
    watched = watch("ok")
    watched.ready()
    pid = watched.worker.pid
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        os.kill(pid, signal.SIGKILL)
        watched.wait_for(lambda: len(watched.of(WorkerFault)) >= 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in watched.of(WorkerFault)[1].message
    watched.wait_for(lambda: watched.worker.state is WorkerState.READY)
    assert not watched.deaths


@pytest.mark.parametrize(
    ("script", "expected"),
    [("long", "has 300"), ("garbage", "could not be run"), ("many_values", "returned 5 action values")],
)
def test_a_message_that_makes_no_sense_is_a_fault_with_a_sentence(watch, script, expected):
    watched = watch(script)
    watched.worker.start()
    if script == "many_values":
        watched.worker.wait_until_loaded()
        watched.worker.set_instruction("go")
        watched.worker.allow_steps(True)
        watched.submit(1, stamp_s=1.0)
    watched.wait_for(lambda: watched.of(WorkerFault))
    assert expected in watched.of(WorkerFault)[0].message
    assert not watched.deaths


def test_a_worker_is_not_reported_hung_for_a_time_in_which_this_process_was_stopped(watch, tmp_path):
    script = textwrap.dedent(
        """
        import sys, threading, time
        import numpy as np
        from mobile_vla_inference.control.clock import steady_s
        from mobile_vla_inference.control.mailbox import Frame
        from mobile_vla_inference.control.worker import PolicyWorker
        from mobile_vla_inference.control.worker_events import StepResult, WorkerFault
        from mobile_vla_inference.control.worker_options import WorkerOptions
        options = WorkerOptions(policy={"path": "/scripts/slow"}, module="scripted_worker", step_timeout_s=0.5)
        worker = PolicyWorker(options, lambda: None)
        worker.start()
        worker.wait_until_loaded()
        worker.set_instruction("go")
        worker.allow_steps(True)
        print(worker.pid, flush=True)
        events, stamp_s = [], 1.0
        while not any(isinstance(event, WorkerFault) for event in events):
            stamp_s += 0.1
            frame = lambda size_px, keep_aspect: np.zeros((size_px, size_px, 3), np.uint8)
            worker.submit(Frame(stamp_s, steady_s(), steady_s(), frame))
            new = worker.take_events()
            events += new
            for event in new:
                print(type(event).__name__, flush=True)
            time.sleep(0.02)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TEST_FOLDER), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "StepResult\n"
        for _ in range(3):
            # Both are stopped, so that a step is surely under way and unanswered when its time is over; the parent
            # continues first.
            psutil.Process(pid).suspend()
            psutil.Process(parent.pid).suspend()
            time.sleep(1.0)  # longer than step_timeout_s
            psutil.Process(parent.pid).resume()
            psutil.Process(pid).resume()
            assert parent.stdout.readline() == "StepResult\n"
    finally:
        parent.kill()
        parent.wait()


def open_descriptors() -> set[int]:
    """Return the descriptors of this process, without the one that lists them."""
    entries = list(Path("/proc/self/fd").iterdir())
    return {int(entry.name) for entry in entries if entry.is_symlink()}


def test_a_closed_worker_uses_no_descriptor_of_another_file(watch):
    before = open_descriptors()
    watched = watch("ok")
    watched.ready()
    own = open_descriptors() - before
    assert own
    watched.worker.close()
    assert not open_descriptors() & own
    read_fd, write_fd = os.pipe()
    for number in own - {read_fd, write_fd}:
        os.dup2(write_fd, number)  # the numbers belong to another file now
    try:
        watched.submit(1, stamp_s=1.0)
        watched.worker.set_instruction("go on")
        watched.worker.reset()
        watched.worker.allow_steps(True)
        watched.worker.close()
        os.set_blocking(read_fd, False)
        with pytest.raises(BlockingIOError):
            os.read(read_fd, 8)
    finally:
        for descriptor in {read_fd, write_fd, *own}:
            os.close(descriptor)


class SupervisionEnd(BaseException):
    """An error that no handler of errors catches."""


@pytest.mark.parametrize("error", [ZeroDivisionError(), SupervisionEnd()])
def test_a_supervision_that_dies_is_reported_as_a_final_fault(watch, error):
    watched = watch("ok")
    watched.ready()
    pid = watched.worker.pid
    watched.notify_error = error
    psutil.Process(pid).kill()
    watched.wait_for(lambda: watched.deaths)
    assert watched.deaths == [error], "reported once"
    watched.wait_for(lambda: any(fault.final for fault in watched.of(WorkerFault)))
    assert type(error).__name__ in watched.of(WorkerFault)[-1].message
    assert watched.worker.state is WorkerState.FAILED
    watched.wait_for(lambda: not psutil.pid_exists(pid))


def test_nan_reaches_the_caller_unchanged(watch):
    watched = watch("nan")
    watched.ready()
    watched.submit(1, stamp_s=1.0)
    watched.wait_for(lambda: watched.of(StepResult))
    assert np.isnan(watched.of(StepResult)[0].values[0]), "the gate refuses it; the worker must not hide it"


def test_the_worker_dies_with_its_parent_however_that_ends(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        from mobile_vla_inference.control.worker import PolicyWorker
        from mobile_vla_inference.control.worker_options import WorkerOptions
        worker = PolicyWorker(WorkerOptions(policy={"path": "/scripts/ok"}, module="scripted_worker"), lambda: None)
        worker.start()
        worker.wait_until_loaded()
        print(worker.pid, flush=True)
        time.sleep(600)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TEST_FOLDER), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    worker.wait(timeout=10)
    assert not worker.is_running()
