"""`mobile_vla play`: publish a bag on the ROS graph with `/clock`, on machines without `ros2 bag`.

Recorded velocities are published below `/recorded`, never on their own topic unless a remap says so: a robot that
listens to cmd_vel must not drive because somebody looks at a recording.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobile_vla_inference.bags.reader import TWIST, TWIST_STAMPED, BagReader
from mobile_vla_inference.border import MobileVlaError
from mobile_vla_inference.tools.arguments import positive_number, time_s
from mobile_vla_inference.tools.demo import require_rclpy

HELP = "publish a bag on the ROS graph, with /clock"

RECORDED_PREFIX = "/recorded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bag", type=Path, metavar="BAG", help="a bag: folder, .mcap or .db3")
    parser.add_argument(
        "--rate",
        type=positive_number,
        default=1.0,
        metavar="R",
        help="times as fast as recorded (default: %(default)g)",
    )
    parser.add_argument("--loop", action="store_true", help="begin again at the end, until stopped")
    parser.add_argument(
        "--start-offset", type=time_s, default=0.0, metavar="S", help="leave out the first seconds of the bag"
    )
    parser.add_argument(
        "--remap",
        type=_remap,
        action="append",
        default=[],
        metavar="OLD:=NEW",
        help=f"publish a topic under another name; velocities go below {RECORDED_PREFIX} unless remapped",
    )
    parser.add_argument(
        "--wait",
        type=time_s,
        default=1.0,
        metavar="S",
        help="begin when every topic has a listener, or after so long (default: %(default)g)",
    )
    parser.add_argument("--topics", nargs="+", metavar="T", help="only these topics of the bag")


def run(args: argparse.Namespace) -> int:
    """Play until the end, or until SIGINT or SIGTERM; return the exit status."""
    require_rclpy()
    with BagReader(args.bag) as bag:
        if bag.message_count == 0:
            raise MobileVlaError(f"{args.bag} holds no messages, expected a recorded drive; record it again")
        targets = graph_topics(bag, dict(args.remap), args.topics)
        with stop_event() as stop:
            _play(bag, targets, args, stop)
        for note in bag.notes:
            print(f"mobile_vla: warning: {note}", file=sys.stderr)
    return 0


def graph_topics(bag: BagReader, remaps: dict[str, str], only: list[str] | None) -> dict[str, str]:
    """Return topic in the bag -> topic on the graph; raise MobileVlaError where a topic that is named is missing."""
    names = [_absolute(name) for name in only] if only is not None else list(bag.topics)
    for name in (*names, *remaps):
        if name not in bag.topics:
            raise MobileVlaError(f"{bag.path} has no topic {name}, expected one of {', '.join(bag.topics)}; correct it")
    targets = {}
    for name in names:
        velocity = bag.topics[name].type_name in (TWIST, TWIST_STAMPED)
        targets[name] = remaps.get(name, f"{RECORDED_PREFIX}{name}" if velocity else name)
    return targets


def _play(bag: BagReader, targets: dict[str, str], args: argparse.Namespace, stop: threading.Event) -> None:
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    from mobile_vla_inference.tools.bag_graph import BagPlayer

    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = rclpy.create_node("bag_player")
        player = BagPlayer(node, bag, targets, args.rate)
        for type_name in player.not_installed:
            print(f"mobile_vla: warning: {type_name} is not installed: its topics are left out", file=sys.stderr)
        for name, target in targets.items():
            print(name if name == target else f"{name} as {target}", flush=True)
        player.wait_for_listeners(args.wait, stop)
        player.play(stop, args.start_offset)
        while args.loop and not stop.is_set():
            player.play(stop, args.start_offset)
        print(f"{player.published.total()} messages published", flush=True)
        node.destroy_node()
    finally:
        rclpy.try_shutdown()


@contextmanager
def stop_event() -> Iterator[threading.Event]:
    """Return an event that SIGINT and SIGTERM set, instead of ending the process."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    former = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, former):
            signal.signal(number, handler)


def _remap(text: str) -> tuple[str, str]:
    old, separator, new = text.partition(":=")
    if not (old and separator and new):
        raise argparse.ArgumentTypeError(f"{text} is no remap, expected OLD:=NEW")
    return _absolute(old), _absolute(new)


def _absolute(name: str) -> str:
    return name if name.startswith("/") else f"/{name}"
