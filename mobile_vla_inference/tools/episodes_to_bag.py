"""`mobile_vla episodes-to-bag`: make a bag with images, instruction and cmd_vel from each HDF5 episode."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mobile_vla_inference.bags.messages import (
    COMMAND_TOPIC,
    FRAME_ID,
    IMAGE_TOPIC,
    INSTRUCTION_TOPIC,
    START_S,
    header_message,
    image_message,
    twist_message,
)
from mobile_vla_inference.bags.reader import COMPRESSED_IMAGE, IMAGE, STRING, TWIST, typestore
from mobile_vla_inference.bags.writer import STORAGES, BagWriter, check_new_bag
from mobile_vla_inference.episodes.episode import Episode
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.tools.arguments import add_period_argument
from mobile_vla_inference.tools.episode_arguments import add_reading_arguments, read_episodes
from mobile_vla_inference.tools.progress import progress_bar

_NS = 1_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_reading_arguments(parser)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for the bags, named after the episodes")
    parser.add_argument("--storage", choices=STORAGES, default="mcap", help="storage format of the bags")
    parser.add_argument("--raw", action="store_true", help="write Image instead of CompressedImage (JPEG)")
    add_period_argument(parser, None)


def run(args: argparse.Namespace) -> int:
    """Make the bags; return the exit status."""
    episodes = read_episodes(args)
    times = [_times(episode, args.period) for episode in episodes]
    targets = [args.out / _file_name(episode) for episode in episodes]
    if len(set(targets)) < len(targets):
        raise MobileVlaError(
            f"{args.episodes} contains several episodes with the same name, expected different names; rename them"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MobileVlaError(f"{args.out} can't be created ({error.strerror}); choose another place") from error
    for target in targets:
        check_new_bag(target)
    with progress_bar("writing the bags", "image", sum(len(each.commands) for each in episodes)) as bar:
        for episode, target, times_s in zip(episodes, targets, times):
            with BagWriter(target, args.storage) as bag:
                for _ in _written(bag, episode, args.raw, times_s):
                    bar.update()
    print(f"{args.out}: {len(episodes)} bag{'s' * (len(episodes) != 1)}")
    return 0


def _times(episode: Episode, period_s: float | None) -> np.ndarray:
    """Return the time of each step, seconds from the first: by the given period, else as recorded in the episode."""
    steps = len(episode.commands)
    if period_s is None:
        stamps_s, period = episode.stamps_s(), episode.period()
        if stamps_s is not None:
            return stamps_s - stamps_s[0]
        if period is None and steps > 1:
            raise MobileVlaError(
                f"{episode.where} contains neither stamps_s nor total_duration, expected the time between steps; "
                "give --period"
            )
        period_s = 0.0 if period is None else period.period_s
    return np.arange(steps) * period_s


def _file_name(episode: Episode) -> str:
    return episode.name.replace("/", "_")


def _written(bag: BagWriter, episode: Episode, raw: bool, times_s: np.ndarray):
    """Write an episode and yield after each image."""
    image_topic = IMAGE_TOPIC if raw else f"{IMAGE_TOPIC}/compressed"
    bag.add_topic(INSTRUCTION_TOPIC, STRING)
    bag.add_topic(COMMAND_TOPIC, TWIST)
    bag.add_topic(image_topic, IMAGE if raw else COMPRESSED_IMAGE)
    make_image = image_message if raw else _compressed
    bag.write_message(INSTRUCTION_TOPIC, START_S * _NS, typestore().types[STRING](data=episode.instruction))
    for time_s, frame, (x_mps, y_mps, z_radps) in zip(times_s, episode.frames(), episode.commands.tolist()):
        time_ns = START_S * _NS + round(time_s * _NS)
        bag.write_message(COMMAND_TOPIC, time_ns, twist_message(x_mps, z_radps, y_mps))
        bag.write_message(image_topic, time_ns, make_image(frame, time_ns))
        yield


def _compressed(rgb: np.ndarray, time_ns: int):
    import cv2

    done, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])
    if not done:
        raise MobileVlaError(f"an image of {rgb.shape[1]} x {rgb.shape[0]} px can't be written as JPEG; give --raw")
    return typestore().types[COMPRESSED_IMAGE](
        header=header_message(time_ns, FRAME_ID), format="rgb8; jpeg compressed bgr8", data=data.reshape(-1)
    )
