"""`mobile_vla drill`: inject every fault into the real node while it drives, and time how it stops the robot.

The node and its worker are the real ones, with the small policy of the package. Its actions get a constant forward
part, so that the robot always moves, and its steps take longer than the limit of a stop. A fault is missed if the first
zero is late, if anything but zeros follows, if the reason is wrong, or if the robot does not move again as designed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mobile_vla_inference.harness.domain import require_rclpy
from mobile_vla_inference.harness.session import NodeSession
from mobile_vla_inference.tools.arguments import add_json_argument, check_output, count
from mobile_vla_inference.tools.bench.images_profile import images_profile
from mobile_vla_inference.tools.drill.catalogue import CATALOGUE
from mobile_vla_inference.tools.drill.panel import PANEL_VARIABLE, DrillPanel
from mobile_vla_inference.tools.drill.rig import Fault
from mobile_vla_inference.tools.drill.rounds import (
    NAMESPACE,
    NODE_PARAMETERS,
    DrillNodes,
    Outcome,
    badness,
    run_fault,
    run_round,
)
from mobile_vla_inference.tools.results import write_json

if TYPE_CHECKING:
    from rich.console import Console


EXIT_MISSED = 1

#: Columns of an output that is not a terminal.
_LOG_WIDTH = 150


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--list", action="store_true", help="list the faults and exit")
    parser.add_argument("--only", type=_faults, metavar="NAME,...", default=CATALOGUE, help="inject only these faults")
    parser.add_argument(
        "--rounds", type=count, metavar="N", default=1, help="how often each fault is injected (default: %(default)s)"
    )
    add_json_argument(parser, "outcome of every fault")
    parser.add_argument(
        "--cmd-vel",
        metavar="TOPIC",
        help="publish the velocities on this topic of the robot's ROS graph (ROS_DOMAIN_ID, middleware), so that a "
        "real base moves: lift its wheels off the ground first (default: a private graph)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the drill; return 0 if no fault was missed, else 1.

    Raises:
        MobileVlaError: the drill could not be run.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    if args.list:
        console.print(_catalogue_table(args.only))
        return 0
    check_output(args.json)
    require_rclpy()
    outcomes = _run_rounds(args, console)
    missed = [outcome for outcome in outcomes if outcome.misses]
    report = {
        "rounds": args.rounds,
        "faults": len(outcomes),
        "missed": len(missed),
        "parameters": NODE_PARAMETERS,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    write_json(args.json, report)
    console.print(_outcome_table(args.only, outcomes))
    for outcome in missed:
        console.print(f"round {outcome.round}, {outcome.fault}: {'; '.join(outcome.misses)}", style="red")
    console.print(f"{len(outcomes)} faults injected in {args.rounds} round(s), {len(missed)} missed")
    return EXIT_MISSED if missed else 0


def _faults(text: str) -> tuple[Fault, ...]:
    wanted = [name.strip() for name in text.split(",")]
    unknown = sorted(set(wanted) - {fault.name for fault in CATALOGUE})
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)} is not a known fault, expected names from `mobile_vla drill --list`"
        )
    return tuple(fault for fault in CATALOGUE if fault.name in wanted)


def _run_rounds(args: argparse.Namespace, console: Console) -> list[Outcome]:
    """Run every round on one graph and return every outcome."""
    from rich.progress import Progress

    with NodeSession("drill", isolated=args.cmd_vel is None) as session, session.interruptible():
        from mobile_vla_inference.tools.drill.graph import DrillGraph

        os.environ[PANEL_VARIABLE] = str(session.folder / "panel")
        # Threads that share a tiny step wait for each other: on a busy machine for up to a second, which is a hang.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        cmd_vel = args.cmd_vel or "cmd_vel"
        # A node that is stopped by SIGSTOP keeps the camera's images in shared memory. Once the 512 KiB of the default
        # are full, no node receives an image any more. On a real graph the user's own profile is kept.
        isolated = args.cmd_vel is None
        with images_profile(session.folder) if isolated else contextlib.nullcontext():
            graph = session.join(lambda: DrillGraph(NAMESPACE, "vla_node", cmd_vel))
        nodes = DrillNodes(session, graph, DrillPanel.open(session.folder / "panel"), cmd_vel)
        nodes.require_silence()
        outcomes = []
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("drill", total=args.rounds * len(args.only))
            for number in range(1, args.rounds + 1):
                with contextlib.closing(run_round(nodes.start_node, args.only, run_fault)) as round_outcomes:
                    for outcome in round_outcomes:
                        outcomes.append(replace(outcome, round=number))
                        progress.console.print(_outcome_line(outcomes[-1]), highlight=False, soft_wrap=True)
                        progress.advance(task)
        return outcomes


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _catalogue_table(faults: Sequence[Fault]) -> Any:
    from rich.table import Table

    table = Table("fault", "how it is injected", "reason", "moves again")
    for fault in faults:
        reasons = " or ".join(reason.value for reason in fault.reasons) or "-"
        table.add_row(fault.name, fault.injection, reasons, fault.recovery.value)
    return table


def _outcome_table(faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> Any:
    """Return a table with a row for each fault: its worst round."""
    from rich.table import Table

    table = Table("fault", "how it was injected", "reaction ms", "deadline ms", "reason", "moved again")
    for fault in faults:
        worst = max((outcome for outcome in outcomes if outcome.fault == fault.name), key=badness)
        style = "red" if worst.misses else None
        reaction, deadline = _milliseconds(worst.reaction_ms), _milliseconds(worst.deadline_ms)
        table.add_row(fault.name, fault.injection, reaction, deadline, worst.reason, worst.recovered, style=style)
    return table


def _outcome_line(outcome: Outcome) -> str:
    verdict = f"MISSED: {'; '.join(outcome.misses)}" if outcome.misses else outcome.recovered
    times = f"{_milliseconds(outcome.reaction_ms):>5} of {_milliseconds(outcome.deadline_ms):>5} ms"
    return f"{outcome.round:>3}  {outcome.fault:<22}{times}  {outcome.reason:<20}{verdict}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
