"""Bags and the ROS graph: publish a bag's messages in time, and record messages as they arrive.

Messages stay CDR bytes: a subscription is raw, and a publisher takes bytes.
"""

from __future__ import annotations

import importlib
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from rclpy.duration import Duration
from rclpy.exceptions import InvalidTopicNameException
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock

from mobile_vla_inference.bags.images import decode_or_none
from mobile_vla_inference.bags.reader import CLOCK, BagMessage, BagReader
from mobile_vla_inference.bags.source import CDR
from mobile_vla_inference.bags.writer import BagWriter
from mobile_vla_inference.control.exit_request import ExitRequest
from mobile_vla_inference.errors import MobileVlaError

CLOCK_TOPIC = "/clock"

_NS = 1_000_000_000
_CLOCK_PERIOD_S = 0.01
_COMMIT_PERIOD_S = 1.0
#: How long to wait until the last messages of a topic are delivered.
_DELIVERY_LIMIT_S = 1.0
#: After so long other nodes on the graph are known.
_DISCOVERY_S = 0.5
#: So long a node can be known only in part.
_DOUBT_S = 2.0
_PLAY_DEPTH = 10
#: `package/msg/Name`; a bag can come from anywhere, and the packages of its types are imported.
_TYPE_NAME = re.compile(r"[a-z][a-z0-9_]*/(msg|srv|action)/[A-Za-z0-9_]+", re.ASCII)
#: Messages that arrive in a burst must not replace each other.
_RECORD_DEPTH = 100


def message_class(type_name: str) -> type | None:
    """Return the class of the messages `package/msg/Name`; None if that is not a type, or is not installed."""
    if not _TYPE_NAME.fullmatch(type_name):
        return None
    package, _, name = type_name.replace("/", ".").rpartition(".")
    try:
        kind = getattr(importlib.import_module(package), name, None)
    except ImportError:
        return None
    return kind if hasattr(kind, "get_fields_and_field_types") else None


def play_qos(latched: bool) -> QoSProfile:
    """Return the QoS that matches most subscriptions: reliable, and transient local if the recorded publisher was."""
    return QoSProfile(
        depth=_PLAY_DEPTH,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


class BagPlayer:
    """Publish the messages of a bag in their order and time, with `/clock`.

    The time is that of the recording. If the bag contains a clock, that of a simulation, it is exactly that clock: the
    stamps of the messages belong to it, and two clocks on one topic would make time jump.

    Attributes:
        published: messages sent so far, per topic on the graph.
        left_out: sentences about topics that can't be published here.
    """

    def __init__(
        self,
        node: Node,
        bag: BagReader,
        topics: Mapping[str, str],
        rate: float = 1.0,
        on_message: Callable[[BagMessage], None] = lambda message: None,
    ) -> None:
        """Create the publishers.

        Args:
            node: the node that publishes.
            bag: an open bag.
            topics: topic in the bag -> topic on the graph; other topics are left out.
            rate: speed, as a multiple of the recorded one.
            on_message: called with every message just before it is sent.
        """
        self.published: Counter[str] = Counter()
        self.left_out: list[str] = []
        self._node = node
        self._bag = bag
        self._rate = rate
        self._on_message = on_message
        self._clock = node.create_publisher(Clock, CLOCK_TOPIC, play_qos(False))
        self._recorded_clock = recorded_clock(bag)
        self._time: Clock | None = None
        self._publishers: dict[str, Any] = {}
        for name, target in topics.items():
            topic = bag.topics[name]
            kind = message_class(topic.type_name)
            if topic.encoding != CDR:
                self.left_out.append(f"{name} is in the encoding {topic.encoding!r}, not ROS 2's: it is left out")
                continue
            if kind is None:
                self.left_out.append(f"{topic.type_name or 'its type'} is not installed: {name} is left out")
                continue
            try:
                self._publishers[name] = node.create_publisher(kind, target, play_qos(topic.latched))
            except (InvalidTopicNameException, ValueError):
                self.left_out.append(f"{target!r} is not a valid topic name: {name} is left out")

    def wait_for_listeners(self, limit_s: float, stop: ExitRequest, start_offset_s: float = 0.0) -> bool:
        """Wait until every topic but the clock has a subscriber, while the clock stands; return whether they have."""
        started_s = time.monotonic()
        self._set_first_time(self._first_ns(start_offset_s))
        while not stop.is_set():
            known = time.monotonic() - started_s >= min(_DISCOVERY_S, limit_s)
            if known and all(publisher.get_subscription_count() for publisher in self._publishers.values()):
                return True
            if time.monotonic() - started_s >= limit_s:
                break
            self._publish_time()
            stop.wait(_CLOCK_PERIOD_S)
        return False

    def check_alone(self, sensors: Collection[str], commands: Collection[str]) -> None:
        """Check that a live graph is not mixed with the recording.

        Args:
            sensors: topics of the bag that no other node may publish; the same holds for `/clock`.
            commands: topics of the bag on which a subscriber acts: it has to receive the sensors of this bag, too.

        Raises:
            MobileVlaError: another node publishes there, or subscribes to a command but not to the recorded sensors.
        """
        deadline_s = time.monotonic() + _DOUBT_S
        while (found := self._intruder(sensors, commands)) and time.monotonic() < deadline_s:
            time.sleep(_CLOCK_PERIOD_S)  # the graph learns of a node piece by piece
        if found:
            raise MobileVlaError(found)

    def _intruder(self, sensors: Collection[str], commands: Collection[str]) -> str:
        """Return the sentence that check_alone raises; empty if the graph is not mixed."""
        targets = {name: publisher.topic_name for name, publisher in self._publishers.items()}
        own = Counter([*targets.values(), CLOCK_TOPIC])
        for target in dict.fromkeys([*(targets[name] for name in sensors if name in targets), CLOCK_TOPIC]):
            if self._node.count_publishers(target) > own[target]:
                others = self._others(self._node.get_publishers_info_by_topic(target))
                return (
                    f"{target} is published by {others} on this graph, expected only this bag, or the two mix; "
                    "end that, play on another ROS_DOMAIN_ID, or give --remap OLD:=NEW"
                )
        watching = {
            (info.node_namespace, info.node_name)
            for name in sensors
            if name in targets
            for info in self._node.get_subscriptions_info_by_topic(targets[name])
        }
        for name in commands:
            if name in targets:
                infos = self._node.get_subscriptions_info_by_topic(targets[name])
                blind = [info for info in infos if not _only_looks(info.node_name)]
                blind = [info for info in blind if (info.node_namespace, info.node_name) not in watching]
                if blind:
                    return (
                        f"{targets[name]} is subscribed by {self._others(blind)}, which does not receive this bag's "
                        "images, expected no node that would act on a recorded instruction; end that, play on another "
                        f"ROS_DOMAIN_ID, or request it with --remap {name}:={targets[name]}"
                    )
        return ""

    def _others(self, infos: Sequence[Any]) -> str:
        own = (self._node.get_namespace(), self._node.get_name())
        names = {
            f"{info.node_namespace.rstrip('/')}/{info.node_name}"
            for info in infos
            if (info.node_namespace, info.node_name) != own
        }
        return ", ".join(sorted(names)) or "another player"

    def play(self, stop: ExitRequest, start_offset_s: float = 0.0) -> None:
        """Publish the bag once, from `start_offset_s` on, until its end or until `stop` is set."""
        first_ns = self._first_ns(start_offset_s)
        self._set_first_time(first_ns)
        started_s = time.monotonic()
        clock = () if self._recorded_clock is None else (self._recorded_clock,)
        for message in self._bag.messages({*self._publishers, *clock}, first_ns):
            due_s = started_s + (message.time_ns - first_ns) / _NS / self._rate
            if not self._wait_until(due_s, started_s, first_ns, stop):
                return
            if message.topic == self._recorded_clock:
                self._time = self._decoded_clock(message) or self._time
            elif self._recorded_clock is None:
                self._time = _clock_message(message.time_ns)
            if message.topic in self._publishers:
                self._on_message(message)
            self._publish_time()
            if message.topic in self._publishers:
                publisher = self._publishers[message.topic]
                publisher.publish(message.data)
                self.published[publisher.topic_name] += 1
        for publisher in self._publishers.values():  # messages on their way get lost when the process exits
            publisher.wait_for_all_acked(Duration(seconds=_DELIVERY_LIMIT_S))

    def _first_ns(self, start_offset_s: float) -> int:
        return (self._bag.start_ns or 0) + round(start_offset_s * 1e9)

    def _set_first_time(self, first_ns: int) -> None:
        if self._recorded_clock is None:
            self._time = _clock_message(first_ns)
        else:
            message = next(self._bag.messages((self._recorded_clock,), first_ns), None)
            self._time = None if message is None else self._decoded_clock(message)

    def _decoded_clock(self, message: BagMessage) -> Clock | None:
        decoded = decode_or_none(self._bag, message)
        if decoded is None:
            return None
        clock = Clock()
        clock.clock.sec, clock.clock.nanosec = decoded.clock.sec, decoded.clock.nanosec
        return clock

    def _publish_time(self) -> None:
        if self._time is not None:
            self._clock.publish(self._time)

    def _wait_until(self, due_s: float, started_s: float, first_ns: int, stop: ExitRequest) -> bool:
        """Publish the clock until `due_s`; return False if playing has to stop."""
        while (remaining_s := due_s - time.monotonic()) > 0.0:
            if stop.wait(min(remaining_s, _CLOCK_PERIOD_S)):
                return False
            elapsed_s = min(time.monotonic(), due_s) - started_s
            if self._recorded_clock is None:
                self._time = _clock_message(first_ns + round(elapsed_s * self._rate * _NS))
            self._publish_time()
        return not stop.is_set()


def _only_looks(node_name: str) -> bool:
    """Whether a node is a hidden one of the command line, and its name is already known."""
    return node_name.startswith("_") and "UNKNOWN" not in node_name


def recorded_clock(bag: BagReader) -> str | None:
    """Return the topic of the clock in a bag, that of a simulation; None if it has none."""
    clocks = [topic for topic in bag.of_type(CLOCK) if topic.count]
    named = [topic for topic in clocks if topic.name == CLOCK_TOPIC]
    return (named or clocks)[0].name if clocks else None


def _clock_message(time_ns: int) -> Clock:
    clock = Clock()
    clock.clock.sec, clock.clock.nanosec = divmod(time_ns, _NS)
    return clock


class BagRecorder:
    """Write the messages of some topics to a bag, as they arrive.

    Attributes:
        recorded: messages written so far, per topic.
        types: type of every topic that is recorded.
    """

    def __init__(self, node: Node, writer: BagWriter) -> None:
        self.recorded: Counter[str] = Counter()
        self.types: dict[str, str] = {}
        self._node = node
        self._writer = writer
        self._committed_s = time.monotonic()

    def subscribe(self, topic: str, type_name: str) -> bool:
        """Record a topic from now on; return False if its type is not installed here."""
        kind = message_class(type_name)
        if kind is None:
            return False
        qos = self._qos(topic)
        self._writer.add_topic(topic, type_name, latched=qos.durability == DurabilityPolicy.TRANSIENT_LOCAL)
        self.types[topic] = type_name
        self._node.create_subscription(kind, topic, partial(self._write, topic), qos, raw=True)
        return True

    def _qos(self, topic: str) -> QoSProfile:
        """Return the strictest QoS that all present publishers of a topic offer."""
        offers = [info.qos_profile for info in self._node.get_publishers_info_by_topic(topic)]
        reliable = bool(offers) and all(offer.reliability == ReliabilityPolicy.RELIABLE for offer in offers)
        latched = bool(offers) and all(offer.durability == DurabilityPolicy.TRANSIENT_LOCAL for offer in offers)
        return QoSProfile(
            depth=_RECORD_DEPTH,
            reliability=ReliabilityPolicy.RELIABLE if reliable else qos_profile_sensor_data.reliability,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
        )

    def _write(self, topic: str, data: bytes) -> None:
        self._writer.write(topic, self._node.get_clock().now().nanoseconds, data)
        self.recorded[topic] += 1

    def commit(self) -> None:
        """Once a second, commit what was written, so that it survives this process."""
        if time.monotonic() - self._committed_s >= _COMMIT_PERIOD_S:
            self._committed_s = time.monotonic()
            self._writer.commit()
