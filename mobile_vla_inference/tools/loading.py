"""Loading the policy that the options of a subcommand name."""

from __future__ import annotations

import argparse
from pathlib import Path

from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.tools.progress import stages


def load_policy(
    args: argparse.Namespace, checkpoint: Path, *, dtype: str | None = None, engine: str | None = None
) -> VlaPolicy:
    """Load a policy with the options of `add_loading_arguments`.

    Args:
        args: the options.
        checkpoint: file or folder.
        dtype: data type in place of the option's.
        engine: engine in place of the option's.

    Raises:
        CheckpointError, DeviceError: it can't be loaded in this way.
    """
    with stages() as show:
        return VlaPolicy.load(
            checkpoint,
            device=args.device,
            dtype=dtype or args.dtype,
            engine=engine or args.engine,
            processors=args.processors,
            progress=show,
            force=args.force,
        )
