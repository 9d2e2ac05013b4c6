"""`mobile_vla convert`: write a checkpoint as a folder that loads faster, with everything that a policy needs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mobile_vla_inference.policy.storage.conversion.plan import DTYPES
from mobile_vla_inference.tools.arguments import add_processors_argument
from mobile_vla_inference.tools.progress import progress
from mobile_vla_inference.tools.results import warn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="CK", help="a .pth or safetensors file, or a folder of them")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="data type of the weights")
    parser.add_argument(
        "--keep-layers",
        type=_layers,
        default={},
        metavar="TOWER=N,...",
        help="keep only the first N layers of kosmos_text, kosmos_vision, clip_text or clip_vision; the result is "
        "untrained (default: all layers)",
    )
    add_processors_argument(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing converted folder")


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint; return the exit status."""
    from mobile_vla_inference.policy.convert import convert  # imports torch

    with progress(f"converting {args.checkpoint.name}", "B") as show:
        conversion = convert(
            args.checkpoint,
            args.out,
            dtype=args.dtype,
            keep_layers=args.keep_layers,
            processors=args.processors,
            force=args.force,
            progress=show,
        )
    warn(*conversion.warnings)
    shards = f"{conversion.shards} shard" + ("s" if conversion.shards > 1 else "")
    print(f"{conversion.folder}: {args.dtype}, {conversion.weight_bytes / 1e9:.3f} GB of weights in {shards}")
    return 0


def _layers(text: str) -> dict[str, int]:
    layers: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if not number.isascii() or not number.isdigit():
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form TOWER=N, such as kosmos_text=12")
        if name in layers:
            raise argparse.ArgumentTypeError(f"{name} is given twice, expected once")
        layers[name] = int(number)
    return layers
