"""`mobile_vla make-checkpoint`: write a checkpoint of random weights in the published layout.

Its settings file and its processors are written next to it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.config import SIZES, standard_config
from mobile_vla_inference.tools.arguments import whole_number
from mobile_vla_inference.tools.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "out", type=Path, metavar="OUT.pth", help="file to write; its settings and processors are written next to it"
    )
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="tiny", help="size of the towers; full: as published, 7.8 GB"
    )
    parser.add_argument("--variant", choices=("hybrid", "pure"), default="hybrid", help="hybrid has CLIP, pure has not")
    parser.add_argument("--seed", type=whole_number, default=0, metavar="N", help="seed of the random weights")
    parser.add_argument(
        "--fusion-in", type=int, metavar="F", help="input width of the fusion layer (default: by the size; full: 2560)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; return the exit status."""
    from mobile_vla_inference.policy.synthetic.checkpoint import make_checkpoint  # imports torch

    if args.variant == "pure" and args.fusion_in is not None:
        raise CheckpointError("--fusion-in is given, but the pure variant has no fusion layer; leave it out")
    config = standard_config(args.size, args.variant, args.fusion_in)
    with progress(f"making {args.out.name}", "B") as show:
        make_checkpoint(args.out, config, args.seed, force=args.force, progress=show)
    print(f"{args.out}: {args.size} {args.variant}, {args.out.stat().st_size / 1e6:.1f} MB, seed {args.seed}")
    return 0
