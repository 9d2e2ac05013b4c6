"""A bag of a replayed drive: its messages, and the commands that the policy and the node's gate would have given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobile_vla_inference.bags.messages import header_message, twist_message
from mobile_vla_inference.bags.reader import TWIST_STAMPED, BagMessage, typestore
from mobile_vla_inference.bags.topics import BagTopics
from mobile_vla_inference.bags.writer import BagWriter
from mobile_vla_inference.replay.offline import MessageSink
from mobile_vla_inference.replay.result import ReplayFrame, Velocity

#: The topics that the bag has besides the recorded ones: the policy's commands, and those after the gate.
PREDICTED_TOPIC = "/replay/cmd_vel"
GATED_TOPIC = "/replay/cmd_vel_gated"
_BASE_FRAME_ID = "base_link"


@contextmanager
def open_out_bag(path: Path | None) -> Iterator[MessageSink | None]:
    """Yield the `sink` of `replay` that writes messages and predicted commands to a new bag; None without a path."""
    if path is None:
        yield None
        return
    with BagWriter(path) as writer:
        declared = False

        def sink(topics: BagTopics, message: BagMessage, frame: ReplayFrame | None) -> None:
            nonlocal declared
            if not declared:
                _declare(writer, topics)
                declared = True
            writer.write(message.topic, message.time_ns, message.data)
            if frame is not None:
                _write_commands(writer, message.time_ns, frame)

        yield sink


def _declare(writer: BagWriter, topics: BagTopics) -> None:
    for topic in (topics.image, topics.instruction, topics.command):
        if topic is not None:
            writer.add_topic(topic.name, topic.type_name)
    for name in (PREDICTED_TOPIC, GATED_TOPIC):
        writer.add_topic(name, TWIST_STAMPED)


def _write_commands(writer: BagWriter, time_ns: int, frame: ReplayFrame) -> None:
    for topic, velocity in ((PREDICTED_TOPIC, frame.command), (GATED_TOPIC, frame.gated)):
        if velocity is not None:
            writer.write_message(topic, time_ns, _stamped(frame.stamp_s, velocity))


def _stamped(stamp_s: float, velocity: Velocity) -> Any:
    x, y, z = velocity
    header = header_message(round(stamp_s * 1e9), _BASE_FRAME_ID)
    return typestore().types[TWIST_STAMPED](header=header, twist=twist_message(x, z, y))
