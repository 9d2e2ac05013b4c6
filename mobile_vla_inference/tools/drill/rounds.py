"""The drill's rounds: nodes are started one after the other, each fault is injected at full speed and judged."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.processes import NodeProcess
from mobile_vla_inference.harness.session import NodeSession
from mobile_vla_inference.tools.arguments import SMALL_POLICY
from mobile_vla_inference.tools.drill.judge import Onset, SpeedLimits, Verdict, judge, judge_rest
from mobile_vla_inference.tools.drill.panel import DrillPanel
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

if TYPE_CHECKING:
    from mobile_vla_inference.tools.drill.graph import DrillGraph

NAMESPACE = "/mobile_vla_drill"

LIMITS = SpeedLimits(linear_x_mps=FULL_SPEED_MPS, linear_y_mps=FULL_SPEED_MPS, angular_z_radps=FULL_TURN_RADPS)
NODE_PARAMETERS = {
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
#: How long after its deadline a zero is still awaited, so that the table shows how late it arrived.
_LATE_LIMIT_S = 3.0
#: How long a robot that must not move is watched after ~/enable: an image and a step take less.
_REFUSED_S = 1.5
_STATUS_LIMIT_S = 1.0
_ACTIVATE = 3  # lifecycle_msgs/msg/Transition


@dataclass(frozen=True)
class Outcome:
    """The outcome of one fault in one round.

    Attributes:
        reaction_ms: from the injection (for a timeout: the last good frame or step) to the first zero; None: no zero.
        deadline_ms: its limit: 100 ms, plus the configured timeout for a timeout.
        reason: the first reason of the node.
        recovered: how the robot moved again.
        misses: what went wrong; empty if nothing did.
    """

    round: int
    fault: str
    injection: str
    reaction_ms: float | None
    deadline_ms: float | None
    reason: str
    recovered: str
    misses: tuple[str, ...]


class DrillNodes:
    """Starts the drill's nodes, one after the other, on the session's graph."""

    def __init__(self, session: NodeSession, graph: DrillGraph, panel: DrillPanel, cmd_vel: str) -> None:
        self._session = session
        self._graph = graph
        self._panel = panel
        self._cmd_vel = cmd_vel

    def require_silence(self) -> None:
        """Raise MobileVlaError if another node drives the base."""
        if self._graph.wait_until(lambda: self._graph.count_commanders() > 0, 1.0):
            raise MobileVlaError(
                f"{self._cmd_vel} already has a publisher, expected none: the drill could not distinguish its "
                "velocities from the node's; end that node"
            )

    @contextlib.contextmanager
    def start_node(self, transport: str) -> Iterator[Rig]:
        """Run a fresh node until it is active; images arrive, an instruction does not."""
        session, graph, panel = self._session, self._graph, self._panel
        with contextlib.ExitStack() as running:
            folder = running.enter_context(tempfile.TemporaryDirectory(dir=session.folder, prefix="checkpoint."))
            checkpoint = Path(shutil.copytree(SMALL_POLICY, Path(folder) / SMALL_POLICY.name))
            started_s = time.monotonic()
            with session.held():
                graph.forget()
                graph.mount_camera(transport)
                node = self._start_process(checkpoint, transport)
                running.callback(self._end_process, node)
            session.wait_for("the policy to be loaded", lambda: panel.loaded_s > started_s, _START_LIMIT_S)
            session.wait_for("vla_node's topics and services", graph.is_connected, _MOTION_LIMIT_S)
            graph.camera.start()
            yield Rig(node, graph, panel, checkpoint)

    def _start_process(self, checkpoint: Path, transport: str) -> NodeProcess:
        parameters = {"checkpoint": str(checkpoint), "device": "cpu", "image_transport": transport}
        return self._session.start(
            "vla_node",
            "mobile_vla_inference.tools.drill.node",
            {**parameters, **NODE_PARAMETERS},
            {"__ns": NAMESPACE, "cmd_vel": self._cmd_vel},
            piped=True,
        )

    def _end_process(self, node: NodeProcess) -> None:
        with self._session.held():
            self._graph.end_flood()
            self._graph.remove_other_node()
            self._session.end(node)


def run_round(
    start_node: Callable[[str], AbstractContextManager[Rig]],
    faults: Sequence[Fault],
    inject: Callable[[Rig, Fault], Outcome],
) -> Iterator[Outcome]:
    """Inject each fault once; faults that need the same node share it while it runs and is as it was.

    Args:
        start_node: starts a node with an image transport, as `DrillNodes.start_node`.
        faults: the faults, in order.
        inject: injects one fault and judges it: `run_fault`.

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
                        rig = running.enter_context(start_node(transport))
                        started = True
                    except MobileVlaError as error:
                        if not started:
                            raise
                        yield _not_tried(fault, "", error)  # keep the outcomes so far
                        continue
                outcome = inject(rig, fault)
                yield outcome
                # A node that missed a fault must not spoil the faults after it.
                if outcome.misses or rig.node.status is not None or fault.recovery is Recovery.AFTER_RESTART:
                    running.close()
                    rig = None


# ---- one fault -------------------------------------------------------------------------------------------------------


def run_fault(rig: Rig, fault: Fault) -> Outcome:
    """Inject a fault `repeats` times, up to the first miss; return the worst outcome."""
    return repeat_fault(fault, lambda: _run_once(rig, fault))


def repeat_fault(fault: Fault, run_once: Callable[[], Outcome]) -> Outcome:
    """Run a fault `repeats` times, up to the first miss; return the worst outcome."""
    outcomes = []
    for number in range(1, fault.repeats + 1):
        outcome = run_once()
        if outcome.misses and fault.repeats > 1:
            found = f"time {number} of {fault.repeats}: {outcome.misses[0]}"
            return replace(outcome, misses=(found, *outcome.misses[1:]))
        outcomes.append(outcome)
        if outcome.misses:
            break
    return max(outcomes, key=badness)


def _run_once(rig: Rig, fault: Fault) -> Outcome:
    """Bring the robot to full speed, inject a fault, and judge the node's reaction."""
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
        # On a busy machine a step can take too long once, before the fault.
        if rig.graph.is_latched:
            rig.graph.enable(True)
        if not _await_full_speed(rig):
            raise DrillError(
                f"the robot did not reach full speed, expected it to: {rig.node.fault() or rig.graph.reason}"
            )
    rig.worker_pid = rig.panel.worker_pid


def _await_full_speed(rig: Rig) -> bool:
    """Wait until the newest velocity is at the limit, ahead; return whether it is."""
    commands = rig.graph.commands
    seen = len(commands)
    return rig.graph.wait_until(
        lambda: len(commands) > seen and commands[-1].values[0] >= LIMITS.linear_x_mps, _MOTION_LIMIT_S
    )


def _inject(rig: Rig, fault: Fault) -> Outcome:
    graph = rig.graph
    onset = fault.inject(rig)
    seen = max(0, len(graph.commands) - 100)

    def has_stopped() -> bool:
        return any(command.is_zero and command.time_s >= onset.watched_from_s for command in graph.commands[seen:])

    if not fault.from_rest:
        graph.wait_until(has_stopped, onset.deadline_s + _LATE_LIMIT_S - time.monotonic())
    graph.wait_until(
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


def _judge(rig: Rig, fault: Fault, onset: Onset, until_s: float) -> Verdict:
    if fault.from_rest:
        return judge_rest(rig.graph.commands, onset.since_s, until_s)
    # A node that exits is silent afterwards, and after a momentary fault the robot moves on.
    zero_held_s = 0.0 if fault.recovery is Recovery.NEVER else STOP_HOLD_S
    return judge(rig.graph.commands, onset, until_s, LIMITS, momentary=fault.momentary, zero_held_s=zero_held_s)


def _recover(rig: Rig, fault: Fault) -> tuple[str, float, tuple[str, ...]]:
    """Lift a fault and let the robot move again as designed; return how, from when that was allowed, and the misses."""
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
    if recovery is Recovery.AS_REPORTED:
        recovery = Recovery.AFTER_ENABLE if graph.is_latched else Recovery.BY_ITSELF
    if recovery is not Recovery.BY_ITSELF:
        time.sleep(fault.latched_s)
        until_s = graph.enable(True) if recovery is Recovery.AFTER_ENABLE else graph.change_state(_ACTIVATE)
    if not _await_full_speed(rig):
        return "no", until_s, (f"it did not move again {recovery.value}: {graph.reason}",)
    return recovery.value, until_s, ()


def _enable_in_vain(rig: Rig, fault: Fault) -> tuple[str, float, tuple[str, ...]]:
    """Call `~/enable` on a robot that has to stand and to report why."""
    graph = rig.graph
    called_s = graph.enable(True)
    graph.wait_until(
        lambda: (
            any(c.time_s > called_s and not c.is_zero for c in graph.commands[-100:]) or rig.node.status is not None
        ),
        _REFUSED_S,
    )
    expected = [reason.value for reason in fault.last_reasons]
    misses = []
    if graph.reason not in expected:
        misses.append(f"after ~/enable the reason is {graph.reason}, expected {' or '.join(expected)}")
    if not graph.has_reported(fault.expected_text):
        misses.append(f"neither its status nor its diagnostics contain {fault.expected_text}")
    return fault.recovery.value, time.monotonic(), tuple(misses)


def _await_exit(rig: Rig, fault: Fault) -> tuple[str, float, tuple[str, ...]]:
    ended = rig.graph.wait_until(lambda: rig.node.status is not None, _STOP_LIMIT_S)
    until_s = time.monotonic()
    if not ended:
        return "no", until_s, (f"it did not exit within {_STOP_LIMIT_S:g} s",)
    status, ending, misses = rig.node.status, rig.node.fault(), ()
    if fault.exits_with_error and (status <= 0 or fault.expected_text not in ending):
        misses = (f"{ending}; expected a status above 0 and an error with {fault.expected_text!r}",)
    elif not fault.exits_with_error and status != 0:
        misses = (ending,)
    return f"{Recovery.NEVER.value} with status {status}", until_s, misses


def badness(outcome: Outcome) -> tuple[bool, float]:
    """Return a key that is larger for a worse outcome: a miss, then a later zero."""
    return bool(outcome.misses), outcome.reaction_ms or 0.0
