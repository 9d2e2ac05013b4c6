"""The executable `vla_node`: starts VlaNode and its executor, and ends both with a final zero."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import TransitionCallbackReturn

from mobile_vla_inference.control.exit_request import ExitRequest
from mobile_vla_inference.control.output_pump import OutputPump
from mobile_vla_inference.control.worker_options import WORKER_MODULE
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.ros.executor import NodeExecutor, RequestError
from mobile_vla_inference.ros.motion import MotionControl
from mobile_vla_inference.ros.startup import start_ros
from mobile_vla_inference.ros.vla_node import NODE_NAME, VlaNode

#: How long the process may take to exit in all once the final zero is published.
_EXIT_LIMIT_S = 15.0
#: How long an exiting process waits for the reader of its output.
_OUTPUT_LIMIT_S = 0.5


def main(
    args: list[str] | None = None,
    worker_module: str = WORKER_MODULE,
    motion_type: type[MotionControl] = MotionControl,
) -> int:
    """Run the node until SIGINT, SIGTERM or SIGHUP.

    Args:
        args: like sys.argv, the default.
        worker_module: the module that runs as the policy worker.
        motion_type: the path to the base; `mobile_vla bench` uses one that keeps times.

    Returns:
        the exit status: 0; 2 if the node could not start, 1 if a part of it failed.
    """
    output = OutputPump()
    output.start()
    try:
        return _run(args, output, lambda: VlaNode(output, worker_module, motion_type))
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        output.close(_OUTPUT_LIMIT_S)


def _run(args: list[str] | None, output: OutputPump, make_node: Callable[[], VlaNode]) -> int:
    interrupted = ExitRequest()
    # rclpy's own handlers would invalidate the context before the final zero could be published.
    _on_signals(interrupted)
    try:
        start_ros(NODE_NAME, "Camera images and an instruction in, velocity commands out.", args, output)
        node = make_node()
    except MobileVlaError as error:
        print(f"{NODE_NAME}: error: {error}", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    threads = node.threads
    _on_signals(threads.exit_request)
    if interrupted.is_set():
        threads.exit_request.set()
    executor = NodeExecutor(node.transitions)
    executor.add_node(node)
    failed = threading.Event()
    spinner = threading.Thread(target=_spin, args=(executor, node), name="executor", daemon=True)
    spinner.start()
    if node.autostart:
        threading.Thread(target=_autostart, args=(node, failed), name="autostart", daemon=True).start()
    threads.wait()
    node.motion.publish_final_zero()
    status = 1 if threads.failure is not None else 2 if failed.is_set() else 0
    _exit_in_time(status, output)
    node.close()
    executor.shutdown(timeout_sec=1.0)
    spinner.join()
    node.destroy_node()
    rclpy.try_shutdown()
    return status


def _on_signals(request: ExitRequest) -> None:
    """Request the end on Ctrl-C, on SIGTERM, and when the terminal closes unless `nohup` ignores that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: request.set())


def _autostart(node: VlaNode, failed: threading.Event) -> None:
    """Configure and activate; if that is refused, set `failed` and end the node, so that `ros2 run` exits."""
    exit_request = node.threads.exit_request
    try:
        succeeded = all(
            transition() == TransitionCallbackReturn.SUCCESS
            for transition in (node.trigger_configure, node.trigger_activate)
        )
    except RuntimeError as error:  # another transition was requested meanwhile
        node.log.say("error", f"autostart failed: {error}")
        succeeded = False
    if not succeeded:
        if not exit_request.is_set():
            failed.set()
        exit_request.set()


def _exit_in_time(status: int, output: OutputPump) -> None:
    """End the process after a time limit, even if one of its threads or its worker hangs; the zero is published."""

    def end() -> None:
        output.close(_OUTPUT_LIMIT_S)
        os._exit(status or 1)

    timer = threading.Timer(_EXIT_LIMIT_S, end)
    timer.daemon = True
    timer.start()


def _spin(executor: NodeExecutor, node: VlaNode) -> None:
    """Run the callbacks until the executor is shut down; if anything else ends that, end the node with a zero."""
    while True:
        try:
            executor.spin()
            node.threads.exit_request.set()
            return
        except ExternalShutdownException:  # the context was shut down from outside
            node.threads.exit_request.set()
            return
        except RequestError as error:
            node.log.say("error", str(error))
        except BaseException as error:
            node.threads.fail(error)
            return


if __name__ == "__main__":
    raise SystemExit(main())
