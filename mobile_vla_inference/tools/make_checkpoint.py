"""`mobile_vla make-checkpoint`: write a synthetic checkpoint in the published layout, with settings and processors."""

from __future__ import annotations

import argparse
from pathlib import Path

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.config import SIZES, standard_config

HELP = "write a synthetic checkpoint in the published layout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("out", type=Path, metavar="OUT.pth", help="file to write; settings and processors go beside")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny", help="full is the published size (7.8 GB)")
    parser.add_argument("--variant", choices=("hybrid", "pure"), default="hybrid", help="with or without CLIP")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the weights (default 0)")
    parser.add_argument("--fusion-in", type=int, metavar="F", help="width of the fusion layer's input (full: 2560)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; return the exit status."""
    from tqdm import tqdm

    from mobile_vla_inference.policy.synthetic.checkpoint import make_checkpoint  # torch: only when it is needed

    if args.variant == "pure" and args.fusion_in is not None:
        raise CheckpointError("--fusion-in was given, but the pure variant has no fusion layer; leave it out")
    config = standard_config(args.size, args.variant, args.fusion_in)
    with tqdm(unit="B", unit_scale=True, desc=args.out.name, delay=1, disable=None) as bar:

        def show(written: int, total: int) -> None:
            bar.total = total
            bar.update(written - bar.n)

        make_checkpoint(args.out, config, args.seed, force=args.force, progress=show)
    print(f"{args.out}: {args.size} {args.variant}, {args.out.stat().st_size / 1e6:.1f} MB, seed {args.seed}")
    return 0


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"{seed} is negative, expected 0 or more")
    return seed
