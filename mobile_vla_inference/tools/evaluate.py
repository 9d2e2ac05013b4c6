"""`mobile_vla evaluate`: a checkpoint over recorded HDF5 episodes, with errors, directions and a confusion table.

`--calibrate` turns it round: it tries the settings that tensors can't tell and ranks them by how near they bring the
error to the one that training stored in the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobile_vla_inference.action import AXES, clipped_shares
from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.bags.step_period import resample_advice
from mobile_vla_inference.episodes.comparison import BASELINES
from mobile_vla_inference.episodes.episode import Episode, EpisodeError
from mobile_vla_inference.episodes.figures import KEY_SPEED, Prediction, figures
from mobile_vla_inference.episodes.find import find_episodes
from mobile_vla_inference.episodes.hdf5.layout import CHANNEL_ORDERS
from mobile_vla_inference.episodes.scenario_instructions import read_instructions
from mobile_vla_inference.errors import CheckpointError, InstructionError
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.policy_facts import DEVICES, DTYPES, ENGINES, PolicyFacts
from mobile_vla_inference.tools.arguments import check_output, count, positive_number

if TYPE_CHECKING:
    from rich.console import Console

    from mobile_vla_inference.policy.calibration import Calibration
    from mobile_vla_inference.policy.storage.checkpoint import Checkpoint

HELP = "run a checkpoint over recorded HDF5 episodes; --calibrate finds its settings"

_SHOWN_TRIALS = 10
#: A value this near to a pressed key's, as a share, was driven by one; a recording was, where so many values are.
_KEY_TOLERANCE = 0.2
_KEY_SHARE = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("episodes", type=Path, metavar="EPISODES_DIR", help="folder of .h5 files, or one file")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CK", help="checkpoint file or folder")
    add_reading_arguments(parser)
    parser.add_argument("--max-episodes", type=count, metavar="N", help="only the first N, in name order")
    parser.add_argument(
        "--key-speed",
        type=positive_number,
        default=KEY_SPEED,
        metavar="V",
        help="speed of a pressed key, for directions, m/s and rad/s (default %(default)g)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file for machines")
    parser.add_argument(
        "--calibrate", action="store_true", help="find the assumed settings by the stored val_mae; write them"
    )
    parser.add_argument("--val-mae", type=positive_number, metavar="X", help="instead of the stored one, normalised")
    parser.add_argument(
        "--confirm",
        type=count,
        nargs="?",
        const=0,
        metavar="N",
        help="with --calibrate: confirm what the error tells beyond doubt, or all of the N-th line, which you chose",
    )
    parser.add_argument("--processors", type=Path, metavar="DIR", help="processor folder (default: by the checkpoint)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the weights (default auto)")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="how a step runs (default auto)")
    parser.add_argument("--force", action="store_true", help="load even where the memory seems too small")


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how episodes are read."""
    parser.add_argument(
        "--channel-order",
        choices=CHANNEL_ORDERS,
        default="rgb",
        help="of the images in the files (default rgb, as documented; look at one)",
    )
    parser.add_argument(
        "--instruction", type=check_instruction, metavar="TEXT", help="what the robot is told (default: as recorded)"
    )
    parser.add_argument("--instructions", type=Path, metavar="FILE", help="JSON file {scenario: text}")


def read_episodes(args: argparse.Namespace) -> list[Episode]:
    """Find the episodes that the arguments name, each with an instruction."""
    if args.instruction is not None and not check_instruction(args.instruction):
        raise InstructionError("--instruction is empty, expected a sentence such as 'go to the cup'; give one")
    episodes = find_episodes(
        args.episodes,
        channel_order=args.channel_order,
        instruction=args.instruction,
        instructions=None if args.instructions is None else read_instructions(args.instructions),
    )
    for episode in episodes:
        if not episode.instruction:
            raise EpisodeError(
                f"{episode.path} ({episode.name}) tells neither scenario nor instruction, expected one of them; "
                "give --instruction"
            )
    return episodes


def run(args: argparse.Namespace) -> int:
    """Evaluate or calibrate; return the exit status."""
    check_output(args.json, args.episodes, args.checkpoint, args.instructions, args.processors)
    for name in ("confirm", "val_mae"):
        if getattr(args, name) is not None and not args.calibrate:
            option = name.replace("_", "-")
            raise CheckpointError(f"--{option} is given without --calibrate, expected both; add --calibrate")
    episodes = read_episodes(args)[: args.max_episodes]
    return _calibrate(args, episodes) if args.calibrate else _evaluate(args, episodes)


def _console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False)


# ---- evaluate --------------------------------------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace, episodes: Sequence[Episode]) -> int:
    policy = VlaPolicy.load(
        args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        engine=args.engine,
        processors=args.processors,
        force=args.force,
    )
    settings = policy.settings
    notes = _notes(policy.describe(), episodes, args.key_speed)
    for note in notes:
        print(f"mobile_vla: warning: {note}", file=sys.stderr)
    result = figures(
        predict(policy, episodes), settings.action_axes, settings.action_scale, settings.action_offset, args.key_speed
    )
    _print_figures(_console(), result)
    if args.json is not None:
        content = {
            "episodes": str(args.episodes),
            "channel_order": args.channel_order,
            "key_speed": args.key_speed,
            "policy": policy.describe().to_json(),
            "notes": notes,
            **result,
        }
        write_text_atomically(args.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 0


def predict(policy: VlaPolicy, episodes: Sequence[Episode]) -> list[Prediction]:
    """Run a policy over episodes, with an empty state at the start of each."""
    from tqdm import tqdm

    settings = policy.settings
    columns = [AXES.index(axis) for axis in settings.action_axes]
    scale, offset = np.array(settings.action_scale), np.array(settings.action_offset)
    predictions = []
    with tqdm(total=sum(len(each.commands) for each in episodes), unit="step", delay=1, disable=None) as bar:
        for episode in episodes:
            policy.set_instruction(episode.instruction)
            policy.reset()
            actions = []
            for frame in episode.frames():
                actions.append(policy.step(frame).values)
                bar.update()
            predictions.append(
                Prediction(episode.scenario, np.array(actions) * scale + offset, episode.commands[:, columns])
            )
    return predictions


def _notes(policy: PolicyFacts, episodes: Sequence[Episode], key_speed: float) -> list[str]:
    """Return what a reader of the figures should know."""
    notes = list(policy.warnings)
    if policy.assumed_settings:
        notes.append(
            f"settings {', '.join(policy.assumed_settings)} are assumed: the figures may be those of another "
            "policy; see --calibrate"
        )
    for column, axis in enumerate(AXES):
        driven = sum(int(np.count_nonzero(each.commands[:, column])) for each in episodes)
        if driven and axis not in policy.action_axes:
            notes.append(
                f"{driven} recorded steps move along {axis}, which the policy does not drive (action_axes): they are "
                "not compared"
            )
    axes = policy.action_axes
    driven = np.concatenate([each.commands for each in episodes])[:, [AXES.index(axis) for axis in axes]]
    shares = clipped_shares(driven, policy.action_scale, policy.action_offset)
    notes += [
        f"{share:.1%} of the recorded {axis} is beyond the {scale:g} that one unit stands for (action_scale): clipped "
        "in normalised units"
        for axis, scale, share in zip(axes, policy.action_scale, shares)
        if share > 0.0
    ]
    return [*notes, *_period_notes(policy.step_period_s, episodes), *_key_notes(driven, key_speed)]


def _period_notes(period_s: float, episodes: Sequence[Episode]) -> list[str]:
    """Say where the episodes' time from step to step is not what a step of the policy stands for."""
    notes = []
    told = [period for each in episodes if (period := each.period()) is not None]
    other = [each for each in told if not each.agrees(period_s)]
    if other:
        notes.append(
            f"{len(other)} of {len(episodes)} episodes have another time from step to step ({other[0].where}: "
            f"{other[0].period_s:g} s) than the {period_s:g} s that a step of the policy stands for: its memory "
            f"runs at another pace than it learned; {resample_advice(period_s, other[0].period_s)}"
        )
    if len(told) < len(episodes):
        notes.append(
            f"{len(episodes) - len(told)} of {len(episodes)} episodes tell neither stamps_s nor total_duration: nobody "
            f"knows whether their steps are the policy's {period_s:g} s apart"
        )
    return notes


def _key_notes(driven: np.ndarray, key_speed: float) -> list[str]:
    """Say where the recording was not driven by keys of this speed, by which directions are told."""
    moving = np.abs(driven[driven != 0.0])
    share = float((np.abs(moving / key_speed - 1.0) < _KEY_TOLERANCE).mean()) if moving.size else 1.0
    if share >= _KEY_SHARE:
        return []
    return [
        f"{share:.0%} of the recorded values that are not 0 are near a key's {key_speed:g} m/s or rad/s: directions "
        "say little; give --key-speed"
    ]


def _print_figures(console: Console, result: dict[str, Any]) -> None:
    for units, label in (("normalised_units", "normalised units"), ("command_units", "command units")):
        console.print(_errors(result, units, label))
        console.print()
    console.print(_directions(result))
    console.print()
    console.print(_confusion(result["all"]["confusion"]))


def _scenario_table(title: str, names: Sequence[str]) -> Any:
    """Return an empty table that fits 80 columns: numbers are never cut, long names are wrapped at their dots."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("scenario", no_wrap=True)
    for name in names:
        table.add_column(name.replace(".", "\n."), justify="right", no_wrap=True)
    return table


def _by_scenario(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {**result["scenarios"], "all": result["all"]}


def _errors(result: dict[str, Any], units: str, label: str) -> Any:
    axes = list(result["units"])
    table = _scenario_table(f"MAE, {label}", ["drives", "steps", "policy", *axes, *BASELINES])
    for scenario, part in _by_scenario(result).items():
        errors = part[units]
        cells = [f"{errors['policy'][key]['mae']:.4f}" for key in ("all", *axes)]
        cells += [f"{errors[name]['all']['mae']:.4f}" for name in BASELINES]
        table.add_row(scenario, str(part["episodes"]), str(part["steps"]), *cells)
    return table


def _directions(result: dict[str, Any]) -> Any:
    axes = list(result["units"])
    table = _scenario_table("steps in the recorded direction", ["all axes", *axes])
    for scenario, part in _by_scenario(result).items():
        shares = (part["direction_accuracy"], *(part["directions"][axis] for axis in axes))
        table.add_row(scenario, *(f"{share:.0%}" for share in shares))
    return table


def _confusion(counts: dict[str, dict[str, int]]) -> Any:
    from rich.table import Table

    title = "steps by direction: recorded (rows), predicted (columns)"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("recorded", no_wrap=True)
    for name in counts:
        table.add_column(name.replace("+ ", "+\n"), justify="right")
    for recorded, row in counts.items():
        if any(row.values()):
            table.add_row(recorded, *(str(number) if number else "" for number in row.values()))
    return table


# ---- calibrate -------------------------------------------------------------------------------------------------------


def _calibrate(args: argparse.Namespace, episodes: Sequence[Episode]) -> int:
    from tqdm import tqdm

    from mobile_vla_inference.policy.calibration import Drive, calibrate
    from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
    from mobile_vla_inference.policy.storage.checkpoint_files import find_processors, processor_folders

    checkpoint = open_checkpoint(args.checkpoint)
    val_mae = _stored_error(checkpoint, args.val_mae)
    device, dtype = _where(args)
    with tqdm(unit="episode", delay=1, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = calibrate(
            checkpoint,
            processor_folders(find_processors(args.checkpoint, args.processors), checkpoint.config),
            [Drive(each.frames, each.instruction, each.commands) for each in episodes],
            val_mae,
            device=device,
            dtype=dtype,
            progress=progress,
            force=args.force,
        )
    console = _console()
    _print_trials(console, found, val_mae)
    if args.json is not None:
        write_text_atomically(args.json, json.dumps(_trials_json(args, found, val_mae), indent=1, ensure_ascii=False))
    _save(console, checkpoint, found, args.confirm)
    return 0


def _where(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return torch's device and type; fp32 unless another is asked for, because small differences are to be seen."""
    import torch

    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("--device is cuda, but torch finds none, expected an NVIDIA GPU; use --device cpu")
    return torch.device(name), getattr(torch, "float32" if args.dtype == "auto" else args.dtype)


def _stored_error(checkpoint: Checkpoint, given: float | None) -> float:
    stored = checkpoint.index.metadata.get("val_mae") if given is None else given
    if isinstance(stored, bool) or not isinstance(stored, (int, float)) or not math.isfinite(stored):
        raise CheckpointError(
            f"{checkpoint.path} stores the val_mae {stored!r}, expected a number to calibrate by; give --val-mae"
        )
    return float(stored)


def _print_trials(console: Console, found: Calibration, val_mae: float) -> None:
    from rich.table import Table

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
        f"by chance, {found.chance:.2g} combinations would be expected as near as the first; "
        f"told by the error: {', '.join(found.told) or 'none'}"
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
        "told": list(found.told),
        "tried": {name: list(values) for name, values in found.tried.items()},
        "trials": [{"mae": each.mae, "distance": each.distance, **each.values} for each in found.trials],
    }


def _save(console: Console, checkpoint: Checkpoint, found: Calibration, confirm: int | None) -> None:
    """Write the settings: the best values as assumed; confirmed only what is beyond doubt, or what a person chose."""
    from mobile_vla_inference.policy.calibration import CHANCE_LIMIT
    from mobile_vla_inference.policy.storage.settings_file import confirm_command, save_settings

    if confirm is not None and confirm > len(found.trials):
        raise CheckpointError(f"--confirm is {confirm}, expected 1 to {len(found.trials)}; choose a line of the table")
    trial = found.trials[max((confirm or 0) - 1, 0)]
    certain: tuple[str, ...] = ()
    if confirm:
        certain = tuple(found.tried)
    elif confirm == 0:
        if found.chance > CHANCE_LIMIT:
            raise CheckpointError(
                f"the best combination is {trial.distance:.2e} from val_mae, and {found.chance:.2g} would be expected "
                f"as near by chance, expected at most {CHANCE_LIMIT:g}; nothing was written: calibrate on the episodes "
                "that training validated on, or choose a line with --confirm N"
            )
        certain = found.told
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
