"""`mobile_vla demo`: the real node and a simulated robot as processes on a private ROS 2 graph.

The small policy of the package follows one instruction after the other in the simulated world. The robot's camera feeds
`vla_node`, whose `cmd_vel` drives the robot. A live line shows rate, step time, velocity and memory; a summary, with
the outcome of each instruction, and a JSON file keep the figures. All processes end with the demo.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_vla_inference.errors import CheckpointError, InstructionError, MobileVlaError
from mobile_vla_inference.frames import list_frames
from mobile_vla_inference.harness.domain import require_rclpy
from mobile_vla_inference.harness.session import NodeSession
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.sim.closed_loop import EpisodeTask
from mobile_vla_inference.sim.phrases import instruction
from mobile_vla_inference.sim.scenarios import EVALUATION_SEEDS_FROM
from mobile_vla_inference.tools.arguments import (
    DEFAULT_INSTRUCTION,
    SMALL_POLICY,
    add_json_argument,
    check_output,
    positive_number,
)
from mobile_vla_inference.tools.results import write_json
from mobile_vla_inference.units import shown

if TYPE_CHECKING:
    from mobile_vla_inference.tools.demo_graph import DemoGraph


DEFAULT_SECONDS = 45.0
#: The worlds of the tour, over and over: both kinds of instruction, both sides, both languages.
_WORLDS = (
    ("1box_hori_left", 0, "en"),
    ("1box_vert_cone_right", 2, "ko"),
    ("2box_vert_right", 1, "ko"),
    ("2box_hori_cone_left", 3, "en"),
)
#: Why vla_node steps on no frame although nothing is wrong with it; other causes of `dropped_*` are faults.
_SKIPPED = frozenset({"superseded", "inactive", "no_instruction", "worker_not_ready", "state_reset", "repeated_stamp"})

_START_LIMIT_S = 120.0
_FRAME_RATE_HZ = 20.0
_TERMINAL_PERIOD_S = 0.2
_LOG_PERIOD_S = 1.0
#: Diagnostics arrive at 1 Hz: the demo ends with the first ones after its time, or without them after this long.
_LAST_DIAGNOSTICS_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--seconds",
        type=positive_number,
        default=DEFAULT_SECONDS,
        metavar="S",
        help="duration of the drive, from the first motion, seconds (default: %(default)g)",
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
        help="one instruction, for one world or for --frames (default: several worlds with their own; for --frames "
        f"{DEFAULT_INSTRUCTION!r})",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="CK", help="checkpoint file or folder (default: the bundled small policy)"
    )
    add_json_argument(parser, "figures")


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 0 if the robot was driven and no process ended.

    Raises:
        MobileVlaError: an argument can't be used, or the robot was not driven to the end.
        KeyboardInterrupt: stopped before the robot moved.
    """
    _check(args)
    require_rclpy()
    summary, fault = _drive(args)
    drove = summary["final_command"] is not None and bool(summary["commands_published"])
    if drove or fault is not None:  # an early Ctrl-C keeps the figures of a former demo
        write_json(args.json, summary)
    if fault is not None:
        raise fault
    if not drove:
        raise KeyboardInterrupt
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that can't be used, before anything is started."""
    if args.instruction is not None and not check_instruction(args.instruction):
        raise InstructionError("the instruction is empty, expected a sentence: the robot stands still without one")
    if args.frames is not None:
        list_frames(args.frames)
    if args.checkpoint is not None and not args.checkpoint.exists():
        raise CheckpointError(f"{args.checkpoint} does not exist, expected a checkpoint file or folder; check the path")
    if args.checkpoint is not None and args.checkpoint.is_file() and args.checkpoint.stat().st_size == 0:
        raise CheckpointError(f"{args.checkpoint} is empty, expected a checkpoint; copy it again")
    check_output(args.json, args.frames, args.checkpoint)


def _drive(args: argparse.Namespace) -> tuple[dict[str, Any], MobileVlaError | None]:
    """Start the nodes, watch them and print the summary; return it, and what went wrong, if anything."""
    from mobile_vla_inference.tools.demo_graph import DemoGraph

    with NodeSession("demo") as session, session.interruptible():
        print(f"ROS_DOMAIN_ID={session.domain_id}, on this machine only", flush=True)
        tour = _tour(args)
        world = {"scenario": tour[0].scenario, "seed": tour[0].seed} if tour else _camera(args)
        checkpoint = SMALL_POLICY if args.checkpoint is None else args.checkpoint
        session.start("sim_robot", "mobile_vla_inference.ros.sim_robot", world)
        session.start("vla_node", "mobile_vla_inference.ros.node", {"checkpoint": str(checkpoint.resolve())})
        first = args.instruction or (tour[0].instruction if tour else DEFAULT_INSTRUCTION)
        graph = session.join(lambda: DemoGraph("vla_node", first, () if args.instruction else tour))
        fault = None
        try:
            _watch(session, graph, args.seconds)
        except MobileVlaError as error:
            fault = error
        except KeyboardInterrupt:
            pass  # a stop request ends the demo with its summary
        summary = _summary(graph)
        _print_summary(summary, graph)
        return summary, fault


def _tour(args: argparse.Namespace) -> list[EpisodeTask]:
    """Return the worlds to drive in; none on frames, or without Panda3D."""
    if args.frames is not None:
        return []
    if find_spec("panda3d") is None:
        print("Panda3D is not installed: an endless world instead of the one with boxes and a cup", flush=True)
        return []
    seeded = [(name, EVALUATION_SEEDS_FROM + seed, language) for name, seed, language in _WORLDS]
    return [EpisodeTask(name, seed, instruction(name, seed, "training", language)) for name, seed, language in seeded]


def _camera(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.frames is None else {"frames_dir": str(args.frames.resolve())}


def _watch(session: NodeSession, graph: DemoGraph, seconds: float) -> None:
    """Instruct the node and watch it until the time is over; raise MobileVlaError if the robot is not driven."""
    started_s = time.monotonic()
    with _live_line() as show:

        def starting() -> None:
            show(f"{time.monotonic() - started_s:5.1f} s  {_starting_text(graph)}")

        def driving() -> None:
            show(f"{time.monotonic() - graph.moving_since_s:5.1f} s  {_driving_text(graph)}")

        session.wait_for("vla_node to subscribe", graph.can_instruct, _START_LIMIT_S, meanwhile=starting)
        graph.begin()
        session.wait_for(
            "the robot to move", lambda: graph.moving_since_s is not None, _START_LIMIT_S, meanwhile=starting
        )
        session.listen(graph.moving_since_s + seconds - time.monotonic(), meanwhile=driving)
        counted = graph.diagnostics_count  # counts and time agree with the first diagnostics after the time
        session.wait_until(lambda: graph.diagnostics_count > counted, _LAST_DIAGNOSTICS_S, meanwhile=driving)


@contextmanager
def _live_line() -> Iterator[Callable[[str], None]]:
    """Return a function that shows a text: on a terminal always in the same line, elsewhere in a line each second."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    due_s = 0.0
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:

        def show(text: str) -> None:
            nonlocal due_s
            if time.monotonic() < due_s:
                return
            if live is not None:
                live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)
            else:
                console.print(text, markup=False)
            due_s = time.monotonic() + (_LOG_PERIOD_S if live is None else _TERMINAL_PERIOD_S)

        yield show


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

    `final_command` is the last velocity that arrived before the demo began to stop the node. An unknown figure is None.
    """

    def number(key: str, kind: type = float) -> Any:
        return kind(graph.facts[key]) if key in graph.facts else None

    twist = graph.command
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
    return shown(value, spec, unknown="?")


def _print_summary(summary: dict[str, Any], graph: DemoGraph) -> None:
    step_ms, command = summary["step_ms"], summary["final_command"]
    faulty = _faulty_frames(graph.facts)
    rows = {
        "frames received": summary["frames_received"],
        "frames skipped": f"{summary['frames_dropped'] - sum(faulty.values())} (each step takes the newest frame)",
        **({"frames refused": ", ".join(f"{count} {cause}" for cause, count in faulty.items())} if faulty else {}),
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
    if (unfinished_s := graph.unfinished_s()) is not None:
        print(f"{'unfinished':<20}after {unfinished_s:.0f} s, {graph.instruction}")


def _faulty_frames(facts: Mapping[str, str]) -> dict[str, int]:
    """Return cause -> count of the frames that the node could not use, by its diagnostics."""
    counts = {key.removeprefix("dropped_"): int(value) for key, value in facts.items() if key.startswith("dropped_")}
    return {cause: count for cause, count in counts.items() if count and cause not in _SKIPPED}
