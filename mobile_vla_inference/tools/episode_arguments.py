"""Which recorded HDF5 episodes a subcommand reads, and how: the options, and the reading itself."""

from __future__ import annotations

import argparse
from pathlib import Path

from mobile_vla_inference.episodes.episode import Episode, EpisodeError
from mobile_vla_inference.episodes.find import find_episodes
from mobile_vla_inference.episodes.hdf5.layout import CHANNEL_ORDERS
from mobile_vla_inference.episodes.scenario_instructions import read_instructions
from mobile_vla_inference.tools.arguments import add_instruction_argument


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which episodes are read, and how; `read_episodes` reads them."""
    parser.add_argument("episodes", type=Path, metavar="EPISODES_DIR", help="folder of .h5 files, or one file")
    parser.add_argument(
        "--channel-order",
        choices=CHANNEL_ORDERS,
        default="rgb",
        help="channel order of the stored images",
    )
    add_instruction_argument(parser)
    parser.add_argument(
        "--instructions", type=Path, metavar="FILE", help="JSON file {scenario: text} in place of recorded instructions"
    )


def read_episodes(args: argparse.Namespace) -> list[Episode]:
    """Return the episodes that the options name, each with an instruction; raise EpisodeError if one has none."""
    episodes = find_episodes(
        args.episodes,
        channel_order=args.channel_order,
        instruction=args.instruction,
        instructions=None if args.instructions is None else read_instructions(args.instructions),
    )
    for episode in episodes:
        if not episode.instruction:
            raise EpisodeError(
                f"{episode.path} ({episode.name}) contains neither scenario nor instruction, expected one of them; "
                "give --instruction"
            )
    return episodes
