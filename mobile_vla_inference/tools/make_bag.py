"""`mobile_vla make-bag`: a folder of images and actions.csv as a bag with images, instruction and recorded cmd_vel.

Signs and units: throttle (0 to 1, negative backward) times `--max-linear-mps` is linear.x; steering (-1 left to
1 right) times `--max-angular-radps`, negated, is angular.z, because REP-103 turns left for positive values.
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
from mobile_vla_inference.errors import InstructionError
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.tools.arguments import add_full_speed_arguments, full_speeds

HELP = "make a bag from a folder with images/ and actions.csv"

DEFAULT_INSTRUCTION = "follow the track"

_NS = 1_000_000_000
#: The instruction is repeated so often: who listens late to a bag that is played hears it, too.
_INSTRUCTION_PERIOD_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("frames", type=Path, metavar="FRAMES_DIR", help="folder with images/ and actions.csv")
    parser.add_argument("out", type=Path, metavar="OUT", help="the bag to make, a folder")
    parser.add_argument("--storage", choices=STORAGES, default="mcap", help="storage (default: %(default)s)")
    parser.add_argument(
        "--compressed", action="store_true", help=f"CompressedImage on {IMAGE_TOPIC}/compressed instead of Image"
    )
    parser.add_argument(
        "--instruction",
        type=check_instruction,
        default=DEFAULT_INSTRUCTION,
        metavar="TEXT",
        help="what was told (default: %(default)r)",
    )
    add_full_speed_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Make the bag; return the exit status."""
    instruction = check_instruction(args.instruction)
    if not instruction:
        raise InstructionError("--instruction is empty, expected a sentence such as 'go to the cup'; give one")
    check_new_bag(args.out)
    frames = read_frames_folder(args.frames)
    with BagWriter(args.out, args.storage) as bag:
        _write(bag, frames, instruction, args)
    print(f"{args.out}: {len(frames)} images over {frames[-1].stamp_s - frames[0].stamp_s:.2f} s")
    return 0


def _write(bag: BagWriter, frames: list[RecordedFrame], instruction: str, args: argparse.Namespace) -> None:
    from tqdm import tqdm

    image_topic = f"{IMAGE_TOPIC}/compressed" if args.compressed else IMAGE_TOPIC
    bag.add_topic(INSTRUCTION_TOPIC, STRING)
    bag.add_topic(COMMAND_TOPIC, TWIST)
    bag.add_topic(image_topic, COMPRESSED_IMAGE if args.compressed else IMAGE)
    make_image = compressed_message if args.compressed else raw_message
    told_s = -np.inf
    linear_mps, angular_radps = full_speeds(args)
    for frame in tqdm(frames, unit="frame", delay=1, disable=None):
        time_ns = START_S * _NS + round(frame.stamp_s * _NS)
        if frame.stamp_s - told_s >= _INSTRUCTION_PERIOD_S:
            told_s = frame.stamp_s
            bag.write_message(INSTRUCTION_TOPIC, time_ns, typestore().types[STRING](data=instruction))
        twist = twist_message(frame.throttle * linear_mps, -frame.steering * angular_radps)
        bag.write_message(COMMAND_TOPIC, time_ns, twist)
        bag.write_message(image_topic, time_ns, make_image(frame.image, time_ns))
