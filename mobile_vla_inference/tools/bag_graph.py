"""Bags and the ROS graph: publish a bag's messages in their time, and record messages as they arrive.

Messages pass as CDR bytes, never unpacked: a subscription is raw, and a publisher takes bytes.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock

from mobile_vla_inference.bags.reader import BagMessage, BagReader
from mobile_vla_inference.bags.writer import BagWriter

_NS = 1_000_000_000
_CLOCK_PERIOD_S = 0.01
_COMMIT_PERIOD_S = 1.0
#: How long the last messages of a topic are waited for.
_DELIVERY_LIMIT_S = 1.0
#: Reliable publishers reach both kinds of subscription.
_PLAY_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
#: Messages that arrive in a burst must not push each other out.
_RECORD_DEPTH = 100


def message_class(type_name: str) -> type | None:
    """Return the class of `package/msg/Name`; None where the package is not installed."""
    package, _, name = type_name.replace("/", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(package), name, None)
    except ImportError:
        return None


class BagPlayer:
    """Publish the messages of a bag in their order and time, with `/clock`.

    Attributes:
        published: messages sent so far, per topic on the graph.
        not_installed: types of the bag whose packages this machine lacks; their topics are left out.
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
            node: who publishes.
            bag: an open bag.
            topics: topic in the bag -> topic on the graph; others are left out.
            rate: how much faster than recorded.
            on_message: called with every message just before it is sent.
        """
        self.published: Counter[str] = Counter()
        self.not_installed: list[str] = []
        self._bag = bag
        self._rate = rate
        self._on_message = on_message
        self._clock = node.create_publisher(Clock, "/clock", _PLAY_QOS)
        self._publishers: dict[str, Any] = {}
        for name, target in topics.items():
            kind = message_class(bag.topics[name].type_name)
            if kind is None:
                self.not_installed.append(bag.topics[name].type_name)
            else:
                self._publishers[name] = node.create_publisher(kind, target, _PLAY_QOS)

    def wait_for_listeners(self, limit_s: float, stop: threading.Event) -> bool:
        """Wait until every topic but the clock has a subscriber, with the clock standing; return whether that is so."""
        deadline_s = time.monotonic() + limit_s
        while not stop.is_set():
            if all(publisher.get_subscription_count() for publisher in self._publishers.values()):
                return True
            if time.monotonic() >= deadline_s:
                break
            self.set_clock(self._bag.start_ns or 0)
            stop.wait(_CLOCK_PERIOD_S)
        return False

    def set_clock(self, time_ns: int) -> None:
        """Publish the time."""
        clock = Clock()
        clock.clock.sec, clock.clock.nanosec = divmod(time_ns, _NS)
        self._clock.publish(clock)

    def play(self, stop: threading.Event, start_offset_s: float = 0.0) -> None:
        """Publish the bag once, from `start_offset_s` on, until its end or until `stop` is set."""
        first_ns = (self._bag.start_ns or 0) + round(start_offset_s * 1e9)
        started_s = time.monotonic()
        for message in self._bag.messages(self._publishers, first_ns):
            due_s = started_s + (message.time_ns - first_ns) / _NS / self._rate
            if not self._wait_until(due_s, started_s, first_ns, stop):
                return
            self._on_message(message)
            self.set_clock(message.time_ns)
            publisher = self._publishers[message.topic]
            publisher.publish(message.data)
            self.published[publisher.topic_name] += 1
        for publisher in self._publishers.values():  # a process that leaves takes what is on its way with it
            publisher.wait_for_all_acked(Duration(seconds=_DELIVERY_LIMIT_S))

    def _wait_until(self, due_s: float, started_s: float, first_ns: int, stop: threading.Event) -> bool:
        """Keep the clock going until `due_s`; return False where playing is to stop."""
        while (remaining_s := due_s - time.monotonic()) > 0.0:
            if stop.wait(min(remaining_s, _CLOCK_PERIOD_S)):
                return False
            elapsed_s = min(time.monotonic(), due_s) - started_s
            self.set_clock(first_ns + round(elapsed_s * self._rate * _NS))
        return not stop.is_set()


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
        """Record a topic from now on; return False where its type is not installed here."""
        kind = message_class(type_name)
        if kind is None:
            return False
        self._writer.add_topic(topic, type_name)
        self.types[topic] = type_name
        self._node.create_subscription(kind, topic, partial(self._write, topic), self._qos(topic), raw=True)
        return True

    def _qos(self, topic: str) -> QoSProfile:
        """Return the most that all present publishers of a topic offer."""
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
        """Once a second, make sure that what was written survives this process."""
        if time.monotonic() - self._committed_s >= _COMMIT_PERIOD_S:
            self._committed_s = time.monotonic()
            self._writer.commit()
