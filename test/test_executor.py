"""NodeExecutor: one callback after the other, a blocking group in threads of its own, failures raised by spin."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("rclpy")
import rclpy
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.context import Context
from rclpy.executors import Executor, SingleThreadedExecutor
from std_srvs.srv import Trigger

from mobile_vla_inference.ros.executor import NodeExecutor, RequestError

PATIENCE_S = 20.0


class Bench:
    """A node with two guard conditions, one for each group, and the executor that runs it."""

    def __init__(self) -> None:
        self.context = Context()
        self.context.init()
        self.node = rclpy.create_node("bench", context=self.context)
        self.blocking, self.plain = ReentrantCallbackGroup(), MutuallyExclusiveCallbackGroup()
        self.executor = NodeExecutor(self.blocking, context=self.context)
        self.executor.add_node(self.node)

    def spin(self) -> threading.Thread:
        thread = threading.Thread(target=self.executor.spin, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        self.executor.shutdown(timeout_sec=PATIENCE_S)
        self.node.destroy_node()
        self.context.try_shutdown()


def spin_past_spin_once(executor: Executor) -> None:
    """Spin as rclpy does from 7.1.9 (Jazzy), 9.1.5 (Kilted) and 10.0.1 (Lyrical) on: `spin_once` has no part in it."""
    while executor.context.ok() and not executor._is_shutdown:
        SingleThreadedExecutor.spin_once(executor)


@pytest.fixture(params=["installed", "past spin_once"])
def bench(request, monkeypatch):
    if request.param == "past spin_once":
        monkeypatch.setattr(Executor, "spin", spin_past_spin_once)
    made = Bench()
    yield made
    made.close()


def test_a_callback_that_blocks_delays_no_other(bench):
    entered, release, ran = threading.Event(), threading.Event(), threading.Event()
    threads = {}

    def block() -> None:
        threads["blocking"] = threading.current_thread()
        entered.set()
        assert release.wait(PATIENCE_S)

    def quick() -> None:
        threads["plain"] = threading.current_thread()
        ran.set()

    slow = bench.node.create_guard_condition(block, callback_group=bench.blocking)
    fast = bench.node.create_guard_condition(quick, callback_group=bench.plain)
    spinner = bench.spin()
    slow.trigger()
    assert entered.wait(PATIENCE_S)
    fast.trigger()
    assert ran.wait(PATIENCE_S)
    assert threads["plain"] is spinner
    assert threads["blocking"] is not spinner
    release.set()


@pytest.mark.parametrize("group", ["blocking", "plain"])
def test_what_a_callback_raises_comes_out_of_spin(bench, group):
    def fail() -> None:
        raise RuntimeError("no such transition")

    guard = bench.node.create_guard_condition(fail, callback_group=getattr(bench, group))
    guard.trigger()
    with pytest.raises(RuntimeError, match="no such transition"):
        bench.executor.spin()


def test_waiting_ends_when_the_executor_is_shut_down(bench):
    spinner = bench.spin()
    bench.executor.shutdown(timeout_sec=PATIENCE_S)
    spinner.join(PATIENCE_S)
    assert not spinner.is_alive()


@pytest.mark.parametrize("group", ["blocking", "plain"])
@pytest.mark.parametrize(("error", "expected"), [(RuntimeError, RequestError), (ValueError, ValueError)])
def test_a_request_that_can_not_be_answered_is_not_a_fault_of_the_node(bench, group, error, expected):
    def answer(request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        raise error("no such transition")

    bench.node.create_service(Trigger, "ask", answer, callback_group=getattr(bench, group))
    client = bench.node.create_client(Trigger, "ask")
    assert client.wait_for_service(PATIENCE_S)
    client.call_async(Trigger.Request())
    with pytest.raises(expected, match="no such transition"):
        bench.executor.spin()
