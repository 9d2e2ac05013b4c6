"""`mobile_vla drill`: inject every fault into the real node while it drives, and time how it stops the robot.

The node and its worker are the real ones, on a tiny checkpoint whose actions get a constant forward part, so that
motion is certain, and whose steps take longer than the node may take to stop. A fault is missed if the first zero
comes late, anything but zero follows, the reason is another one, or the robot does not come back as designed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness import domain as ros_environment
from mobile_vla_inference.harness.domain import require_rclpy
from mobile_vla_inference.harness.interrupts import Cleanup
from mobile_vla_inference.harness.processes import NodeProcess
from mobile_vla_inference.tools.arguments import check_output
from mobile_vla_inference.tools.bench.images_profile import images_profile
from mobile_vla_inference.tools.demo import CACHE_FOLDER, default_checkpoint
from mobile_vla_inference.tools.drill.catalogue import CATALOGUE
from mobile_vla_inference.tools.drill.judge import SpeedLimits, Verdict, judge, judge_rest
from mobile_vla_inference.tools.drill.rig import (
    FULL_SPEED_MPS,
    FULL_TURN_RADPS,
    IMAGE_TIMEOUT_S,
    INSTRUCTION,
    RESUME_WITHIN_S,
    STEP_TIMEOUT_S,
    STOP_HOLD_S,
    DrillError,
    Fault,
    Recovery,
    Rig,
)
from mobile_vla_inference.tools.drill.worker import PANEL_VARIABLE, DrillPanel

if TYPE_CHECKING:
    from rich.console import Console

    from mobile_vla_inference.tools.drill.graph import DrillGraph

HELP = "inject every fault into a running node and time how it stops the robot"

NAMESPACE = "/mobile_vla_drill"
EXIT_MISSED = 1

LIMITS = SpeedLimits(linear_x_mps=FULL_SPEED_MPS, linear_y_mps=FULL_SPEED_MPS, angular_z_radps=FULL_TURN_RADPS)
_NODE_PARAMETERS = {
    "image_timeout_s": IMAGE_TIMEOUT_S,
    "step_timeout_s": STEP_TIMEOUT_S,
    "resume_within_s": RESUME_WITHIN_S,
    "stop_hold_s": STOP_HOLD_S,
    "max_linear_x_mps": LIMITS.linear_x_mps,
    "max_linear_y_mps": LIMITS.linear_y_mps,
    "max_angular_z_radps": LIMITS.angular_z_radps,
}

_START_LIMIT_S = 120.0
_MOTION_LIMIT_S = 15.0
_STOP_LIMIT_S = 10.0
#: How long after its deadline a zero is still waited for, so that the table can tell how late it came.
_LATE_LIMIT_S = 3.0
#: How long a robot that must not come back is watched after ~/enable: an image and a step take less.
_REFUSED_S = 1.5
_STATUS_LIMIT_S = 1.0
#: Columns where the output is no terminal.
_LOG_WIDTH = 150
_ACTIVATE = 3  # lifecycle_msgs/msg/Transition


@dataclass(frozen=True)
class Outcome:
    """What one fault did in one round.

    Attributes:
        reaction_ms: from the injection (for a timeout: the last good frame or step) to the first zero; None: no zero.
        deadline_ms: what it may be at most: 100 ms, and the configured timeout where it is one.
        reason: the first reason that the node gave.
        recovered: how motion came back.
        misses: what went wrong; empty where all was right.
    """

    round: int
    fault: str
    injection: str
    reaction_ms: float | None
    deadline_ms: float | None
    reason: str
    recovered: str
    misses: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--list", action="store_true", help="list the faults and end")
    parser.add_argument("--only", type=_faults, metavar="NAME,...", default=CATALOGUE, help="inject only these")
    parser.add_argument("--rounds", type=_rounds, metavar="N", default=1, help="how often (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome to a file")
    parser.add_argument(
        "--cmd-vel",
        metavar="TOPIC",
        help="send the commands to this topic of the graph that the environment names, so that a real base follows: "
        "lift its wheels off the ground first (default: a graph of the drill's own)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the drill; return 0 where no fault was missed, else 1.

    Raises:
        MobileVlaError: the drill could not be run; says why.
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
    checkpoint = default_checkpoint(CACHE_FOLDER).resolve()
    outcomes = _run_rounds(args, checkpoint, console)
    console.print(_outcome_table(args.only, outcomes))
    missed = [outcome for outcome in outcomes if outcome.misses]
    for outcome in missed:
        console.print(f"round {outcome.round}, {outcome.fault}: {'; '.join(outcome.misses)}", style="red")
    console.print(f"{len(outcomes)} faults injected in {args.rounds} round(s), {len(missed)} missed")
    if args.json is not None:
        report = {
            "rounds": args.rounds,
            "faults": len(outcomes),
            "missed": len(missed),
            "parameters": _NODE_PARAMETERS,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        write_text_atomically(args.json, json.dumps(report, indent=2) + "\n")
    return EXIT_MISSED if missed else 0


def _faults(text: str) -> tuple[Fault, ...]:
    wanted = [name.strip() for name in text.split(",")]
    unknown = sorted(set(wanted) - {fault.name for fault in CATALOGUE})
    if unknown:
        raise argparse.ArgumentTypeError(f"no fault is called {', '.join(unknown)}; see `mobile_vla drill --list`")
    return tuple(fault for fault in CATALOGUE if fault.name in wanted)


def _rounds(text: str) -> int:
    rounds = int(text)
    if rounds < 1:
        raise argparse.ArgumentTypeError(f"{rounds} is no number of rounds, expected 1 or more")
    return rounds


# ---- the rounds ------------------------------------------------------------------------------------------------------


def _run_rounds(args: argparse.Namespace, checkpoint: Path, console: Console) -> list[Outcome]:
    """Run every round on one graph and return every outcome."""
    from rich.progress import Progress

    from mobile_vla_inference.tools.drill.graph import DrillGraph

    with Cleanup() as cleanup, cleanup.interruptible():
        if args.cmd_vel is None:
            domain = ros_environment.isolate()
            cleanup.callback(domain.close)
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mobile_vla_drill.")))
        os.environ[PANEL_VARIABLE] = str(folder / "panel")
        # Threads that share out a tiny step wait for each other: on a busy machine that took a second, which is a hang.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        cmd_vel = args.cmd_vel or "cmd_vel"
        # A node that is stopped keeps what the camera has put into shared memory; the default's 512 KiB are soon full,
        # and then no node is sent an image any more. Nobody's own profile is replaced on a real graph.
        room = images_profile(folder) if args.cmd_vel is None else contextlib.nullcontext()
        with cleanup.held(), room:
            graph = DrillGraph(NAMESPACE, "vla_node", cmd_vel)
            cleanup.callback(graph.close)
        bench = _Bench(graph, DrillPanel(folder / "panel"), checkpoint, cmd_vel, folder, cleanup)
        bench.require_silence()
        outcomes = []
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("drill", total=args.rounds * len(args.only))
            for number in range(1, args.rounds + 1):
                with contextlib.closing(_run_round(bench, args.only)) as round_outcomes:
                    for outcome in round_outcomes:
                        outcome = replace(outcome, round=number)
                        outcomes.append(outcome)
                        progress.console.print(_outcome_line(outcome), highlight=False, soft_wrap=True)
                        progress.advance(task)
        return outcomes


def _run_round(bench: _Bench, faults: Sequence[Fault]) -> Iterator[Outcome]:
    """Inject each fault once; faults that need the same node share it as long as it lives and is as it was.

    Raises:
        MobileVlaError: not even the first node could be started.
    """
    started = False
    for transport in ("raw", "compressed"):
        wanted = [fault for fault in faults if fault.transport == transport]
        with contextlib.ExitStack() as running:
            rig = None
            for fault in wanted:
                if rig is None:
                    try:
                        rig = running.enter_context(bench.start_node(transport))
                        started = True
                    except MobileVlaError as error:
                        if not started:
                            raise
                        yield _not_tried(fault, "", error)  # what was found before must not be lost
                        continue
                outcome = _run_fault(rig, fault)
                yield outcome
                # What went wrong must not spoil the faults after it.
                if outcome.misses or rig.node.status is not None or fault.recovery is Recovery.AFTER_RESTART:
                    running.close()
                    rig = None


class _Bench:
    """Where nodes are started, one after the other."""

    def __init__(
        self, graph: DrillGraph, panel: DrillPanel, checkpoint: Path, cmd_vel: str, folder: Path, cleanup: Cleanup
    ) -> None:
        self._graph = graph
        self._panel = panel
        self._checkpoint = checkpoint
        self._cmd_vel = cmd_vel
        self._folder = folder
        self._cleanup = cleanup

    def require_silence(self) -> None:
        """Raise MobileVlaError where somebody else drives the base."""
        if self._graph.wait_for(lambda: self._graph.count_commanders() > 0, 1.0):
            raise MobileVlaError(
                f"{self._cmd_vel} has a publisher already, expected none: the drill could not tell its velocities "
                "from the node's; end it"
            )

    @contextlib.contextmanager
    def start_node(self, transport: str) -> Iterator[Rig]:
        """Run a fresh node until it is active; images arrive, an instruction does not."""
        graph, panel = self._graph, self._panel
        with contextlib.ExitStack() as running:
            copy = Path(running.enter_context(tempfile.TemporaryDirectory(dir=self._folder, prefix="checkpoint.")))
            shutil.copytree(self._checkpoint.parent, copy, dirs_exist_ok=True)
            checkpoint = copy / self._checkpoint.name
            started_s = time.monotonic()
            with self._cleanup.held():
                graph.forget()
                graph.mount_camera(transport)
                node = self._start_process(checkpoint, transport)
                running.callback(self._end_process, node)
            ready = graph.wait_for(lambda: node.status is not None or panel.loaded_s > started_s, _START_LIMIT_S)
            ready = ready and graph.wait_until_heard(_MOTION_LIMIT_S)
            if node.status is not None or not ready:
                raise DrillError(node.fault() or f"vla_node was not ready within {_START_LIMIT_S:g} s")
            graph.camera.start()
            yield Rig(node, graph, panel, checkpoint)

    def _start_process(self, checkpoint: Path, transport: str) -> NodeProcess:
        parameters = {"checkpoint": str(checkpoint), "device": "cpu", "image_transport": transport}
        return NodeProcess(
            "vla_node",
            "mobile_vla_inference.tools.drill.node",
            {**parameters, **_NODE_PARAMETERS},
            self._folder / "vla_node.log",
            {"__ns": NAMESPACE, "cmd_vel": self._cmd_vel},
            piped=True,
        )

    def _end_process(self, node: NodeProcess) -> None:
        with self._cleanup.held():
            self._graph.end_flood()
            self._graph.remove_other_node()
            node.stop(_STOP_LIMIT_S)


# ---- one fault -------------------------------------------------------------------------------------------------------


def _run_fault(rig: Rig, fault: Fault) -> Outcome:
    """Inject a fault as often as it says, up to the first miss; return the worst outcome."""
    outcomes = []
    for number in range(1, fault.repeats + 1):
        outcome = _run_once(rig, fault)
        if outcome.misses and fault.repeats > 1:
            found = f"time {number} of {fault.repeats}: {outcome.misses[0]}"
            return replace(outcome, misses=(found, *outcome.misses[1:]))
        outcomes.append(outcome)
        if outcome.misses:
            break
    return max(outcomes, key=_badness)


def _run_once(rig: Rig, fault: Fault) -> Outcome:
    """Bring the robot to motion, inject a fault, and judge what the node made of it."""
    try:
        if not fault.from_rest:
            _bring_to_full_speed(rig, fault)
        return _inject(rig, fault)
    except MobileVlaError as error:
        return _not_tried(fault, rig.graph.reason, error)


def _not_tried(fault: Fault, reason: str, error: MobileVlaError) -> Outcome:
    return Outcome(0, fault.name, fault.injection, None, None, reason, "not tried", (str(error),))


def _bring_to_full_speed(rig: Rig, fault: Fault) -> None:
    rig.panel.step_s = fault.step_s
    if rig.graph.reason != "moving":
        rig.graph.instruct(INSTRUCTION)
    if not _await_full_speed(rig):
        # On a machine that is busy with other work a step can take too long once: that is none of the fault's.
        if rig.graph.is_latched:
            rig.graph.enable(True)
        if not _await_full_speed(rig):
            raise DrillError(f"the robot was not brought to motion: {rig.node.fault() or rig.graph.reason}")
    rig.worker_pid = int(rig.panel.worker_pid)


def _await_full_speed(rig: Rig) -> bool:
    """Wait until the newest velocity is ahead at the limit."""
    commands = rig.graph.commands
    seen = len(commands)
    return rig.graph.wait_for(
        lambda: len(commands) > seen and commands[-1].values[0] >= LIMITS.linear_x_mps, _MOTION_LIMIT_S
    )


def _inject(rig: Rig, fault: Fault) -> Outcome:
    graph = rig.graph
    onset = fault.inject(rig)
    seen = max(0, len(graph.commands) - 100)

    def has_stopped() -> bool:
        return any(command.is_zero and command.time_s >= onset.watched_from_s for command in graph.commands[seen:])

    if not fault.from_rest:
        graph.wait_for(has_stopped, onset.deadline_s + _LATE_LIMIT_S - time.monotonic())
    graph.wait_for(
        lambda: graph.first_refusal(onset.watched_from_s) is not None, 0.0 if fault.from_rest else _STATUS_LIMIT_S
    )
    reason = graph.reason_at(onset.since_s) if fault.from_rest else graph.first_refusal(onset.watched_from_s) or "none"
    if not fault.momentary:
        time.sleep(fault.hold_s)
    recovered, until_s, misses = _recover(rig, fault)
    verdict = _judge(rig, fault, onset, until_s)
    if fault.reasons and reason not in [expected.value for expected in fault.reasons]:
        expected = " or ".join(reason.value for reason in fault.reasons)
        misses = (*misses, f"the reason is {reason}, expected {expected}")
    return Outcome(
        round=0,
        fault=fault.name,
        injection=fault.injection,
        reaction_ms=None if verdict.reaction_s is None else round(verdict.reaction_s * 1000.0, 1),
        deadline_ms=None if fault.from_rest else round((onset.deadline_s - onset.since_s) * 1000.0, 1),
        reason=reason,
        recovered=recovered,
        misses=(*verdict.misses, *misses),
    )


def _judge(rig: Rig, fault: Fault, onset: Any, until_s: float) -> Verdict:
    if fault.from_rest:
        return judge_rest(rig.graph.commands, onset.since_s, until_s)
    # A node that leaves is silent afterwards, and after a momentary fault the robot moves on.
    zero_held_s = 0.0 if fault.recovery is Recovery.NEVER else STOP_HOLD_S
    return judge(rig.graph.commands, onset, until_s, LIMITS, momentary=fault.momentary, zero_held_s=zero_held_s)


def _recover(rig: Rig, fault: Fault) -> tuple[str, float, tuple[str, ...]]:
    """Lift a fault and bring motion back as designed; return how, from when it was allowed, and what went wrong."""
    graph = rig.graph
    if fault.recovery is Recovery.NEVER:
        return _await_exit(rig, fault)
    until_s = time.monotonic()
    try:
        fault.lift(rig)
    except DrillError as error:
        return "no", until_s, (str(error),)
    if fault.recovery is Recovery.AFTER_RESTART:
        return _enable_in_vain(rig, fault)
    recovery = fault.recovery
    if recovery is Recovery.AS_TOLD:
        recovery = Recovery.AFTER_ENABLE if graph.is_latched else Recovery.BY_ITSELF
    if recovery is not Recovery.BY_ITSELF:
        time.sleep(fault.latched_s)
        until_s = graph.enable(True) if recovery is Recovery.AFTER_ENABLE else graph.change_state(_ACTIVATE)
    if not _await_full_speed(rig):
        return "no", until_s, (f"it did not move again {recovery.value}: {graph.reason}",)
    return recovery.value, until_s, ()


def _enable_in_vain(rig: Rig, fault: Fault) -> tuple[str, float, tuple[str, ...]]:
    """Ask a robot to move that has to stand still all the same, and to say why."""
    graph = rig.graph
    asked_s = graph.enable(True)
    graph.wait_for(
        lambda: any(c.time_s > asked_s and not c.is_zero for c in graph.commands[-100:]) or rig.node.status is not None,
        _REFUSED_S,
    )
    expected = [reason.value for reason in fault.last_reasons]
    misses = []
    if graph.reason not in expected:
        misses.append(f"after ~/enable the reason is {graph.reason}, expected {' or '.join(expected)}")
    if not graph.has_told(fault.tells):
        misses.append(f"neither its status nor its diagnostics tell of {fault.tells}")
    return fault.recovery.value, time.monotonic(), tuple(misses)


def _await_exit(rig: Rig, fault: Fault) -> tuple[str, float, tuple[str, ...]]:
    ended = rig.graph.wait_for(lambda: rig.node.status is not None, _STOP_LIMIT_S)
    until_s = time.monotonic()
    if not ended:
        return "no", until_s, (f"it did not end within {_STOP_LIMIT_S:g} s",)
    status, told, misses = rig.node.status, rig.node.fault(), ()
    if fault.leaves_with_error and (status <= 0 or fault.tells not in told):
        misses = (f"{told}; expected a status above 0 and a sentence with {fault.tells!r}",)
    elif not fault.leaves_with_error and status != 0:
        misses = (told,)
    return f"{Recovery.NEVER.value} with status {status}", until_s, misses


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _catalogue_table(faults: Sequence[Fault]) -> Any:
    from rich.table import Table

    table = Table("fault", "how it is injected", "reason", "recovers")
    for fault in faults:
        reasons = " or ".join(reason.value for reason in fault.reasons) or "-"
        table.add_row(fault.name, fault.injection, reasons, fault.recovery.value)
    return table


def _outcome_table(faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> Any:
    """Return a line per fault: of several rounds the worst one."""
    from rich.table import Table

    table = Table("fault", "how it was injected", "reaction ms", "deadline ms", "reason", "recovered")
    for fault in faults:
        worst = max((outcome for outcome in outcomes if outcome.fault == fault.name), key=_badness)
        style = "red" if worst.misses else None
        reaction, deadline = _milliseconds(worst.reaction_ms), _milliseconds(worst.deadline_ms)
        table.add_row(fault.name, fault.injection, reaction, deadline, worst.reason, worst.recovered, style=style)
    return table


def _badness(outcome: Outcome) -> tuple[bool, float]:
    return bool(outcome.misses), outcome.reaction_ms or 0.0


def _outcome_line(outcome: Outcome) -> str:
    verdict = f"MISSED: {'; '.join(outcome.misses)}" if outcome.misses else outcome.recovered
    times = f"{_milliseconds(outcome.reaction_ms):>5} of {_milliseconds(outcome.deadline_ms):>5} ms"
    return f"{outcome.round:>3}  {outcome.fault:<22}{times}  {outcome.reason:<20}{verdict}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
