"""`mobile_vla bench node`: the real node under load, with a stand-in for its policy whose step takes a given time.

It measures the gaps in cmd_vel, CPU and memory, what the node did with every frame, and how long it takes from an image
to its command.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

import psutil

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.session import NodeSession
from mobile_vla_inference.tools.arguments import positive_number
from mobile_vla_inference.tools.bench import node_rig, node_worker
from mobile_vla_inference.tools.bench.machine import describe_machine, machine_line
from mobile_vla_inference.tools.bench.node_figures import (
    STAGES,
    account,
    deviation,
    gaps_ms,
    is_flat,
    reactions_ms,
    summarize,
)
from mobile_vla_inference.tools.bench.usage import UsageProbe, sampling

if TYPE_CHECKING:
    from mobile_vla_inference.tools.bench.node_graph import BenchGraph

HELP = "the node under load: gaps in cmd_vel, CPU, memory, time from image to command, images stepped and dropped"
INPUTS = ()

#: The limits that docs/benchmarks.md compares with.
GAP_LIMIT_MS = 70.0
FLAT_LIMIT_MIB = 5.0

#: A frame that waits or is being stepped when the camera stops has to be accounted for within a step and this long.
_SETTLE_LIMIT_S = 5.0
#: Part of a soak that counts as warm-up.
_WARM_UP_FRACTION = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--seconds",
        type=positive_number,
        default=30.0,
        metavar="S",
        help="duration of the measurement, seconds (default: %(default)g)",
    )
    node_rig.add_arguments(parser, step_time_ms=300.0)
    parser.add_argument(
        "--busy",
        action="store_true",
        help="let the simulated step use a CPU core; otherwise it only waits, as for a GPU",
    )
    parser.add_argument(
        "--soak", action="store_true", help=f"fail unless memory stays within {FLAT_LIMIT_MIB:g} MiB and nothing leaks"
    )


# ---- the measurement -------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the processes and return the report; raise MobileVlaError if the node can't be measured."""
    report = {"options": node_rig.given_options(args), "machine": describe_machine(), **_measure(args)}
    report["misses"] = find_misses(report, args.soak)
    return report


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    with NodeSession("bench") as session, session.interruptible():
        from mobile_vla_inference.tools.bench.node_graph import BenchGraph

        rig = node_rig.NodeRig(session, args, BenchGraph, "node_process", computes=args.busy)
        graph = rig.graph
        probes = {"node": UsageProbe(rig.node.pid), "worker": UsageProbe(_worker_pid(rig.node.pid))}
        since_s, until_s = _put_under_load(args, session, graph, probes)
        session.end(rig.camera)
        counted = graph.diagnostics_count
        session.wait_until(
            lambda: graph.diagnostics_count > counted and account(graph.facts)["missing"] == 0,
            args.step_time_ms / 1e3 + _SETTLE_LIMIT_S,
        )
        frames = account(graph.facts)
        held = set().union(*(probe.shared_files for probe in probes.values()))
        session.end()
        images, commands, arrivals = (rig.record(name) for name in ("images", "commands", "arrivals"))
    in_window = [image for image in images if since_s <= image["published_s"] <= until_s]
    reactions = reactions_ms(in_window, commands, arrivals, since_s)
    return {
        "measured_s": until_s - since_s,
        "images_published": len(images),
        "images_hz": len(in_window) / (until_s - since_s),
        "camera_late_ms": summarize(1e3 * image["late_s"] for image in in_window),
        "service_hz": graph.calls / (until_s - since_s),
        "service_ms": summarize(1e3 * answer_s for answer_s in graph.answers_s),
        "gap_ms": summarize(gaps_ms([arrival["arrived_s"] for arrival in arrivals], since_s, until_s)),
        "gap_at_node_ms": summarize(gaps_ms([c["published_s"] for c in commands], since_s, until_s)),
        "reactions": len(reactions),
        "reaction_ms": {name: summarize(reaction[name] for reaction in reactions) for name in ("total", *STAGES)},
        "frames": frames,
        "processes": {name: probe.figures(args.seconds * _WARM_UP_FRACTION) for name, probe in probes.items()},
        "left_behind": [f"process {probe.pid}" for probe in probes.values() if psutil.pid_exists(probe.pid)]
        + [str(file) for file in sorted(held) if file.exists()],
    }


def _worker_pid(node_pid: int) -> int:
    for child in psutil.Process(node_pid).children():
        if node_worker.__name__ in child.cmdline():
            return child.pid
    raise MobileVlaError("the node's worker process has ended, expected it to run; see its log")


def _put_under_load(
    args: argparse.Namespace, session: NodeSession, graph: BenchGraph, probes: dict[str, UsageProbe]
) -> tuple[float, float]:
    """Call services and sample the processes for `--seconds`; return when that began and ended."""
    from tqdm import tqdm

    if args.service_rate_hz > 0.0:
        graph.call_services(args.service_rate_hz)
    with sampling(probes.values()), tqdm(total=round(args.seconds), unit="s", desc="bench node", disable=None) as bar:
        since_s = time.monotonic()
        session.listen(args.seconds, meanwhile=lambda: bar.update(int(time.monotonic() - since_s) - bar.n))
        until_s = time.monotonic()
    graph.end_calls()
    return since_s, until_s


# ---- the verdict -----------------------------------------------------------------------------------------------------


def find_misses(report: dict[str, Any], soak: bool) -> list[str]:
    """Return what is wrong: frames that are not accounted for, and in a soak what is not flat or left behind."""
    misses = []
    if report["frames"]["missing"]:
        misses.append(f"{report['frames']['missing']} frames are not accounted for")
    if not soak:
        return misses
    tolerances = {"resident_mib": FLAT_LIMIT_MIB, "shared_mib": FLAT_LIMIT_MIB, "threads": 0.5, "descriptors": 0.5}
    for name, figures in report["processes"].items():
        for what, tolerance in tolerances.items():
            series = figures["drift"][what]
            if not is_flat(series, tolerance):
                found = "too short to tell" if series is None else f"off by {deviation(series):.1f}"
                misses.append(f"{what} of the {name} is not flat ({found})")
    return misses + [f"{what} was left behind" for what in report["left_behind"]]


def passed(report: dict[str, Any]) -> bool:
    """Whether every frame is accounted for, and a soak is flat."""
    return not report["misses"]


# ---- what is shown ---------------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any]) -> None:
    """Print the figures, and what is wrong."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(machine_line(report["machine"]))
    console.print(
        f"{report['measured_s']:.0f} s, images at {report['images_hz']:.1f} Hz, services at "
        f"{report['service_hz']:.1f} Hz, {report['reactions']} reactions"
    )
    table = Table("ms", "p50", "p95", "p99", "max")
    rows = {
        f"gap in cmd_vel (limit {GAP_LIMIT_MS:g})": report["gap_ms"],
        "the same, as published": report["gap_at_node_ms"],
        "wake-up delay of the camera process": report["camera_late_ms"],
        "service call": report["service_ms"],
        "image to command, without the step": report["reaction_ms"]["total"],
        **{f"  {name}": report["reaction_ms"][name] for name in STAGES},
    }
    for title, figures in rows.items():
        table.add_row(title, *(("-",) * 4 if figures is None else [f"{value:.2f}" for value in figures.values()]))
    console.print(table)
    usage = Table("", "CPU % of a core", "resident MiB", "shared MiB", "threads", "descriptors", "MiB/h")
    for name, figures in report["processes"].items():
        slope = figures["drift"]["resident_mib"]
        usage.add_row(
            name,
            f"{figures['cpu_percent']:.1f}",
            f"{figures['resident_mib_max']:.1f}",
            f"{figures['shared_mib_max']:.1f}",
            str(figures["threads_max"]),
            str(figures["descriptors_max"]),
            "-" if slope is None else f"{slope['slope_per_hour']:+.1f}",
        )
    console.print(usage)
    frames = report["frames"]
    dropped = ", ".join(f"{count} {cause}" for cause, count in frames["dropped"].items()) or "none dropped"
    console.print(
        f"frames: {report['images_published']} published, {frames['received']} received = {frames['stepped']} stepped "
        f"+ {dropped} + {frames['missing']} missing"
    )
    for miss in report["misses"]:
        console.print(miss, style="red")
