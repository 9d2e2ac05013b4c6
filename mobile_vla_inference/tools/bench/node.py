"""`mobile_vla bench node`: the real node under load, with a stand-in for the policy whose step takes a given time.

The node, its worker, a camera, a base and this benchmark are processes of their own on a ROS 2 graph of their own.
Measured are the gaps in cmd_vel, CPU and memory, what became of every frame, and how long an image takes to become a
command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness import domain as ros_environment
from mobile_vla_inference.harness.domain import require_rclpy
from mobile_vla_inference.harness.interrupts import Cleanup
from mobile_vla_inference.harness.processes import NodeProcess
from mobile_vla_inference.tools.arguments import check_output
from mobile_vla_inference.tools.bench import node_worker as bench_node_worker
from mobile_vla_inference.tools.bench.images_profile import images_profile
from mobile_vla_inference.tools.bench.machine import describe_machine, machine_line, read_memory_mib
from mobile_vla_inference.tools.bench.node_figures import (
    STAGES,
    account,
    deviation,
    drift,
    gaps_ms,
    is_flat,
    reactions_ms,
    summarize,
)

if TYPE_CHECKING:
    from mobile_vla_inference.tools.bench.node_graph import BenchGraph

HELP = "the node under load: gaps in cmd_vel, CPU, memory, reaction time, frame accounting"

EXIT_MISSED = 1

#: What the node is to keep, as docs/benchmarks.md compares.
GAP_LIMIT_MS = 70.0
FLAT_LIMIT_MIB = 5.0

INSTRUCTION = "go to the cup"
_NODE_MODULE = "mobile_vla_inference.tools.bench.node_process"
BASE_MODULE = "mobile_vla_inference.tools.bench.node_base"
_CAMERA_MODULE = "mobile_vla_inference.tools.bench.node_camera"

_START_LIMIT_S = 60.0
STOP_LIMIT_S = 10.0
#: What waits or is being stepped when the camera stops has to be accounted for within a step and this long.
_SETTLE_LIMIT_S = 5.0
_SPIN_S = 0.1
_USAGE_PERIOD_S = 0.5
#: Part of a soak that counts as warm-up.
_WARM_UP_FRACTION = 0.2
#: Segments of Fast DDS, which belong to one process each; its ports are everybody's.
_DDS_SEGMENT = re.compile(r"/dev/shm/fast(dds|rtps)_[0-9a-f]{16}(_el)?$")


@dataclass(frozen=True)
class Usage:
    """What a process holds at one time."""

    time_s: float
    resident_mib: float
    shared_mib: float
    threads: int
    descriptors: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--seconds", type=_positive, default=30.0, metavar="S", help="how long (default: %(default)g)")
    add_camera_arguments(parser)
    parser.add_argument(
        "--step-time-ms", type=_positive, default=300.0, metavar="MS", help="of a policy step (default: %(default)g)"
    )
    parser.add_argument("--busy", action="store_true", help="let the step compute on a core, not wait as for a GPU")
    parser.add_argument(
        "--soak", action="store_true", help=f"fail unless memory stays within {FLAT_LIMIT_MIB:g} MiB and nothing leaks"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")


def add_camera_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the images are like, and how often services are called meanwhile."""
    parser.add_argument("--width", type=int, default=1280, metavar="PX", help="of the images (default: %(default)s)")
    parser.add_argument("--height", type=int, default=720, metavar="PX", help="of the images (default: %(default)s)")
    parser.add_argument(
        "--encoding", choices=("bgr8", "rgb8", "bgra8", "mono8"), default="bgr8", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--rate-hz", type=_positive, default=30.0, metavar="HZ", help="rate of the images (default: %(default)g)"
    )
    parser.add_argument(
        "--service-rate-hz", type=_rate, default=50.0, metavar="HZ", help="of calls; 0: none (default: %(default)g)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; return 1 where frames are unaccounted for or a soak is not flat, else 0.

    Raises:
        MobileVlaError: an option can't be used, or the node could not be brought to motion.
    """
    check_output(args.json)
    require_rclpy()
    options = {name: value for name, value in vars(args).items() if name not in ("json", "run", "run_bench")}
    report = {"options": options, "machine": describe_machine(), **_measure(args)}
    report["misses"] = _misses(report, args.soak)
    _print_report(report)
    if args.json is not None:
        write_text_atomically(args.json, json.dumps(report, indent=2) + "\n")
    return EXIT_MISSED if report["misses"] else 0


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0.0):
        raise argparse.ArgumentTypeError(f"{text} can't be used, expected a number above 0")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0.0):
        raise argparse.ArgumentTypeError(f"{text} is no rate, expected 0 or more")
    return value


# ---- the measurement -------------------------------------------------------------------------------------------------


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the processes and return the figures."""
    from mobile_vla_inference.tools.bench.node_graph import BenchGraph

    with Cleanup() as cleanup, cleanup.interruptible():
        domain = ros_environment.isolate()
        cleanup.callback(domain.close)
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mobile_vla_bench.")))
        step_s = args.step_time_ms / 1e3
        os.environ |= {
            bench_node_worker.STEP_VARIABLE: str(step_s),
            bench_node_worker.BUSY_VARIABLE: str(int(args.busy)),
            bench_node_worker.RECORD_VARIABLE: str(folder / "commands"),
        }
        closed = cleanup.enter_context(contextlib.ExitStack())
        with cleanup.held():
            graph = BenchGraph("vla_node", INSTRUCTION)
            closed.callback(graph.close)
            node = NodeProcess("vla_node", _NODE_MODULE, node_parameters(step_s), folder / "vla_node.log")
            closed.callback(node.stop, STOP_LIMIT_S)
            base = NodeProcess("base", BASE_MODULE, {"record": str(folder / "arrivals")}, folder / "base.log")
            closed.callback(base.stop, STOP_LIMIT_S)
            camera = start_camera(args, folder)
            closed.callback(camera.stop, STOP_LIMIT_S)
        await_motion(graph, [node, base, camera])
        probes = {"node": UsageProbe(node.pid), "worker": UsageProbe(_worker_pid(node.pid))}
        since_s, until_s = _put_under_load(args, graph, probes, [node, base, camera])
        camera.stop(STOP_LIMIT_S)
        frames = _settle(graph, step_s + _SETTLE_LIMIT_S)
        held = set().union(*(probe.shared_files for probe in probes.values()))
        pids = [node.pid, probes["worker"].pid]
        with cleanup.held():
            closed.close()
        images, commands, arrivals = (read_record(folder / name) for name in ("images", "commands", "arrivals"))
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
        "left_behind": [f"process {pid}" for pid in pids if psutil.pid_exists(pid)]
        + [str(file) for file in sorted(held) if file.exists()],
    }


def node_parameters(step_s: float) -> dict[str, str | float]:
    """Return parameters with which the stand-in's commands reach the base as they are."""
    return {
        "checkpoint": "stand-in",
        "device": "cpu",
        "step_timeout_s": max(2.0, 3.0 * step_s),
        "max_linear_acceleration_mps2": 50.0,
    }


def start_camera(args: argparse.Namespace, folder: Path) -> NodeProcess:
    """Start the camera as `add_camera_arguments` says; its record is the file `images` of a folder."""
    parameters = {
        "width": args.width,
        "height": args.height,
        "encoding": args.encoding,
        "rate_hz": args.rate_hz,
        "record": str(folder / "images"),
    }
    with images_profile(folder):
        return NodeProcess("camera", _CAMERA_MODULE, parameters, folder / "camera.log")


def await_motion(graph: BenchGraph, processes: list[NodeProcess]) -> None:
    """Wait until the node drives; raise MobileVlaError where a process ends or it does not."""
    deadline_s = time.monotonic() + _START_LIMIT_S
    while graph.moving_since_s is None:
        graph.spin(_SPIN_S)
        require_alive(processes)
        if time.monotonic() > deadline_s:
            raise MobileVlaError(f"the node did not drive within {_START_LIMIT_S:g} s, it says: {graph.advice}")


def require_alive(processes: list[NodeProcess]) -> None:
    """Raise MobileVlaError, with its last error, where a process has ended."""
    faults = [fault for process in processes if (fault := process.fault()) is not None]
    if faults:
        raise MobileVlaError(faults[0])


def _worker_pid(node_pid: int) -> int:
    for child in psutil.Process(node_pid).children():
        if bench_node_worker.__name__ in child.cmdline():
            return child.pid
    raise MobileVlaError("the node has no worker process any more; see its log")


def _put_under_load(
    args: argparse.Namespace, graph: BenchGraph, probes: dict[str, UsageProbe], processes: list[NodeProcess]
) -> tuple[float, float]:
    """Call services and sample the processes for the time asked for; return when that began and ended."""
    from tqdm import tqdm

    if args.service_rate_hz > 0.0:
        graph.call_services(args.service_rate_hz)
    with _sampling(probes), tqdm(total=round(args.seconds), unit="s", desc="bench node", disable=None) as bar:
        since_s = time.monotonic()
        while (elapsed_s := time.monotonic() - since_s) < args.seconds:
            graph.spin(min(_SPIN_S, args.seconds - elapsed_s))
            require_alive(processes)
            bar.update(int(elapsed_s) - bar.n)
        until_s = time.monotonic()
    graph.end_calls()
    return since_s, until_s


def _settle(graph: BenchGraph, limit_s: float) -> dict[str, Any]:
    """Wait until every frame is accounted for, or for `limit_s`; return what became of them."""
    deadline_s = time.monotonic() + limit_s
    counted = graph.diagnostics_count
    while True:
        graph.spin(_SPIN_S)
        frames = account(graph.facts)
        settled = graph.diagnostics_count > counted and frames["missing"] == 0
        if settled or time.monotonic() > deadline_s:
            return frames


def read_record(path: Path) -> list[dict[str, float]]:
    """Return the entries of a record that a process has written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def _sampling(probes: dict[str, UsageProbe]) -> Iterator[None]:
    """Sample what processes hold, from a thread: what arrives meanwhile keeps its time."""
    ended = threading.Event()

    def sample() -> None:
        while True:
            for probe in probes.values():
                probe.sample()
            if ended.wait(_USAGE_PERIOD_S):
                break

    thread = threading.Thread(target=sample, name="usage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class UsageProbe:
    """Sample CPU time, memory, threads, descriptors and shared memory of a process.

    Attributes:
        pid: the process.
        samples: what it held, in order of time.
        shared_files: segments of Fast DDS in shared memory that it mapped.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.samples: list[Usage] = []
        self.shared_files: set[Path] = set()
        self._process = psutil.Process(pid)
        self._cpu: list[tuple[float, float]] = []

    def sample(self) -> None:
        """Take a sample; none where the process has ended."""
        now_s = time.monotonic()
        with contextlib.suppress(psutil.Error, OSError, KeyError):
            memory, times = read_memory_mib(self.pid), self._process.cpu_times()
            resident_mib = memory["anonymous"] + memory["file"] + memory["shared"]
            maps = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
            self.shared_files |= {Path(line.split()[-1]) for line in maps if _DDS_SEGMENT.search(line)}
            threads, descriptors = self._process.num_threads(), self._process.num_fds()
            self.samples.append(Usage(now_s, resident_mib, memory["shared"], threads, descriptors))
            self._cpu.append((now_s, times.user + times.system))

    def figures(self, warm_up_s: float) -> dict[str, Any]:
        """Return CPU in percent of a core, the most memory, and how flat everything is after a warm-up."""
        (first_s, first_cpu_s), (last_s, last_cpu_s) = self._cpu[0], self._cpu[-1]
        times_s = [sample.time_s for sample in self.samples]
        names = ("resident_mib", "shared_mib", "threads", "descriptors")
        series = {name: [getattr(sample, name) for sample in self.samples] for name in names}
        return {
            "cpu_percent": 100.0 * (last_cpu_s - first_cpu_s) / max(last_s - first_s, 1e-9),
            **{f"{name}_max": max(values) for name, values in series.items()},
            "drift": {name: drift(times_s, values, warm_up_s) for name, values in series.items()},
        }


# ---- the verdict -----------------------------------------------------------------------------------------------------


def _misses(report: dict[str, Any], soak: bool) -> list[str]:
    """Return what is wrong: frames that nothing accounts for, and in a soak what is not flat or left behind."""
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


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _print_report(report: dict[str, Any]) -> None:
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
        "the machine: camera woken late": report["camera_late_ms"],
        "service call": report["service_ms"],
        "image to command, less the step": report["reaction_ms"]["total"],
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
