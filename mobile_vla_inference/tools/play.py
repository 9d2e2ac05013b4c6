"""`mobile_vla play`: publish a bag on the ROS graph with `/clock`, on machines without `ros2 bag`.

The inputs of a policy, images and instruction, are published under their own names. Every other topic is published
below `/recorded`, and on its own topic only by `--remap`: no robot must drive, move an arm or release its stop because
somebody plays a recording. For the same reason `play` refuses a graph on which a live camera or clock publishes on the
same topics, or a node would follow the instruction without receiving the recorded images.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path

from mobile_vla_inference.bags.reader import (
    COMPRESSED_IMAGE,
    IMAGE,
    STRING,
    TWIST,
    TWIST_STAMPED,
    BagMessage,
    BagReader,
    Topic,
)
from mobile_vla_inference.control.exit_request import ExitRequest
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.domain import require_rclpy
from mobile_vla_inference.harness.interrupts import exit_on_signals
from mobile_vla_inference.tools.arguments import positive_number, time_s
from mobile_vla_inference.tools.results import warn

RECORDED_PREFIX = "/recorded"

_CLOCK_TOPIC = "/clock"
#: The last part of the topic of vla_node's own images, which are not a camera's.
_DEBUG_IMAGE = "debug_image"
_INSTRUCTION = "instruction"
_CHECK_PERIOD_S = 1.0
_TOPICS_LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bag", type=Path, metavar="BAG", help="a bag: folder, .mcap or .db3")
    parser.add_argument(
        "--rate",
        type=positive_number,
        default=1.0,
        metavar="R",
        help="speed, as a multiple of the recorded one (default: %(default)g)",
    )
    parser.add_argument("--loop", action="store_true", help="start again at the end, until stopped")
    parser.add_argument(
        "--start-offset", type=time_s, default=0.0, metavar="S", help="skip the first S seconds of the bag"
    )
    parser.add_argument(
        "--remap",
        type=_remap,
        action="append",
        default=[],
        metavar="OLD:=NEW",
        help=f"publish a topic under another name, or under its own by T:=T; without it, topics other than images and "
        f"the instruction are published under {RECORDED_PREFIX}",
    )
    parser.add_argument(
        "--wait",
        type=time_s,
        default=1.0,
        metavar="S",
        help="wait up to S seconds until every topic has a subscriber (default: %(default)g)",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--topics",
        nargs="+",
        metavar="T",
        help="play these topics only (default: images, instruction, velocities and remapped topics)",
    )
    chosen.add_argument("--all-topics", action="store_true", help="play every topic except hidden ones")


def run(args: argparse.Namespace) -> int:
    """Play until the end, or until SIGINT or SIGTERM; return the exit status."""
    require_rclpy()
    with BagReader(args.bag) as bag:
        bag.check_not_empty()
        targets = graph_topics(bag, dict(args.remap), args.topics, args.all_topics)
        check_offset(bag, targets, args.start_offset)
        with exit_on_signals() as stop:
            _play(bag, targets, args, stop)
        warn(*bag.notes)
    return 0


def graph_topics(
    bag: BagReader, remaps: dict[str, str], only: list[str] | None, everything: bool = False
) -> dict[str, str]:
    """Return topic in the bag -> topic on the graph.

    Args:
        bag: an open bag.
        remaps: topic in the bag -> name on the graph; these topics are played, too.
        only: these topics; None: the inputs of a policy, and velocities.
        everything: every topic except those of services and actions.

    Raises:
        MobileVlaError: a named topic is missing, or there is nothing to play.
    """
    for name in (*map(_absolute, only or ()), *remaps):
        if name not in bag.topics:
            raise MobileVlaError(f"{bag.path} has no topic {name}, expected one of {_listed(bag)}; correct it")
    if only is not None:
        names = [_absolute(name) for name in only]
    else:
        names = [
            topic.name
            for topic in bag.topics.values()
            if topic.name in remaps
            or _is_input(topic)
            or topic.type_name in (TWIST, TWIST_STAMPED)
            or (everything and not _is_hidden(topic))
        ]
    if not names:
        raise MobileVlaError(
            f"{bag.path} contains {_listed(bag)}, expected images or an instruction; name other topics with --topics"
        )
    targets = {
        name: remaps.get(name, name if _is_input(bag.topics[name]) else f"{RECORDED_PREFIX}{name}") for name in names
    }
    for name, target in targets.items():
        if target == _CLOCK_TOPIC:
            raise MobileVlaError(
                f"{name} would be published on {_CLOCK_TOPIC}, where play publishes the time (of the recorded clock, "
                "if the bag has one), expected another topic; leave it out"
            )
    return targets


def check_offset(bag: BagReader, topics: Collection[str], offset_s: float) -> None:
    """Raise MobileVlaError if some topics have no message after an offset; only then the whole bag is read."""
    start_ns = bag.start_ns or 0
    if not offset_s or next(bag.messages(topics, start_ns + round(offset_s * 1e9)), None) is not None:
        return
    end_ns = max((message.time_ns for message in bag.messages(topics)), default=start_ns)
    raise MobileVlaError(
        f"--start-offset is {offset_s:g} s, but the last message to play of {bag.path} is after "
        f"{(end_ns - start_ns) / 1e9:.3g} s, expected less; choose an earlier start"
    )


def _is_input(topic: Topic) -> bool:
    """Whether a topic is an input of a policy: a camera's images, or the instruction."""
    last = topic.name.rpartition("/")[2]
    if topic.type_name == STRING:
        return last == _INSTRUCTION
    return topic.type_name in (IMAGE, COMPRESSED_IMAGE) and _DEBUG_IMAGE not in topic.name.split("/")


def _is_hidden(topic: Topic) -> bool:
    """Whether ROS hides a topic, as those of services and actions."""
    return any(part.startswith("_") for part in topic.name.split("/"))


def _listed(bag: BagReader) -> str:
    names = list(bag.topics)
    more = len(names) - _TOPICS_LISTED
    return ", ".join(names[:_TOPICS_LISTED]) + (f" and {more} more" if more > 0 else "")


def _play(bag: BagReader, targets: dict[str, str], args: argparse.Namespace, stop: ExitRequest) -> None:
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    from mobile_vla_inference.harness.bag_graph import BagPlayer

    remapped = {old for old, _ in args.remap}
    inputs = [name for name in targets if _is_input(bag.topics[name])]
    commands = [name for name in inputs if bag.topics[name].type_name == STRING and name not in remapped]
    sensors = [name for name in inputs if bag.topics[name].type_name != STRING]
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = rclpy.create_node("bag_player")
        watch = _Watch(lambda: player.check_alone(sensors, commands), commands)
        player = BagPlayer(node, bag, targets, args.rate, on_message=watch)
        warn(*player.left_out)
        for name, target in targets.items():
            print(name if name == target else f"{name} as {target}", flush=True)
        if left := [name for name in bag.topics if name not in targets]:
            print(
                f"{len(left)} other topics of the bag are not played; --topics or --all-topics plays them", flush=True
            )
        player.wait_for_listeners(args.wait, stop, args.start_offset)
        player.play(stop, args.start_offset)
        while args.loop and not stop.is_set():
            player.play(stop, args.start_offset)
        print(f"{player.published.total()} messages published", flush=True)
        node.destroy_node()
    finally:
        rclpy.try_shutdown()


class _Watch:
    """Check, before an instruction is sent and once a second, that no node mistakes the recording for live data."""

    def __init__(self, check: Callable[[], None], commands: Collection[str]) -> None:
        self._check = check
        self._commands = commands
        self._due_s = -math.inf

    def __call__(self, message: BagMessage) -> None:
        if message.topic in self._commands or time.monotonic() >= self._due_s:
            self._check()
            self._due_s = time.monotonic() + _CHECK_PERIOD_S


def _remap(text: str) -> tuple[str, str]:
    old, separator, new = text.partition(":=")
    if not (old and separator and new):
        raise argparse.ArgumentTypeError(f"{text} is not a remap, expected OLD:=NEW")
    return _absolute(old), _absolute(new)


def _absolute(name: str) -> str:
    return name if name.startswith("/") else f"/{name}"
