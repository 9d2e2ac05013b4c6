"""`mobile_vla convert`: write a checkpoint as a folder that loads at once, with everything that a policy needs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from mobile_vla_inference.policy.storage.conversion.plan import DTYPES

HELP = "convert a checkpoint to a folder that loads at once, in another number type"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="CK", help="a .pth or safetensors file, or a folder of them")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="type of the weights (default float16)")
    parser.add_argument(
        "--keep-layers",
        type=_layers,
        default={},
        metavar="TOWER=N,...",
        help="keep the first N layers of kosmos_text, kosmos_vision, clip_text, clip_vision; nobody trained the result",
    )
    parser.add_argument("--processors", type=Path, metavar="DIR", help="processor folder (default: by the checkpoint)")
    parser.add_argument("--force", action="store_true", help="replace an existing converted folder")


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint; return the exit status."""
    from mobile_vla_inference.policy.convert import convert  # torch: only when it is needed

    with tqdm(unit="B", unit_scale=True, desc=args.checkpoint.name, delay=1, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        conversion = convert(
            args.checkpoint,
            args.out,
            dtype=args.dtype,
            keep_layers=args.keep_layers,
            processors=args.processors,
            force=args.force,
            progress=show,
        )
    for warning in conversion.warnings:
        print(f"mobile_vla: warning: {warning}", file=sys.stderr)
    shards = f"{conversion.shards} shard" + ("s" if conversion.shards > 1 else "")
    print(f"{conversion.folder}: {args.dtype}, {conversion.weight_bytes / 1e9:.3f} GB of weights in {shards}")
    return 0


def _layers(text: str) -> dict[str, int]:
    layers: dict[str, int] = {}
    for part in text.split(","):
        name, _, count = part.partition("=")
        if not count.isascii() or not count.isdigit():
            raise argparse.ArgumentTypeError(f"{part!r} is no TOWER=N, such as kosmos_text=12")
        if name in layers:
            raise argparse.ArgumentTypeError(f"{name} is named twice")
        layers[name] = int(count)
    return layers
