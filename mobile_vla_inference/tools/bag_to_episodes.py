"""`mobile_vla bag-to-episodes`: make HDF5 episodes from a bag; a new episode begins at each new instruction.

Images are taken at the policy's step period, as in training. A command belongs to an image if it is at most 0.5 s
older; images without a command are left out.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_vla_inference.bags.images import CONVERSIONS, decode_or_none
from mobile_vla_inference.bags.reader import TWIST_STAMPED, BagError, BagReader
from mobile_vla_inference.bags.step_period import EPISODE_GAP_S, Pace, StepPeriod
from mobile_vla_inference.bags.topics import BagTopics, choose_topics
from mobile_vla_inference.episodes.hdf5.writer import EpisodeWriter
from mobile_vla_inference.episodes.scenario_instructions import SCENARIO_INSTRUCTIONS
from mobile_vla_inference.errors import FrameError, MobileVlaError
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.tools.arguments import add_instruction_argument, add_period_argument, add_topic_arguments
from mobile_vla_inference.tools.progress import progress_bar
from mobile_vla_inference.tools.results import warn

_COMMAND_VALID_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bag", type=Path, metavar="BAG", help="a bag: folder, .mcap or .db3")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write the episodes to")
    add_instruction_argument(parser)
    parser.add_argument(
        "--scenario", choices=tuple(SCENARIO_INSTRUCTIONS), help="scenario of the drive (default: none)"
    )
    add_topic_arguments(parser)
    add_period_argument(parser)


@dataclass(frozen=True)
class _Moment:
    """An image of the bag with the instruction and command at its time: seconds, uint8 RGB, text, (m/s, m/s, rad/s)."""

    stamp_s: float
    rgb: np.ndarray
    instruction: str
    command: tuple[float, float, float]


def run(args: argparse.Namespace) -> int:
    """Make the episodes; return the exit status."""
    counts: Counter[str] = Counter()
    with BagReader(args.bag) as bag:
        topics = choose_topics(bag, args.image_topic, args.command_topic, args.instruction is None)
        if topics.command is None:
            raise BagError(f"{args.bag} contains no recorded velocity, expected cmd_vel; record it too")
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MobileVlaError(f"{args.out} can't be created ({error.strerror}); choose another place") from error
        with progress_bar("reading the bag", "image", topics.image.count) as bar:
            moments = _paced(_moments(bag, topics, args.instruction, bar.update, counts), args.period, counts)
            written = _write(moments, args)
        warn(*bag.notes)
    if not written:
        raise BagError(f"{args.bag} contains no image with a valid command and instruction, expected some")
    print(
        f"{args.out}: {len(written)} episode{'s' * (len(written) != 1)}, {sum(map(len, written))} steps every "
        f"{args.period:g} s (--period)"
    )
    left_out = ", ".join(f"{number} {cause}" for cause, number in counts.items())
    print(f"images left out: {left_out or 'none'}")
    times = np.concatenate([np.diff(stamps_s) for stamps_s in written])
    if len(times) and not StepPeriod("", args.period, 0).agrees(float(np.median(times))):
        warn(
            f"the steps are {np.median(times):.3g} s apart, not the {args.period:g} s of --period: the recorded images "
            "are not faster; the stamps in the episodes are right"
        )
    return 0


def _moments(bag: BagReader, topics: BagTopics, given: str | None, seen, counts: Counter[str]) -> Iterator[_Moment]:
    """Yield the images that have an instruction and a fresh command; count the others by cause."""
    instruction = given or ""
    command, command_ns = (0.0, 0.0, 0.0), -math.inf
    check, convert = CONVERSIONS[topics.image.type_name]
    for message in bag.messages(topics.names):
        decoded = decode_or_none(bag, message)
        if message.topic == topics.image.name:
            seen()
            fresh = message.time_ns - command_ns <= _COMMAND_VALID_S * 1e9
            if decoded is None or not instruction or not fresh:
                counts[_cause(decoded, instruction)] += 1
                continue
            try:
                check(decoded)
                rgb = convert(decoded)
            except FrameError:
                counts["unreadable"] += 1
                continue
            stamp = decoded.header.stamp
            stamp_s = stamp.sec + stamp.nanosec * 1e-9 or message.time_ns * 1e-9
            yield _Moment(stamp_s, rgb, instruction, command)
        elif decoded is None:
            continue
        elif topics.command is not None and message.topic == topics.command.name:
            twist = decoded.twist if topics.command.type_name == TWIST_STAMPED else decoded
            command = (twist.linear.x, twist.linear.y, twist.angular.z)
            command_ns = message.time_ns if all(map(math.isfinite, command)) else -math.inf
        elif given is None:
            instruction = check_instruction(decoded.data)


def _cause(decoded: object | None, instruction: str) -> str:
    """Return why an image is left out."""
    if decoded is None:
        return "unreadable"
    return "without a command" if instruction else "without an instruction"


def _paced(moments: Iterator[_Moment], period_s: float, counts: Counter[str]) -> Iterator[_Moment]:
    """Yield at most one image per period; a late one starts a new period."""
    pace = Pace(period_s)
    for moment in moments:
        if pace.takes(moment.stamp_s):
            yield moment
        else:
            counts["between the steps"] += 1


def _write(moments: Iterator[_Moment], args: argparse.Namespace) -> list[list[float]]:
    """Write an episode for each run of moments that belong together; return the stamps of each, seconds."""
    written = []
    moment = next(moments, None)
    while moment is not None:
        height, width = moment.rgb.shape[:2]
        path = args.out / f"{args.bag.stem}_{len(written):03d}{f'_{args.scenario}' if args.scenario else ''}.h5"
        stamps_s = []
        with EpisodeWriter(
            path, (width, height), instruction=moment.instruction, scenario=args.scenario or ""
        ) as episode:
            first = moment
            while moment is not None and _belongs(moment, first):
                episode.add(moment.stamp_s, moment.rgb, moment.command)
                stamps_s.append(moment.stamp_s)
                first, moment = moment, next(moments, None)
        written.append(stamps_s)
    return written


def _belongs(moment: _Moment, former: _Moment) -> bool:
    """Return whether a moment belongs to the same episode as the one before it."""
    return (
        moment.instruction == former.instruction
        and moment.rgb.shape == former.rgb.shape
        and 0.0 <= moment.stamp_s - former.stamp_s <= EPISODE_GAP_S
    )
