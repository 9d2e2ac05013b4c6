"""`mobile_vla evaluate`: run a checkpoint on recorded HDF5 episodes; print errors, directions and a confusion table.

`--calibrate` does the reverse (tools/calibrate.py): it finds the assumed settings with which the error comes nearest
to the validation error stored in the checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mobile_vla_inference.episodes.comparison import BASELINES
from mobile_vla_inference.episodes.episode import Episode
from mobile_vla_inference.episodes.evaluation import evaluation_notes, predict
from mobile_vla_inference.episodes.figures import KEY_SPEED, figures
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.tools.arguments import (
    add_checkpoint_argument,
    add_json_argument,
    add_loading_arguments,
    check_output,
    count,
    positive_number,
)
from mobile_vla_inference.tools.episode_arguments import add_reading_arguments, read_episodes
from mobile_vla_inference.tools.loading import load_policy
from mobile_vla_inference.tools.progress import progress_bar
from mobile_vla_inference.tools.results import warn, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_reading_arguments(parser)
    add_checkpoint_argument(parser)
    parser.add_argument("--max-episodes", type=count, metavar="N", help="only the first N in name order (default: all)")
    parser.add_argument(
        "--key-speed",
        type=positive_number,
        default=KEY_SPEED,
        metavar="SPEED",
        help="speed of one pressed key, if the drives were recorded by keyboard, m/s and rad/s; used for directions",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="try values for the unconfirmed settings, and store those with the MAE closest to the stored validation "
        "MAE; they stay unconfirmed",
    )
    parser.add_argument(
        "--val-mae",
        type=positive_number,
        metavar="MAE",
        help="with --calibrate: validation MAE, normalised (default: as stored in the checkpoint)",
    )
    parser.add_argument(
        "--confirm",
        type=count,
        nargs="?",
        const=0,
        metavar="N",
        help="with --calibrate: confirm unambiguous settings, or all settings of candidate N",
    )
    add_loading_arguments(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate or calibrate; return the exit status."""
    check_output(args.json, args.episodes, args.checkpoint, args.instructions, args.processors)
    for name in ("confirm", "val_mae"):
        if getattr(args, name) is not None and not args.calibrate:
            option = name.replace("_", "-")
            raise CheckpointError(f"--{option} is given without --calibrate, expected both; add --calibrate")
    episodes = read_episodes(args)[: args.max_episodes]
    if args.calibrate:
        from mobile_vla_inference.tools.calibrate import run_calibration

        run_calibration(args, episodes)
    else:
        _evaluate(args, episodes)
    return 0


def _evaluate(args: argparse.Namespace, episodes: Sequence[Episode]) -> None:
    policy = load_policy(args, args.checkpoint)
    settings = policy.settings
    notes = evaluation_notes(policy.describe(), episodes, args.key_speed)
    warn(*notes)
    with progress_bar("evaluation", "step", sum(len(each.commands) for each in episodes)) as bar:
        predictions = predict(policy, episodes, bar.update)
    result = figures(predictions, settings.action_axes, settings.action_scale, settings.action_offset, args.key_speed)
    content = {
        "episodes": str(args.episodes),
        "channel_order": args.channel_order,
        "key_speed": args.key_speed,
        "policy": policy.describe().to_json(),
        "notes": notes,
        **result,
    }
    write_json(args.json, content)
    _print_figures(Console(soft_wrap=True, highlight=False), result)


# ---- tables ----------------------------------------------------------------------------------------------------------


def _print_figures(console: Console, result: dict[str, Any]) -> None:
    for units, label in (("normalised_units", "normalised units"), ("command_units", "command units")):
        console.print(_errors(result, units, label))
        console.print()
    console.print(_directions(result))
    console.print()
    console.print(_confusion(result["all"]["confusion"]))


def _scenario_table(title: str, names: Sequence[str]) -> Table:
    """Return an empty table that fits 80 columns: numbers are never cut, long names wrap at their dots."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("scenario", no_wrap=True)
    for name in names:
        table.add_column(name.replace(".", "\n."), justify="right", no_wrap=True)
    return table


def _by_scenario(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {**result["scenarios"], "all": result["all"]}


def _errors(result: dict[str, Any], units: str, label: str) -> Table:
    axes = list(result["units"])
    table = _scenario_table(f"MAE, {label}", ["episodes", "steps", "policy", *axes, *BASELINES])
    for scenario, part in _by_scenario(result).items():
        errors = part[units]
        cells = [f"{errors['policy'][key]['mae']:.4f}" for key in ("all", *axes)]
        cells += [f"{errors[name]['all']['mae']:.4f}" for name in BASELINES]
        table.add_row(scenario, str(part["episodes"]), str(part["steps"]), *cells)
    return table


def _directions(result: dict[str, Any]) -> Table:
    axes = list(result["units"])
    table = _scenario_table("steps in the recorded direction", ["all axes", *axes])
    for scenario, part in _by_scenario(result).items():
        shares = (part["direction_accuracy"], *(part["directions"][axis] for axis in axes))
        table.add_row(scenario, *(f"{share:.0%}" for share in shares))
    return table


def _confusion(counts: dict[str, dict[str, int]]) -> Table:
    title = "steps by direction: recorded (rows), predicted (columns)"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("recorded", no_wrap=True)
    for name in counts:
        table.add_column(name.replace("+ ", "+\n"), justify="right")
    for recorded, row in counts.items():
        if any(row.values()):
            table.add_row(recorded, *(str(number) if number else "" for number in row.values()))
    return table
