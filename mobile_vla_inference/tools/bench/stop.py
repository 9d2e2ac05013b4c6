"""`mobile_vla bench stop`: how long a stop takes on a busy machine, many times, next to what the machine itself does.

Other processes compute on every core meanwhile. A stop is timed from `true` on the stop topic to the first zero that
arrives at the base. One more process only sleeps, and writes down how late it woke.
"""

from __future__ import annotations

import argparse
import random
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mobile_vla_inference.harness.processes import ChildProcess
from mobile_vla_inference.harness.session import NodeSession
from mobile_vla_inference.tools.arguments import count
from mobile_vla_inference.tools.bench import node_rig, stop_wakeups
from mobile_vla_inference.tools.bench.machine import describe_machine, machine_line
from mobile_vla_inference.tools.bench.node_figures import summarize
from mobile_vla_inference.tools.drill.judge import REACTION_LIMIT_S

if TYPE_CHECKING:
    from mobile_vla_inference.tools.bench.stop_graph import StopGraph

HELP = "stops under load: from `true` on the stop topic to the first zero at the base"
INPUTS = ()

#: A stop that takes longer counts as one without a zero.
_ZERO_LIMIT_S = 5.0
_MOTION_LIMIT_S = 20.0
#: The robot drives for a random time up to this before it is stopped, so that a stop meets every phase of the pulse.
_DRIVE_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--stops", type=count, default=500, metavar="N", help="number of stops (default: %(default)s)")
    parser.add_argument(
        "--busy",
        type=_processes,
        default=4,
        metavar="N",
        help="number of processes that keep a core busy (default: %(default)s)",
    )
    node_rig.add_arguments(parser, step_time_ms=50.0)


def _processes(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not a number of processes, expected 0 or more")
    return int(text)


# ---- the measurement -------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the processes and return the report; raise MobileVlaError if the node can't be measured."""
    report = {"options": node_rig.given_options(args), "machine": describe_machine()}
    with NodeSession("bench") as session, session.interruptible():
        from mobile_vla_inference.tools.bench.stop_graph import StopGraph

        rig = node_rig.NodeRig(session, args, StopGraph, "stop_process")
        graph, folder = rig.graph, session.folder
        for number in range(args.busy):
            name = f"busy{number}"
            session.add(lambda name=name: ChildProcess(name, ["-c", "while True: pass"], folder / f"{name}.log"))
        clock = ["-m", stop_wakeups.__name__, str(folder / "wakeups")]
        session.add(lambda: ChildProcess("clock", clock, folder / "clock.log"))
        if args.service_rate_hz > 0.0:
            graph.call_services(args.service_rate_hz)
        since_s = time.monotonic()
        stops_s = _stop_many_times(session, graph, args.stops)
        until_s = time.monotonic()
        graph.end_calls()
        session.end()
        arrivals, images = rig.record("arrivals"), rig.record("images")
        wakeups_s = np.fromfile(folder / "wakeups", dtype=np.float32)
    reactions_s, unusable = reactions(stops_s, arrivals)
    found_ms = [1e3 * reaction_s for reaction_s in reactions_s if reaction_s is not None]
    return {
        **report,
        "measured_s": until_s - since_s,
        "stops": len(reactions_s),
        "without_zero": reactions_s.count(None),
        "already_standing": unusable,
        "late": sum(reaction_ms > 1e3 * REACTION_LIMIT_S for reaction_ms in found_ms),
        "stop_ms": summarize(found_ms),
        "wakeups": len(wakeups_s),
        "wakeup_ms": summarize(1e3 * wakeups_s.astype(float)),
        "images_hz": sum(since_s <= image["published_s"] <= until_s for image in images) / (until_s - since_s),
        "service_hz": graph.calls / (until_s - since_s),
    }


def _stop_many_times(session: NodeSession, graph: StopGraph, number: int) -> list[float]:
    """Stop the robot and enable it again; return when it was stopped, each time."""
    from tqdm import tqdm

    phases = random.Random(0)
    stops_s = []
    for _ in tqdm(range(number), unit="stop", desc="bench stop", disable=None):
        session.listen(phases.uniform(0.0, _DRIVE_S))
        stops_s.append(graph.stop())
        session.wait_until(graph.is_zero, _ZERO_LIMIT_S)
        graph.release()
        session.wait_for("the robot to move again after ~/enable", graph.is_driving, _MOTION_LIMIT_S)
    return stops_s


def reactions(stops_s: Sequence[float], arrivals: Sequence[Mapping[str, float]]) -> tuple[list[float | None], int]:
    """Return how long each stop took, in seconds, and how many can't be judged because the robot already stood.

    Args:
        stops_s: when each was sent.
        arrivals: `arrived_s` and `linear_x_mps` of each command that arrived, in order.

    Returns:
        From a stop to the first zero that arrived; None if none arrived within 5 s or before the next stop.
    """
    times_s = [arrival["arrived_s"] for arrival in arrivals]
    taken, standing = [], 0
    for stop_s, next_s in zip(stops_s, [*stops_s[1:], float("inf")]):
        first = bisect_left(times_s, stop_s)
        if first == 0 or arrivals[first - 1]["linear_x_mps"] == 0.0:
            standing += 1
            continue
        last = bisect_left(times_s, min(next_s, stop_s + _ZERO_LIMIT_S))
        zeros = (arrival["arrived_s"] for arrival in arrivals[first:last] if arrival["linear_x_mps"] == 0.0)
        zero_s = next(zeros, None)
        taken.append(None if zero_s is None else zero_s - stop_s)
    return taken, standing


def passed(report: dict[str, Any]) -> bool:
    """Whether every stop brought a zero."""
    return report["without_zero"] == 0


# ---- what is shown ---------------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any]) -> None:
    """Print the figures."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(machine_line(report["machine"]))
    console.print(
        f"{report['measured_s']:.0f} s, {report['options']['busy']} busy processes, images at "
        f"{report['images_hz']:.1f} Hz, services at {report['service_hz']:.1f} Hz"
    )
    table = Table("ms", "p50", "p95", "p99", "max", "count")
    for title, figures, number in (
        ("stop to the first zero", report["stop_ms"], report["stops"]),
        ("wake-up delay of a sleeping process", report["wakeup_ms"], report["wakeups"]),
    ):
        table.add_row(
            title, *(("-",) * 4 if figures is None else [f"{value:.2f}" for value in figures.values()]), str(number)
        )
    console.print(table)
    console.print(
        f"{report['stops']} stops, {report['late']} of them later than {1e3 * REACTION_LIMIT_S:g} ms, "
        f"{report['without_zero']} without a zero; {report['already_standing']} more when the robot already stood still"
    )
