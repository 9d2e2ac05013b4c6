"""`mobile_vla replay`: run a checkpoint on every image of a bag, and compare it with the recorded commands."""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.bags.reader import BagReader
from mobile_vla_inference.bags.writer import check_new_bag
from mobile_vla_inference.episodes.comparison import BASELINES
from mobile_vla_inference.errors import CheckpointError, MobileVlaError
from mobile_vla_inference.policy_facts import DTYPES, ENGINES
from mobile_vla_inference.replay.offline import DUE, EVERY_FRAME, STEPS_FILE, MessageSink, ReplayOptions, replay
from mobile_vla_inference.replay.out_bag import open_out_bag
from mobile_vla_inference.replay.rerun_recording import require_rerun, write_recording
from mobile_vla_inference.replay.result import ReplayResult
from mobile_vla_inference.replay.summary import difference, limits_sentence, read_steps, result_json
from mobile_vla_inference.tools.arguments import (
    HTML_OUTPUT,
    JSON_OUTPUT,
    RERUN_OUTPUT,
    add_checkpoint_argument,
    add_instruction_argument,
    add_json_argument,
    add_loading_arguments,
    add_topic_arguments,
    check_distinct,
    check_output,
    count,
    node_loading_parameters,
)
from mobile_vla_inference.tools.loading import load_policy
from mobile_vla_inference.tools.progress import progress
from mobile_vla_inference.tools.results import warn
from mobile_vla_inference.units import shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bag", type=Path, metavar="BAG", help="a bag: folder, .mcap or .db3")
    add_checkpoint_argument(parser)
    parser.add_argument("--against", type=Path, metavar="CK2", help="second checkpoint, compared side by side")
    add_instruction_argument(parser)
    add_topic_arguments(parser)
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--every-frame", action="store_true", help="one policy step per image (the default)")
    pace.add_argument("--due", action="store_true", help="step at most once per step period of the policy")
    pace.add_argument(
        "--steps",
        type=Path,
        metavar="FILE",
        help="step on the same images as an earlier replay; FILE is its --json output",
    )
    pace.add_argument("--node", action="store_true", help="play the bag in real time through the real vla_node")
    parser.add_argument("--max-frames", type=count, metavar="N", help="stop after N images (default: all)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write an HTML report")
    parser.add_argument(
        "--with-drive",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.json",
        help="JSON file of another replay, shown in the report next to this one; can be given several times",
    )
    parser.add_argument("--rerun", type=Path, metavar="FILE.rrd", help="write a Rerun recording (needs rerun-sdk)")
    parser.add_argument("--out-bag", type=Path, metavar="BAG", help="write a bag of the drive with predicted commands")
    add_json_argument(parser)
    add_loading_arguments(parser)
    parser.add_argument(
        "--against-dtype", choices=DTYPES, metavar="DTYPE", help="data type of CK2 (default: that of CK)"
    )
    parser.add_argument(
        "--against-engine", choices=ENGINES, metavar="ENGINE", help="how steps of CK2 are computed (default: as CK)"
    )


def run(args: argparse.Namespace) -> int:
    """Replay, write the files and print the results; return the exit status."""
    options = _options(args)
    _check(args, options)
    if args.node:
        from mobile_vla_inference.replay.through_node import replay_node

        result, other = replay_node(args.bag, args.checkpoint.resolve(), options, node_loading_parameters(args)), None
    else:
        with open_out_bag(args.out_bag) as sink:
            result = _replay(args, args.checkpoint, args.dtype, args.engine, options, sink)
        other = None
        if args.against is not None:
            gc.collect()  # memory may be too small for two policies
            dtype, engine = args.against_dtype or args.dtype, args.against_engine or args.engine
            other = _replay(args, args.against, dtype, engine, options, None)
    warn(*result.notes)
    _write_files(args, result, other)
    _print_summary(result, other)
    return 0


def _write_files(args: argparse.Namespace, result: ReplayResult, other: ReplayResult | None) -> None:
    """Write what the options ask for; `other` is the result of `--against`."""
    if args.json is not None:
        write_text_atomically(args.json, result_json(result, other))
    if args.report is not None:
        from mobile_vla_inference.replay.report.drives import read_drive
        from mobile_vla_inference.replay.report.page import write_report

        write_report(result, args.report, other, [read_drive(path) for path in args.with_drive])
    if args.rerun is not None:
        write_recording(result, args.rerun, other)


def _options(args: argparse.Namespace) -> ReplayOptions:
    return ReplayOptions(
        image_topic=args.image_topic,
        command_topic=args.command_topic,
        instruction=args.instruction,
        pace=STEPS_FILE if args.steps is not None else DUE if args.due else EVERY_FRAME,
        steps=() if args.steps is None else read_steps(args.steps),
        max_frames=args.max_frames,
        command_line=shlex.join(["mobile_vla", *sys.argv[1:]]),
    )


def _check(args: argparse.Namespace, options: ReplayOptions) -> None:
    """Raise MobileVlaError for arguments that can't be used, before a policy is loaded."""
    inputs = (args.bag, args.checkpoint, args.against, args.steps, args.processors, *args.with_drive)
    for path, kind in ((args.json, JSON_OUTPUT), (args.report, HTML_OUTPUT), (args.rerun, RERUN_OUTPUT)):
        check_output(path, *inputs, kind=kind)
    check_distinct(args.json, args.report, args.rerun, args.out_bag)
    if args.rerun is not None:
        require_rerun()
    if args.with_drive:
        _check_drives(args)
    if args.out_bag is not None:
        check_new_bag(args.out_bag)
    for checkpoint in (args.checkpoint, args.against):
        if checkpoint is not None and not checkpoint.exists():
            raise CheckpointError(f"{checkpoint} does not exist, expected a checkpoint file or folder; check the path")
    for option, value in (("--against-dtype", args.against_dtype), ("--against-engine", args.against_engine)):
        if value is not None and args.against is None:
            raise MobileVlaError(f"{option} is given without --against, expected both; name the second checkpoint")
    if args.node and (args.against is not None or args.out_bag is not None):
        raise MobileVlaError(
            "--node replays one checkpoint and writes no bag, expected it without --against and --out-bag; "
            "leave them out"
        )
    if options.steps and options.instruction is not None:
        raise MobileVlaError("--steps contains the instructions, expected no --instruction; leave one of them out")
    with BagReader(args.bag) as bag:
        options.topics(bag)


def _check_drives(args: argparse.Namespace) -> None:
    from mobile_vla_inference.replay.report.drives import read_drive

    if args.report is None:
        raise MobileVlaError("--with-drive is given without --report, expected both; name the report to write")
    for path in args.with_drive:
        read_drive(path)


def _replay(
    args: argparse.Namespace,
    checkpoint: Path,
    dtype: str,
    engine: str,
    options: ReplayOptions,
    sink: MessageSink | None,
) -> ReplayResult:
    policy = load_policy(args, checkpoint, dtype=dtype, engine=engine)
    policy.warm_up()
    with progress(f"replaying {checkpoint.name}", "image") as show:
        result = replay(args.bag, policy, options, progress=show, sink=sink)
    notes = (*result.policy.warnings, *result.notes)
    if result.policy.assumed_settings:
        notes = (
            *notes,
            f"settings {', '.join(result.policy.assumed_settings)} are assumed: a robot would not move",
        )
    return replace(result, notes=notes)


# ---- tables ----------------------------------------------------------------------------------------------------------


def _print_summary(result: ReplayResult, other: ReplayResult | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{result.bag}, {result.image_topic}", title_justify="left")
    table.add_column("")
    results = [result] if other is None else [result, other]
    for each in results:
        name = f"{each.policy.checkpoint} ({each.policy.dtype}, {each.policy.engine})"
        table.add_column(name, overflow="fold")
    for name, *cells in zip(*(rows.items() for rows in map(_summary_rows, results))):
        table.add_row(name[0], name[1], *(cell[1] for cell in cells))
    console.print(table)
    for each in results:
        if each.comparison is not None:
            console.print(_comparison_table(each))
            console.print(_axes_line(each))
    if other is not None and (apart := difference(result, other)) is not None:
        mae = ", ".join(f"{axis} {value:.4f}" for axis, value in apart["mae"].items())
        console.print(f"mean difference of the two commands (command units): {mae}")


def _summary_rows(result: ReplayResult) -> dict[str, str]:
    timing = result.timing
    stepped = sum(frame.stepped for frame in result.frames)
    return {
        "pace": result.pace,
        "instruction": ", ".join(result.instructions),
        "frames": f"{len(result.frames)}, {stepped} stepped",
        "drops": _listed(result.drops),
        "LSTM state reset": _listed(result.resets),
        "gate": _listed(result.reasons),
        "gate limits": limits_sentence(result.gate),
        "step": _latency(timing.latency_ms),
        "outside the policy": _latency(timing.overhead_ms),
        "rate": f"{timing.frames_per_s:.1f} frames/s",
        "memory": "" if not timing.memory else f"at most {max(sample.rss_mib for sample in timing.memory):.0f} MiB",
    }


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _latency(figures: dict[str, float]) -> str:
    if not figures:
        return "not measured"
    return f"{figures['p50']:.2f} ms p50, {figures['p95']:.2f} ms p95, {figures['max']:.2f} ms max per frame"


def _comparison_table(result: ReplayResult) -> Any:
    from rich.table import Table

    comparison = result.comparison
    table = Table(
        title=f"against {result.command_topic}, {comparison['frames']} frames, {result.policy.checkpoint}",
        title_justify="left",
    )
    for column in ("axis", "units", "error", "policy", "zero", "mean", "previous"):
        table.add_column(column)
    for axis, unit in comparison["units"].items():
        for units, label in (("command_units", unit), ("normalised_units", "normalised")):
            for error in ("mae", "rmse"):
                values = [comparison[units][name][axis][error] for name in ("policy", *BASELINES)]
                table.add_row(axis, label, error.upper(), *(shown(value, ".4f") for value in values))
    return table


def _axes_line(result: ReplayResult) -> str:
    """Return a line for each axis: how often the signs agree, and how late the prediction is."""
    facts = result.comparison["axes"]
    return "\n".join(
        f"{axis}: signs agree in {shown(fact['sign_agreement'], '.0%')} of {fact['sign_frames']} frames, {_lag(fact)}"
        for axis, fact in facts.items()
    )


def _lag(fact: dict[str, Any]) -> str:
    if fact["lag_s"] is None:
        return "lag unknown"
    return f"lag {fact['lag_s']:+.2f} s (correlation {shown(fact['lag_correlation'], '.2f')})"
