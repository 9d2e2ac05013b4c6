"""`mobile_vla evaluate --calibrate`: find the settings that tensors don't contain by the stored validation error.

Every combination of the assumed settings is tried on recorded episodes; the candidates are ranked by the distance of
their error to the one that training stored in the checkpoint.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mobile_vla_inference.episodes.episode import Episode
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.calibration import CHANCE_LIMIT, Calibration, Drive, calibrate
from mobile_vla_inference.policy.storage.checkpoint import Checkpoint, open_checkpoint
from mobile_vla_inference.policy.storage.checkpoint_files import find_processors, processor_folders
from mobile_vla_inference.policy.storage.settings_file import confirm_command, save_settings
from mobile_vla_inference.tools.progress import progress
from mobile_vla_inference.tools.results import write_json

_SHOWN_TRIALS = 10


def run_calibration(args: argparse.Namespace, episodes: Sequence[Episode]) -> None:
    """Try the combinations of the assumed settings; print, write and store what was found.

    Raises:
        CheckpointError: nothing can be calibrated, or nothing may be confirmed.
    """
    checkpoint = open_checkpoint(args.checkpoint)
    val_mae = _stored_error(checkpoint, args.val_mae)
    device, dtype = _where(args)
    with progress("calibration", "episode") as show:
        found = calibrate(
            checkpoint,
            processor_folders(find_processors(args.checkpoint, args.processors), checkpoint.config),
            [Drive(each.frames, each.instruction, each.commands) for each in episodes],
            val_mae,
            device=device,
            dtype=dtype,
            progress=show,
            force=args.force,
        )
    write_json(args.json, _trials_json(args, found, val_mae))
    console = Console(soft_wrap=True, highlight=False)
    _print_trials(console, found, val_mae)
    _save(console, checkpoint, found, args.confirm)


def _where(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Return the device and the data type; float32 by default, because small differences decide."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(
            "--device is cuda, but torch finds no CUDA device, expected an NVIDIA GPU; use --device cpu"
        )
    return torch.device(name), getattr(torch, "float32" if args.dtype == "auto" else args.dtype)


def _stored_error(checkpoint: Checkpoint, given: float | None) -> float:
    stored = checkpoint.index.metadata.get("val_mae") if given is None else given
    if isinstance(stored, bool) or not isinstance(stored, (int, float)) or not math.isfinite(stored):
        raise CheckpointError(f"{checkpoint.path} contains val_mae {stored!r}, expected a number; give --val-mae")
    return float(stored)


def _print_trials(console: Console, found: Calibration, val_mae: float) -> None:
    table = Table(title=f"{len(found.trials)} combinations, by distance to val_mae {val_mae:.6f}", title_justify="left")
    for name in ("", "distance", "MAE"):
        table.add_column(name, justify="right")
    for name in found.tried:
        table.add_column(name, overflow="fold")
    for rank, trial in enumerate(found.trials[:_SHOWN_TRIALS], start=1):
        values = (_shown(trial.values[name]) for name in found.tried)
        table.add_row(str(rank), f"{trial.distance:.2e}", f"{trial.mae:.6f}", *values)
    console.print(table)
    console.print(
        f"by chance alone, {found.chance:.2g} combinations would be as close to val_mae as the first; "
        f"unambiguous settings: {', '.join(found.determined) or 'none'}"
    )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _trials_json(args: argparse.Namespace, found: Calibration, val_mae: float) -> dict[str, Any]:
    return {
        "checkpoint": str(args.checkpoint),
        "episodes": str(args.episodes),
        "val_mae": val_mae,
        "units": "normalised",
        "chance": found.chance,
        "told": list(found.determined),
        "tried": {name: list(values) for name, values in found.tried.items()},
        "trials": [{"mae": each.mae, "distance": each.distance, **each.values} for each in found.trials],
    }


def _save(console: Console, checkpoint: Checkpoint, found: Calibration, confirm: int | None) -> None:
    """Store the best values as assumed; as confirmed, only unambiguous ones or the candidate that a person chose."""
    if confirm is not None and confirm > len(found.trials):
        raise CheckpointError(
            f"--confirm is {confirm}, expected 1 to {len(found.trials)}; choose a candidate from the table"
        )
    trial = found.trials[max((confirm or 0) - 1, 0)]
    certain: tuple[str, ...] = ()
    if confirm:
        certain = tuple(found.tried)
    elif confirm == 0:
        if found.chance > CHANCE_LIMIT:
            raise CheckpointError(
                f"the best combination is {trial.distance:.2e} from val_mae, and by chance alone "
                f"{found.chance:.2g} would be as close, expected at most {CHANCE_LIMIT:g}; nothing was written: "
                "calibrate on the validation episodes of the training, or choose a candidate with --confirm N"
            )
        certain = found.determined
    settings = replace(
        checkpoint.settings,
        **trial.values,
        assumed=tuple(name for name in checkpoint.settings.assumed if name not in certain),
    )
    path = save_settings(checkpoint.path, settings, checkpoint.fingerprint)
    console.print(f"{path}: confirmed by this run: {', '.join(certain) or 'nothing'}", markup=False)
    if settings.assumed:
        console.print(
            f"still assumed: {', '.join(settings.assumed)}. The robot doesn't move while a setting is assumed; check "
            f"them and run {confirm_command(checkpoint.path)}",
            markup=False,
        )
