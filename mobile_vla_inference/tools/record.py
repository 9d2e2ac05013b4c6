"""`mobile_vla record`: write images, instruction, cmd_vel and diagnostics to a bag until SIGINT or SIGTERM.

Topics that appear on the graph later are recorded, too. The bag is written in place and committed once a second, so
that it survives even a power cut; a stop closes it properly.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_vla_inference.bags.reader import COMPRESSED_IMAGE, IMAGE, STRING, TWIST, TWIST_STAMPED, BagError
from mobile_vla_inference.bags.writer import STORAGES, BagWriter
from mobile_vla_inference.control.exit_request import ExitRequest
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.domain import require_rclpy
from mobile_vla_inference.harness.interrupts import exit_on_signals
from mobile_vla_inference.tools.arguments import positive_number
from mobile_vla_inference.tools.results import warn

if TYPE_CHECKING:
    from rclpy.executors import Executor

    from mobile_vla_inference.harness.bag_graph import BagRecorder


DIAGNOSTICS = "diagnostic_msgs/msg/DiagnosticArray"
#: Last part of a topic's name -> the types that are recorded.
WANTED = {
    "image_raw": (IMAGE,),
    "compressed": (COMPRESSED_IMAGE,),
    "instruction": (STRING,),
    "cmd_vel": (TWIST, TWIST_STAMPED),
    "diagnostics": (DIAGNOSTICS,),
}
_LOOK_PERIOD_S = 0.5
_SPIN_S = 0.1
#: The longest time that messages are still recorded after the stop.
_DRAIN_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("out", type=Path, metavar="OUT", help="bag to write, a folder")
    parser.add_argument(
        "--storage", choices=STORAGES, default="mcap", help="storage format of the bag (default: %(default)s)"
    )
    parser.add_argument(
        "--topics", nargs="+", metavar="T", help="record these topics instead; only standard ROS 2 message types"
    )
    parser.add_argument(
        "--seconds", type=positive_number, metavar="S", help="stop after S seconds (default: at Ctrl-C)"
    )


def run(args: argparse.Namespace) -> int:
    """Record until stopped; return 0, or raise MobileVlaError if no message arrived."""
    require_rclpy()
    with exit_on_signals() as stop, BagWriter(args.out, args.storage, live=True) as writer:
        recorded = _record(writer, args, stop)
    for topic, number in sorted(recorded.items()):
        print(f"{topic}: {number}")
    if not recorded:
        raise MobileVlaError(
            f"nothing was recorded to {args.out}, expected {', '.join(args.topics or WANTED)} on the graph; "
            "check ROS_DOMAIN_ID and which nodes run"
        )
    return 0


def _record(writer: BagWriter, args: argparse.Namespace, stop: ExitRequest) -> dict[str, int]:
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.signals import SignalHandlerOptions

    from mobile_vla_inference.harness.bag_graph import BagRecorder

    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = rclpy.create_node("bag_recorder")
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        recorder = BagRecorder(node, writer)
        seen: set[str] = set()
        deadline_s = None if args.seconds is None else time.monotonic() + args.seconds
        next_look_s = 0.0
        while not stop.is_set() and (deadline_s is None or time.monotonic() < deadline_s):
            if time.monotonic() >= next_look_s:
                next_look_s = time.monotonic() + _LOOK_PERIOD_S
                _subscribe_to_new(node.get_topic_names_and_types(), recorder, args.topics, seen)
            executor.spin_once(timeout_sec=_SPIN_S)
            recorder.commit()
        _drain(executor, recorder)
        executor.shutdown()
        node.destroy_node()
        return dict(recorder.recorded)
    finally:
        rclpy.try_shutdown()


def _drain(executor: Executor, recorder: BagRecorder) -> None:
    """Write the messages that had arrived, but were not yet taken, at the stop."""
    end_s = time.monotonic() + _DRAIN_S
    recorded = -1
    while time.monotonic() < end_s and recorded != (recorded := sum(recorder.recorded.values())):
        executor.spin_once(timeout_sec=_SPIN_S)


def _subscribe_to_new(
    graph: list[tuple[str, list[str]]], recorder: BagRecorder, topics: list[str] | None, seen: set[str]
) -> None:
    """Subscribe to wanted topics that are new on the graph."""
    wanted = None if topics is None else {name if name.startswith("/") else f"/{name}" for name in topics}
    for name, types in graph:
        if name in seen or len(types) != 1:
            continue
        if name in wanted if wanted is not None else types[0] in WANTED.get(name.rpartition("/")[2], ()):
            seen.add(name)
            try:
                installed = recorder.subscribe(name, types[0])
            except BagError as error:  # a topic that can't be written must not end the recording of the others
                warn(error)
                continue
            if installed:
                print(f"recording {name} ({types[0]})", flush=True)
            else:
                warn(f"{types[0]} is not installed: {name} is not recorded")
