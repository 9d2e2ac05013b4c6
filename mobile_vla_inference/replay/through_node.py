"""`mobile_vla replay --node`: play a bag in real time through the real vla_node and keep which frames it stepped on.

The node runs as a process on a private graph, so no robot can receive its commands. It publishes every step on
`~/step`: the stamp, whether the LSTM state was empty before, and the action. Offline, `--steps` repeats exactly those
steps.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_vla_inference.action import ActionMapping
from mobile_vla_inference.bags.reader import COMPRESSED_IMAGE, BagError, BagMessage, BagReader
from mobile_vla_inference.bags.topics import BagTopics
from mobile_vla_inference.control.exit_request import ExitRequest
from mobile_vla_inference.control.reset_cause import ResetCause
from mobile_vla_inference.control.stamps import broken_sequence, stamp_seconds
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.session import NodeSession
from mobile_vla_inference.policy.facts import policy_facts_of_node
from mobile_vla_inference.policy_facts import PolicyFacts
from mobile_vla_inference.replay.offline import NODE, CommandRecord, ReplayOptions
from mobile_vla_inference.replay.result import ReplayFrame, ReplayResult, ReplayTiming
from mobile_vla_inference.replay.summary import make_result
from mobile_vla_inference.replay.timing import percentiles_ms
from mobile_vla_inference.ros.step_message import NodeStep

if TYPE_CHECKING:
    from mobile_vla_inference.harness.bag_graph import BagPlayer
    from mobile_vla_inference.harness.node_listener import StepListener

NODE_NAME = "vla_node"

_START_LIMIT_S = 600.0
_SETTLE_LIMIT_S = 10.0


def replay_node(path: Path, checkpoint: Path, options: ReplayOptions, parameters: Mapping[str, Any]) -> ReplayResult:
    """Play the bag through a vla_node on a private graph and return what the node did.

    Raises:
        MobileVlaError: the bag, the checkpoint or ROS 2 can't be used, the node ended, or some of its steps did not
            arrive.
        KeyboardInterrupt: stopped before the end.
    """
    with BagReader(path) as bag, NodeSession("replay") as session, session.interruptible():
        topics = options.topics(bag)
        compressed = topics.image.type_name == COMPRESSED_IMAGE
        session.start(
            NODE_NAME,
            "mobile_vla_inference.ros.node",
            {
                **parameters,
                "checkpoint": str(checkpoint),
                "use_sim_time": True,
                "image_transport": "compressed" if compressed else "raw",
            },
        )

        from mobile_vla_inference.harness.node_listener import StepListener

        graph = session.join(lambda: StepListener("replay", NODE_NAME))
        replay = _NodeReplay(bag, topics, options, session, graph)
        replay.run()
        return replay.result(policy_facts_of_node(checkpoint, graph.facts))


class _NodeReplay:
    """One replay of a bag through the node."""

    def __init__(
        self, bag: BagReader, topics: BagTopics, options: ReplayOptions, session: NodeSession, graph: StepListener
    ) -> None:
        self._bag = bag
        self._topics = topics
        self._options = options
        self._session = session
        self._graph = graph
        self._stamps_s: list[float] = []
        self._received_ns: list[int] = []
        self._reasons: list[str] = []
        self._wall_s = 0.0
        self._halt = ExitRequest()  # ends the player

    def run(self) -> None:
        """Wait for the node, play, and wait until the node has published everything."""
        from mobile_vla_inference.harness.bag_graph import BagPlayer

        graph, wait_for = self._graph, self._session.wait_for
        targets = {self._topics.image.name: "/image_raw"}
        if self._topics.image.type_name == COMPRESSED_IMAGE:
            targets[self._topics.image.name] = "/image_raw/compressed"
        if self._topics.instruction is not None:
            targets[self._topics.instruction.name] = "/instruction"
        player = BagPlayer(graph.node, self._bag, targets, on_message=self._on_message)
        wait_for("the policy to be loaded", lambda: graph.reason not in ("", "inactive"), _START_LIMIT_S)
        if not player.wait_for_listeners(_SETTLE_LIMIT_S, self._halt):
            raise MobileVlaError(
                f"vla_node did not subscribe to the images, expected it to within {_SETTLE_LIMIT_S:g} s; try again"
            )
        if self._options.instruction is not None:
            graph.instruct(self._options.instruction)
            wait_for("the instruction to arrive", lambda: graph.reason == "no_image", _SETTLE_LIMIT_S)
        started_s = time.monotonic()
        self._play(player)
        self._wall_s = time.monotonic() - started_s
        counted = graph.diagnostics_count + 1  # the next one may have been on its way
        wait_for(
            "the node's last steps",
            lambda: graph.diagnostics_count > counted and graph.is_settled(),
            _SETTLE_LIMIT_S,
        )

    def _play(self, player: BagPlayer) -> None:
        """Play in a thread, and receive what the node publishes meanwhile."""
        ended = threading.Event()
        faults: list[Exception] = []

        def play() -> None:
            try:
                player.play(self._halt)
            except Exception as error:  # raised again in the main thread
                faults.append(error)
            finally:
                ended.set()

        thread = threading.Thread(target=play, name="player")
        thread.start()
        try:
            self._session.wait_until(ended.is_set, math.inf)
        finally:
            self._halt.set()
            thread.join()
        if faults:
            raise faults[0]

    def _on_message(self, message: BagMessage) -> None:
        if message.topic != self._topics.image.name:
            return
        header = self._bag.decode(message).header
        self._stamps_s.append(stamp_seconds(header.stamp))
        self._received_ns.append(message.time_ns)
        self._reasons.append(self._graph.reason)
        if len(self._stamps_s) == self._options.max_frames:
            self._halt.set()

    def result(self, policy: PolicyFacts) -> ReplayResult:
        """Return what the node did, frame by frame."""
        steps = self._graph.steps
        frames = _frames(self._stamps_s, self._reasons, steps, policy.action_mapping, self._options.state_gap_s)
        if not steps:
            raise BagError(
                f"vla_node stepped on none of {len(frames)} images, expected some; it reports: {self._graph.advice}"
            )
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
    """Return one entry for each image that was played, with the step that the node made on it."""
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
    """Return why the LSTM state was empty before a step, as far as the steps show."""
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
