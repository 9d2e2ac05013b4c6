"""`mobile_vla bench stop`: how long a stop takes on a busy machine, over and over, beside what the machine itself does.

The node, its worker, a camera, a base and this benchmark are processes of their own on a ROS 2 graph of their own, with
processes beside them that do nothing but compute. A stop is timed from `true` on the stop topic to the first zero that
arrives at the base. Meanwhile one more process only sleeps, and tells how late it woke.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness import domain as ros_environment
from mobile_vla_inference.harness.domain import require_rclpy
from mobile_vla_inference.harness.interrupts import Cleanup
from mobile_vla_inference.harness.processes import NodeProcess, die_with
from mobile_vla_inference.tools.arguments import check_output, count, positive_number
from mobile_vla_inference.tools.bench import node as bench_node
from mobile_vla_inference.tools.bench import node_worker as bench_node_worker
from mobile_vla_inference.tools.bench import stop_wakeups as bench_stop_wakeups
from mobile_vla_inference.tools.bench.machine import describe_machine, machine_line
from mobile_vla_inference.tools.bench.node_figures import summarize
from mobile_vla_inference.tools.drill.judge import REACTION_LIMIT_S

if TYPE_CHECKING:
    from mobile_vla_inference.tools.bench.stop_graph import StopGraph

HELP = "stops under load: from `true` on the stop topic to the first zero at the base"

EXIT_MISSED = 1

_NODE_MODULE = "mobile_vla_inference.tools.bench.stop_process"
#: A stop that takes longer brought no zero at all.
_ZERO_LIMIT_S = 5.0
_MOTION_LIMIT_S = 20.0
#: The robot drives for a random time up to this before it is stopped, so that a stop meets every phase of the pulse.
_DRIVE_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--stops", type=count, default=500, metavar="N", help="how often (default: %(default)s)")
    parser.add_argument(
        "--busy",
        type=_processes,
        default=4,
        metavar="N",
        help="processes that compute beside it (default: %(default)s)",
    )
    bench_node.add_camera_arguments(parser)
    parser.add_argument(
        "--step-time-ms",
        type=positive_number,
        default=50.0,
        metavar="MS",
        help="of a policy step (default: %(default)g)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; return 1 where a stop brought no zero, else 0.

    Raises:
        MobileVlaError: an option can't be used, or the node could not be brought to motion.
    """
    check_output(args.json)
    require_rclpy()
    options = {name: value for name, value in vars(args).items() if name not in ("json", "run", "run_bench")}
    report = {"options": options, "machine": describe_machine(), **_measure(args)}
    _print_report(report)
    if args.json is not None:
        write_text_atomically(args.json, json.dumps(report, indent=2) + "\n")
    return EXIT_MISSED if report["without_zero"] else 0


def _processes(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is no number of processes, expected 0 or more")
    return int(text)


# ---- the measurement -------------------------------------------------------------------------------------------------


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the processes and return the figures."""
    from mobile_vla_inference.tools.bench.stop_graph import StopGraph

    with Cleanup() as cleanup, cleanup.interruptible():
        cleanup.callback(ros_environment.isolate().close)
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mobile_vla_bench.")))
        step_s = args.step_time_ms / 1e3
        os.environ |= {bench_node_worker.STEP_VARIABLE: str(step_s), bench_node_worker.BUSY_VARIABLE: "0"}
        running = cleanup.enter_context(contextlib.ExitStack())
        with cleanup.held():
            graph = StopGraph("vla_node", bench_node.INSTRUCTION)
            running.callback(graph.close)
            record = {"record": str(folder / "arrivals")}
            node = NodeProcess("vla_node", _NODE_MODULE, bench_node.node_parameters(step_s), folder / "vla_node.log")
            running.callback(node.stop, bench_node.STOP_LIMIT_S)
            base = NodeProcess("base", bench_node.BASE_MODULE, record, folder / "base.log")
            running.callback(base.stop, bench_node.STOP_LIMIT_S)
            camera = bench_node.start_camera(args, folder)
            running.callback(camera.stop, bench_node.STOP_LIMIT_S)
        processes = [node, base, camera]
        bench_node.await_motion(graph, processes)
        with cleanup.held():
            for _ in range(args.busy):
                running.callback(_end, _start("-c", "while True: pass"))
            clock = _start("-m", bench_stop_wakeups.__name__, str(folder / "wakeups"))
            running.callback(_end, clock)
        if args.service_rate_hz > 0.0:
            graph.call_services(args.service_rate_hz)
        since_s = time.monotonic()
        stops_s = _stop_over_and_over(graph, args.stops, partial(bench_node.require_alive, processes))
        until_s = time.monotonic()
        with cleanup.held():
            graph.end_calls()
            running.close()
        arrivals = bench_node.read_record(folder / "arrivals")
        images = bench_node.read_record(folder / "images")
        wakeups_s = np.fromfile(folder / "wakeups", dtype=np.float32)
    reactions_s, unusable = reactions(stops_s, arrivals)
    found_ms = [1e3 * reaction_s for reaction_s in reactions_s if reaction_s is not None]
    return {
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


def _start(*arguments: str) -> subprocess.Popen:
    """Start a Python that ends with this process."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=partial(die_with, os.getpid()),
    )


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait()


def _stop_over_and_over(graph: StopGraph, number: int, require_alive: Callable[[], None]) -> list[float]:
    """Stop the robot and let it go again; return when it was stopped, each time."""
    from tqdm import tqdm

    phases = random.Random(0)
    stops_s = []
    for _ in tqdm(range(number), unit="stop", desc="bench stop", disable=None):
        require_alive()
        graph.spin(phases.uniform(0.0, _DRIVE_S))
        stops_s.append(graph.stop())
        graph.await_zero(_ZERO_LIMIT_S)
        graph.release()
        if not graph.await_motion(_MOTION_LIMIT_S):
            require_alive()
            raise MobileVlaError(
                f"the robot did not move again within {_MOTION_LIMIT_S:g} s of being enabled; it says: {graph.advice}"
            )
    return stops_s


def reactions(stops_s: Sequence[float], arrivals: Sequence[Mapping[str, float]]) -> tuple[list[float | None], int]:
    """Return how long each stop took, in seconds, and how many can't be judged because the robot stood already.

    Args:
        stops_s: when each was sent.
        arrivals: `arrived_s` and `linear_x_mps` of each command that arrived, in order.

    Returns:
        From a stop to the first zero that arrived; None where none came in 5 s or before the next stop.
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


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _print_report(report: dict[str, Any]) -> None:
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
        ("the machine: a sleeper woken late", report["wakeup_ms"], report["wakeups"]),
    ):
        table.add_row(
            title, *(("-",) * 4 if figures is None else [f"{value:.2f}" for value in figures.values()]), str(number)
        )
    console.print(table)
    console.print(
        f"{report['stops']} stops, {report['late']} of them later than {1e3 * REACTION_LIMIT_S:g} ms, "
        f"{report['without_zero']} without a zero; {report['already_standing']} more met a robot that stood already"
    )
