"""`mobile_vla demo`: the real node and a simulated robot as processes on a ROS 2 graph of their own.

The small policy that comes with the package follows one instruction after the other in the simulated world. The robot's
camera feeds `vla_node`, whose `cmd_vel` drives the robot. A live line shows rate, step time, command and memory; a
summary, with what became of each instruction, and a JSON file keep the figures. Nothing outlives the demo.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import CheckpointError, InstructionError, MobileVlaError
from mobile_vla_inference.frames import list_frames
from mobile_vla_inference.harness import domain as ros_environment
from mobile_vla_inference.harness.domain import require_rclpy
from mobile_vla_inference.harness.processes import NodeProcess, run_tool
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.sim.closed_loop import EpisodeTask
from mobile_vla_inference.sim.scenarios import EVALUATION_SEEDS_FROM, instruction
from mobile_vla_inference.tools.arguments import DEFAULT_INSTRUCTION, SMALL_POLICY, check_output

if TYPE_CHECKING:
    from mobile_vla_inference.tools.demo_graph import DemoGraph

HELP = "drive a simulated robot, or on frames of yours, with the real node, and show the figures"

DEFAULT_SECONDS = 45.0
#: The worlds that the robot drives in, over and over: both kinds of instruction, both sides, both languages.
_WORLDS = (
    ("1box_hori_left", 0, "en"),
    ("1box_vert_cone_right", 2, "ko"),
    ("2box_vert_right", 1, "ko"),
    ("2box_hori_cone_left", 3, "en"),
)
#: Where the tiny checkpoint of some tools is kept from one start to the next, below the working directory.
CACHE_FOLDER = Path(".demo")

_POLICY_SOURCES = Path(__file__).resolve().parent.parent / "policy"
_START_LIMIT_S = 120.0
_FRAME_RATE_HZ = 20.0
_SPIN_S = 0.1
_TERMINAL_PERIOD_S = 0.2
_LOG_PERIOD_S = 1.0
#: Diagnostics come at 1 Hz: the demo ends with the first ones after its time, or without them after this long.
_LAST_DIAGNOSTICS_S = 2.0
_STOP_LIMIT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--seconds",
        type=_positive_seconds,
        default=DEFAULT_SECONDS,
        metavar="S",
        help="how long to drive, from the first command of motion (default: %(default)g)",
    )
    parser.add_argument(
        "--frames",
        type=Path,
        metavar="DIR",
        help=f"publish the images of a folder at {_FRAME_RATE_HZ:g} Hz, in name order, instead of a simulated camera's",
    )
    parser.add_argument(
        "--instruction",
        type=check_instruction,
        metavar="TEXT",
        help=f"what to do, in one world or on the frames (default: a tour of worlds, or {DEFAULT_INSTRUCTION!r})",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="CK", help="a policy of yours (default: the small one that comes along)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 0 where the robot was driven and every process lived.

    Raises:
        MobileVlaError: an argument can't be used, or the robot was not driven to the end; says why.
        KeyboardInterrupt: stopped before the robot moved.
    """
    _check(args)
    require_rclpy()
    checkpoint = SMALL_POLICY if args.checkpoint is None else args.checkpoint
    with _stop_requests() as stop_requested:
        summary, fault = _drive(args, checkpoint.resolve(), stop_requested)
    _print_summary(summary)
    drove = summary["final_command"] is not None and bool(summary["commands_published"])
    if args.json is not None and (drove or fault is not None):  # after an early Ctrl-C, a former file tells more
        write_text_atomically(args.json, json.dumps(summary, indent=2) + "\n")
    if fault is not None:
        raise MobileVlaError(fault)
    if not drove:
        raise KeyboardInterrupt
    return 0


def default_checkpoint(cache: Path) -> Path:
    """Return a tiny checkpoint of random weights; make it where the cache has none by the present code."""
    folder = cache / f"tiny-hybrid-{_policy_digest()}"
    checkpoint = folder / "tiny_hybrid.pth"
    if folder.is_dir():
        return checkpoint
    print("making a tiny checkpoint with random weights (once)", flush=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
    except OSError as error:
        raise MobileVlaError(
            f"{cache.resolve()} can't be written ({error.strerror}), expected a place for the demo's checkpoint; "
            "start the demo in a folder of yours or give --checkpoint"
        ) from error
    try:
        made = run_tool(
            ["make-checkpoint", str(work / checkpoint.name), "--size", "tiny", "--variant", "hybrid", "--seed", "0"]
        )
        if made.returncode != 0:
            last_line = (made.stderr.strip().splitlines() or [f"status {made.returncode}"])[-1]
            raise CheckpointError(
                f"the demo's checkpoint could not be made: {last_line.partition('error: ')[2] or last_line}"
            )
        # A rename is all or nothing; where another process was first, its checkpoint is the same.
        try:
            work.rename(folder)
        except OSError:
            if not checkpoint.exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return checkpoint


def _policy_digest() -> str:
    """Digest the code that makes and reads checkpoints, so that a change of it makes another one."""
    digest = hashlib.sha256()
    for source in sorted(_POLICY_SOURCES.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0.0):
        raise argparse.ArgumentTypeError(f"{text} is no time, expected seconds above 0")
    return seconds


def _check(args: argparse.Namespace) -> None:
    """Refuse, before anything is started, what can't be used."""
    if args.instruction is not None and not check_instruction(args.instruction):
        raise InstructionError("the instruction is empty, expected a sentence: the robot stands still without one")
    if args.frames is not None:
        list_frames(args.frames)
    if args.checkpoint is not None and not args.checkpoint.exists():
        raise CheckpointError(f"{args.checkpoint} does not exist, expected a checkpoint file or folder; check the path")
    if args.checkpoint is not None and args.checkpoint.is_file() and args.checkpoint.stat().st_size == 0:
        raise CheckpointError(f"{args.checkpoint} is empty, expected a checkpoint; copy it again")
    check_output(args.json, args.frames, args.checkpoint)


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of being ended by them."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = [signal.signal(number, lambda caught, _: received.append(caught)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, former):
            signal.signal(number, handler)


def _drive(args: argparse.Namespace, checkpoint: Path, stop_requested: list[int]) -> tuple[dict[str, Any], str | None]:
    """Start the processes, watch them and stop them; return the summary and what went wrong, if anything."""
    from mobile_vla_inference.tools.demo_graph import DemoGraph

    with contextlib.ExitStack() as cleanup:
        domain = ros_environment.isolate()
        cleanup.callback(domain.close)
        print(f"ROS_DOMAIN_ID={domain.domain_id}, on this machine only", flush=True)
        logs = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mobile_vla_demo.")))
        tour = _tour(args)
        world = {"scenario": tour[0].scenario, "seed": tour[0].seed} if tour else _camera(args)
        robot = NodeProcess("sim_robot", "mobile_vla_inference.ros.sim_robot", world, logs / "sim_robot.log")
        cleanup.callback(robot.stop, _STOP_LIMIT_S)
        node = NodeProcess(
            "vla_node", "mobile_vla_inference.ros.node", {"checkpoint": str(checkpoint)}, logs / "vla_node.log"
        )
        cleanup.callback(node.stop, _STOP_LIMIT_S)
        told = args.instruction or (tour[0].instruction if tour else DEFAULT_INSTRUCTION)
        graph = DemoGraph("vla_node", told, () if args.instruction else tour)
        cleanup.callback(graph.close)
        fault = _watch(graph, [node, robot], args.seconds, stop_requested)
        return _summary(graph), fault


def _tour(args: argparse.Namespace) -> list[EpisodeTask]:
    """Return the worlds to drive in; none on frames, or where nothing can draw them."""
    if args.frames is not None:
        return []
    if find_spec("panda3d") is None:
        print("Panda3D is not installed: an endless world in place of the one with boxes and a cup", flush=True)
        return []
    seeded = [(name, EVALUATION_SEEDS_FROM + seed, language) for name, seed, language in _WORLDS]
    return [EpisodeTask(name, seed, instruction(name, seed, "training", language)) for name, seed, language in seeded]


def _camera(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.frames is None else {"frames_dir": str(args.frames.resolve())}


def _watch(graph: DemoGraph, processes: list[NodeProcess], seconds: float, stop_requested: list[int]) -> str | None:
    """Watch until the time is over, a process ends or somebody asks to stop; return what went wrong, if anything."""
    line = _LiveLine()
    started_s = time.monotonic()
    try:
        while not stop_requested:
            graph.spin(_SPIN_S)
            for process in processes:
                if (fault := process.fault()) is not None:
                    return fault
            now_s = time.monotonic()
            if graph.moving_since_s is not None:
                line.show(f"{now_s - graph.moving_since_s:5.1f} s  {_driving_text(graph)}")
                if _is_over(graph, graph.moving_since_s + seconds):
                    return None
            elif now_s - started_s > _START_LIMIT_S:
                return f"the robot was not driven within {_START_LIMIT_S:g} s; vla_node says: {graph.advice}"
            else:
                line.show(f"{now_s - started_s:5.1f} s  {_starting_text(graph)}")
    finally:
        line.end()
    return None


def _is_over(graph: DemoGraph, end_s: float) -> bool:
    """Whether the time is over; the first diagnostics after it are waited for, so that counts and time agree."""
    if time.monotonic() < end_s:
        return False
    counted = graph.diagnostics_count
    while graph.diagnostics_count == counted and time.monotonic() < end_s + _LAST_DIAGNOSTICS_S:
        graph.spin(_SPIN_S)
    return True


class _LiveLine:
    """One line that is written over on a terminal; elsewhere a line a second."""

    def __init__(self) -> None:
        self._on_terminal = sys.stdout.isatty()
        self._period_s = _TERMINAL_PERIOD_S if self._on_terminal else _LOG_PERIOD_S
        self._shown_s = -math.inf

    def show(self, text: str) -> None:
        """Show a text if it is time."""
        if time.monotonic() - self._shown_s < self._period_s:
            return
        self._shown_s = time.monotonic()
        if self._on_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", flush=True)
        else:
            print(text, flush=True)

    def end(self) -> None:
        """Leave the line as it is."""
        if self._on_terminal:
            print(flush=True)


def _starting_text(graph: DemoGraph) -> str:
    if "state" not in graph.facts:
        return "starting the nodes"
    return f"policy: {graph.facts['state']}" + (f", robot: {graph.reason}" if graph.reason else "")


def _driving_text(graph: DemoGraph) -> str:
    summary = _summary(graph)
    command = summary["final_command"]
    return (
        f"{_shown(summary['cmd_vel_hz'], '.1f')} Hz  "
        f"step {_shown(summary['step_ms']['p50'], '.0f')} ms  "
        f"x {command['linear_x_mps']:+.2f} m/s, turn {command['angular_z_radps']:+.2f} rad/s  "
        f"node {_shown(summary['node_rss_mib'], '.0f')} MiB, worker {_shown(summary['worker_rss_mib'], '.0f')} MiB  "
        f"{graph.reason}  {graph.instruction}"
    )


def _summary(graph: DemoGraph) -> dict[str, Any]:
    """Return the figures so far: counts, latencies and memory by the node's diagnostics, the rate as measured here.

    `final_command` is the last velocity that arrived before the demo began to stop the node. What is not known is None.
    """

    def number(key: str, kind: type = float) -> Any:
        return kind(graph.facts[key]) if key in graph.facts else None

    twist = graph.last_command
    steps = number("steps", int) or 0
    return {
        "frames_received": number("frames_received", int) or 0,
        "frames_dropped": number("frames_dropped", int) or 0,
        "steps": steps,
        "commands_published": number("commands_published", int) or 0,
        "cmd_vel_hz": graph.command_rate_hz(),
        "step_ms": {name: number(f"step_ms_{name}") if steps else None for name in ("p50", "p95")},
        "node_rss_mib": number("node_rss_mib"),
        "worker_rss_mib": number("worker_rss_mib"),
        "final_command": None
        if graph.moving_since_s is None
        else {
            "linear_x_mps": twist.linear.x,
            "linear_y_mps": twist.linear.y,
            "angular_z_radps": twist.angular.z,
        },
        "episodes": graph.episodes,
    }


def _shown(value: float | None, spec: str) -> str:
    return "?" if value is None else format(value, spec)


def _print_summary(summary: dict[str, Any]) -> None:
    step_ms, command = summary["step_ms"], summary["final_command"]
    rows = {
        "frames received": summary["frames_received"],
        "frames dropped": f"{summary['frames_dropped']} (not stepped: the policy takes the newest)",
        "policy steps": summary["steps"],
        "step time": f"{_shown(step_ms['p50'], '.1f')} ms p50, {_shown(step_ms['p95'], '.1f')} ms p95",
        "commands published": summary["commands_published"],
        "cmd_vel": f"{_shown(summary['cmd_vel_hz'], '.1f')} Hz",
        "memory": f"node {_shown(summary['node_rss_mib'], '.0f')} MiB, "
        f"worker {_shown(summary['worker_rss_mib'], '.0f')} MiB",
        "final command": "none"
        if command is None
        else f"x {command['linear_x_mps']:+.3f} m/s, y {command['linear_y_mps']:+.3f} m/s, "
        f"turn {command['angular_z_radps']:+.3f} rad/s",
    }
    for name, value in rows.items():
        print(f"{name:<20}{value}")
    for episode in summary["episodes"]:
        print(f"{episode['outcome']:<20}{episode['path_m']:.1f} m, {episode['instruction']}")
