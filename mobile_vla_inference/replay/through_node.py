"""`mobile_vla replay --node`: play a bag in real time through the real vla_node and keep which frames it stepped on.

The node runs as a process on a graph of its own, so no robot can hear it. It tells every step on `~/step`: the
stamp, whether the state was empty before, and the action. Offline, `--steps` takes exactly those steps again.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mobile_vla_inference.action import ActionMapping
from mobile_vla_inference.bags.reader import COMPRESSED_IMAGE, BagError, BagMessage, BagReader
from mobile_vla_inference.bags.topics import BagTopics
from mobile_vla_inference.control.reset_cause import ResetCause
from mobile_vla_inference.control.stamps import broken_sequence
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness import domain as ros_environment
from mobile_vla_inference.harness.domain import require_rclpy
from mobile_vla_inference.harness.interrupts import stop_event
from mobile_vla_inference.harness.processes import NodeProcess
from mobile_vla_inference.policy.facts import policy_facts_of_node
from mobile_vla_inference.policy_facts import PolicyFacts
from mobile_vla_inference.replay.offline import NODE, CommandRecord, ReplayOptions
from mobile_vla_inference.replay.result import ReplayFrame, ReplayResult, ReplayTiming
from mobile_vla_inference.replay.summary import make_result
from mobile_vla_inference.replay.timing import percentiles_ms
from mobile_vla_inference.ros.step_message import NodeStep

NODE_NAME = "vla_node"

_START_LIMIT_S = 600.0
_SETTLE_LIMIT_S = 10.0
_STOP_LIMIT_S = 10.0
_SPIN_S = 0.05


def replay_node(path: Path, checkpoint: Path, options: ReplayOptions, parameters: Mapping[str, Any]) -> ReplayResult:
    """Play the bag through a vla_node of its own and return what it did.

    Raises:
        MobileVlaError: the bag, the checkpoint or ROS can't be used, the node ended, or told less than it did.
        KeyboardInterrupt: stopped before the end.
    """
    require_rclpy()
    with contextlib.ExitStack() as cleanup:
        bag = cleanup.enter_context(BagReader(path))
        topics = options.topics(bag)
        domain = ros_environment.isolate()
        cleanup.callback(domain.close)
        stop = cleanup.enter_context(stop_event())
        logs = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mobile_vla_replay.")))
        compressed = topics.image.type_name == COMPRESSED_IMAGE
        node = NodeProcess(
            NODE_NAME,
            "mobile_vla_inference.ros.node",
            {
                **parameters,
                "checkpoint": str(checkpoint),
                "use_sim_time": True,
                "image_transport": "compressed" if compressed else "raw",
            },
            logs / "vla_node.log",
        )
        cleanup.callback(node.stop, _STOP_LIMIT_S)

        from mobile_vla_inference.harness.node_listener import ReplayGraph

        graph = ReplayGraph(NODE_NAME)
        cleanup.callback(graph.close)
        session = _Session(bag, topics, options, graph, node, stop)
        session.run()
        return session.result(policy_facts_of_node(checkpoint, graph.facts))


class _Session:
    """One playing of a bag through the node."""

    def __init__(
        self,
        bag: BagReader,
        topics: BagTopics,
        options: ReplayOptions,
        graph: Any,
        node: NodeProcess,
        stop: threading.Event,
    ) -> None:
        self._bag = bag
        self._topics = topics
        self._options = options
        self._graph = graph
        self._node = node
        self._stop = stop
        self._stamps_s: list[float] = []
        self._received_ns: list[int] = []
        self._reasons: list[str] = []
        self._wall_s = 0.0
        self._halt = threading.Event()  # ends the playing

    def run(self) -> None:
        """Wait for the node, play, and wait until the node has told everything."""
        from mobile_vla_inference.harness.bag_graph import BagPlayer

        targets = {self._topics.image.name: "/image_raw"}
        if self._topics.image.type_name == COMPRESSED_IMAGE:
            targets[self._topics.image.name] = "/image_raw/compressed"
        if self._topics.instruction is not None:
            targets[self._topics.instruction.name] = "/instruction"
        player = BagPlayer(self._graph.node, self._bag, targets, on_message=self._on_message)
        self._wait("the policy to be loaded", self._is_active, _START_LIMIT_S)
        if not player.wait_for_listeners(_SETTLE_LIMIT_S, self._stop) and not self._stop.is_set():
            raise MobileVlaError("vla_node does not listen to the images, expected it to within 10 s; try again")
        if self._options.instruction is not None:
            self._graph.instruct(self._options.instruction)
            self._wait("the instruction to be heard", lambda: self._graph.reason == "no_image", _SETTLE_LIMIT_S)
        started_s = time.monotonic()
        self._play(player)
        self._wall_s = time.monotonic() - started_s
        counted = self._graph.diagnostics_count + 1  # the next one may have been on its way
        self._wait(
            "the node's last steps",
            lambda: self._graph.diagnostics_count > counted and self._graph.is_settled(),
            _SETTLE_LIMIT_S,
        )

    def _play(self, player: Any) -> None:
        """Play in a thread, so that the graph is listened to meanwhile."""
        ended = threading.Event()
        faults: list[BaseException] = []

        def play() -> None:
            try:
                player.play(self._halt)
            except MobileVlaError as error:
                faults.append(error)
            finally:
                ended.set()

        thread = threading.Thread(target=play, name="player")
        thread.start()
        try:
            self._watch(ended.is_set)
        finally:
            self._halt.set()
            thread.join()
        if faults:
            raise faults[0]

    def _on_message(self, message: BagMessage) -> None:
        if message.topic != self._topics.image.name:
            return
        header = self._bag.decode(message).header
        self._stamps_s.append(header.stamp.sec + header.stamp.nanosec * 1e-9)
        self._received_ns.append(message.time_ns)
        self._reasons.append(self._graph.reason)
        if len(self._stamps_s) == self._options.max_frames:
            self._halt.set()

    def _is_active(self) -> bool:
        return self._graph.reason not in ("", "inactive")

    def _wait(self, what: str, happened: Callable[[], bool], limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        self._watch(lambda: happened() or time.monotonic() > deadline_s)
        if not happened():
            raise MobileVlaError(f"waited {limit_s:g} s for {what}; vla_node says: {self._graph.advice}")

    def _watch(self, ended: Callable[[], bool]) -> None:
        """Listen to the graph until something happens, the node ends or somebody asks to stop."""
        while not ended():
            if self._stop.is_set():
                raise KeyboardInterrupt
            if (fault := self._node.fault()) is not None:
                raise MobileVlaError(fault)
            self._graph.spin(_SPIN_S)

    def result(self, policy: PolicyFacts) -> ReplayResult:
        """Return what the node did, frame by frame."""
        steps = self._graph.steps
        frames = _frames(self._stamps_s, self._reasons, steps, policy.action_mapping, self._options.state_gap_s)
        if not steps:
            raise BagError(f"vla_node stepped on none of {len(frames)} images; it says: {self._graph.advice}")
        frames = _recorded_commands(self._bag, self._topics).assign(frames, self._received_ns)
        timing = ReplayTiming(
            wall_s=self._wall_s,
            latency_ms=percentiles_ms([step.step_s for step in steps]),
            overhead_ms={},
            frames_per_s=len(frames) / self._wall_s,
            memory=tuple(self._graph.memory),
        )
        return make_result(
            self._bag.path,
            self._topics,
            policy,
            NODE,
            self._options.command_line,
            frames,
            (*self._bag.notes, self._graph.counts_sentence()),
            timing,
            self._options.limits,
        )


def _frames(
    stamps_s: Sequence[float],
    reasons: Sequence[str],
    steps: Sequence[NodeStep],
    mapping: ActionMapping,
    state_gap_s: float,
) -> list[ReplayFrame]:
    """Return one entry per image that was played, with the step that the node took on it."""
    waiting: defaultdict[float, deque[int]] = defaultdict(deque)
    for number, step in enumerate(steps):
        waiting[step.stamp_s].append(number)
    frames = []
    for index, (stamp_s, reason) in enumerate(zip(stamps_s, reasons)):
        numbers = waiting.get(stamp_s)
        if not numbers:
            frames.append(_not_stepped(index, stamp_s, reason))
            continue
        number = numbers.popleft()
        step, former = steps[number], steps[number - 1] if number else None
        frames.append(
            ReplayFrame(
                index=index,
                stamp_s=stamp_s,
                stepped=True,
                drop="",
                reset=str(_reset_cause(step, former, state_gap_s)) if step.first_of_state else "",
                action=step.action,
                command=mapping.velocity(step.action).values,
                gated=step.gated,
                reason=step.reason,
                recorded=None,
                instruction=step.instruction,
                latency_s=step.step_s,
            )
        )
    return frames


def _not_stepped(index: int, stamp_s: float, reason: str) -> ReplayFrame:
    return ReplayFrame(
        index=index,
        stamp_s=stamp_s,
        stepped=False,
        drop="not_stepped",
        reset="",
        action=None,
        command=None,
        gated=None,
        reason=reason,
        recorded=None,
        instruction="",
        latency_s=None,
    )


def _reset_cause(step: NodeStep, former: NodeStep | None, state_gap_s: float) -> ResetCause:
    """Say why the state was empty before a step, as far as the steps tell."""
    if former is None:
        return ResetCause.START
    if step.instruction != former.instruction:
        return ResetCause.INSTRUCTION
    return broken_sequence(former.stamp_s, step.stamp_s, state_gap_s) or ResetCause.REQUEST


def _recorded_commands(bag: BagReader, topics: BagTopics) -> CommandRecord:
    commands = CommandRecord()
    if topics.command is not None:
        for message in bag.messages((topics.command.name,)):
            commands.add(message.time_ns, bag.decode(message))
    return commands
