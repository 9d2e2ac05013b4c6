"""`mobile_vla make-bag`: make a bag with images, instruction and cmd_vel from a folder with images/ and actions.csv.

Signs and units: linear.x is the throttle (0 to 1, negative: backward) times `--max-linear-mps`; angular.z is the
negated steering (-1 left to 1 right) times `--max-angular-radps`, because positive means left in REP-103.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mobile_vla_inference.bags.messages import (
    COMMAND_TOPIC,
    IMAGE_TOPIC,
    INSTRUCTION_TOPIC,
    START_S,
    compressed_message,
    raw_message,
    twist_message,
)
from mobile_vla_inference.bags.reader import COMPRESSED_IMAGE, IMAGE, STRING, TWIST, typestore
from mobile_vla_inference.bags.writer import STORAGES, BagWriter, check_new_bag
from mobile_vla_inference.episodes.frames_folder import RecordedFrame, read_frames_folder
from mobile_vla_inference.tools.arguments import add_full_speed_arguments, full_speeds, instruction
from mobile_vla_inference.tools.progress import progress_bar

_INSTRUCTION = "follow the track"

_NS = 1_000_000_000
#: Period in which the instruction is repeated, so that a node that subscribes while the bag plays receives it, too.
_INSTRUCTION_PERIOD_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("frames", type=Path, metavar="FRAMES_DIR", help="folder with images/ and actions.csv")
    parser.add_argument("out", type=Path, metavar="OUT", help="bag to write, a folder")
    parser.add_argument("--storage", choices=STORAGES, default="mcap", help="storage format of the bag")
    parser.add_argument(
        "--compressed", action="store_true", help=f"write CompressedImage on {IMAGE_TOPIC}/compressed instead of Image"
    )
    parser.add_argument(
        "--instruction",
        type=instruction,
        default=_INSTRUCTION,
        metavar="TEXT",
        help="instruction that the person followed",
    )
    add_full_speed_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Make the bag; return the exit status."""
    check_new_bag(args.out)
    frames = read_frames_folder(args.frames)
    with BagWriter(args.out, args.storage) as bag:
        _write(bag, frames, args)
    print(f"{args.out}: {len(frames)} images over {frames[-1].stamp_s - frames[0].stamp_s:.2f} s")
    return 0


def _write(bag: BagWriter, frames: list[RecordedFrame], args: argparse.Namespace) -> None:
    image_topic = f"{IMAGE_TOPIC}/compressed" if args.compressed else IMAGE_TOPIC
    bag.add_topic(INSTRUCTION_TOPIC, STRING)
    bag.add_topic(COMMAND_TOPIC, TWIST)
    bag.add_topic(image_topic, COMPRESSED_IMAGE if args.compressed else IMAGE)
    make_image = compressed_message if args.compressed else raw_message
    repeated_s = -np.inf
    linear_mps, angular_radps = full_speeds(args)
    with progress_bar("writing the bag", "image", len(frames)) as bar:
        for frame in frames:
            time_ns = START_S * _NS + round(frame.stamp_s * _NS)
            if frame.stamp_s - repeated_s >= _INSTRUCTION_PERIOD_S:
                repeated_s = frame.stamp_s
                bag.write_message(INSTRUCTION_TOPIC, time_ns, typestore().types[STRING](data=args.instruction))
            twist = twist_message(frame.throttle * linear_mps, -frame.steering * angular_radps)
            bag.write_message(COMMAND_TOPIC, time_ns, twist)
            bag.write_message(image_topic, time_ns, make_image(frame.image, time_ns))
            bar.update()
