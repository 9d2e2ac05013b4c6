"""GraphWatch: which other nodes are on the node's topics, and whether they and the node can receive each other.

The middleware says nothing about endpoints that don't match; here they are reported. A question to the graph can wait
for the middleware, so these have a thread of their own, and the other threads read the last answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.ros.inputs import EveryPublisher

#: Details are queried when a count changes, and at least this often: names are known later than counts.
_DETAILS_PERIOD_S = 0.25


@dataclass(frozen=True)
class GraphFacts:
    """The newest state of the graph.

    Attributes:
        image_publishers: how many publishers the image topic has.
        image_mismatch: which of them the node can't receive, and why; empty: it receives all.
        stop_unheard: which publishers of the stop topic the node can't receive, and why; empty: it receives all.
        cmd_vel_publishers: how many publishers `cmd_vel` has, this node's own included.
        stop_publishers: how many publishers the stop topic has.
        warnings: a sentence for each thing that a person should correct, `image_mismatch` excepted.
    """

    image_publishers: int = 0
    image_mismatch: str = ""
    stop_unheard: str = ""
    cmd_vel_publishers: int = 1
    stop_publishers: int = 0
    warnings: tuple[str, ...] = ()


class GraphWatch:
    """Query the graph around a node.

    Attributes:
        seen: the newest facts.
        looked_s: when `look` succeeded last, steady clock.
    """

    #: How often to call `look`, seconds.
    PERIOD_S = 0.02

    def __init__(
        self,
        node: Node,
        image: tuple[str, str, str],
        inputs: Sequence[EveryPublisher],
        cmd_vel: tuple[str, str],
        changed: Callable[[GraphFacts], object],
    ) -> None:
        """Query nothing yet.

        Args:
            node: the node with these topics.
            image: topic, message type and reliability (`reliable` or `best_effort`) of the image subscription.
            inputs: the stop topic, then the other inputs.
            cmd_vel: topic and message type of the commands.
            changed: called by `look` with the facts, when they differ from those before.
        """
        self._node = node
        self._image_topic, self._image_type, self._image_reliability = image
        self._stop, self._other_inputs = inputs[0], inputs[1:]
        self._cmd_vel_topic, self._cmd_vel_type = cmd_vel
        self._changed = changed
        self._counts: tuple[int, ...] = ()
        self._details_s = 0.0
        self.seen = GraphFacts()
        self.looked_s = steady_s()

    def look(self) -> None:
        """Query the graph; the facts are up to 0.25 s old afterwards."""
        node, now_s = self._node, steady_s()
        topics = (self._image_topic, self._cmd_vel_topic, self._stop.topic_name)
        topics += tuple(each.topic_name for each in self._other_inputs)
        counts = (*map(node.count_publishers, topics), node.count_subscribers(self._cmd_vel_topic))
        # The counts stop the robot; they don't wait for the names.
        images, commands, stops, *_ = counts
        self._see(replace(self.seen, image_publishers=images, cmd_vel_publishers=commands, stop_publishers=stops))
        if counts != self._counts or now_s - self._details_s >= _DETAILS_PERIOD_S:
            self._see(self._details())
            self._counts, self._details_s = counts, now_s
        self.looked_s = now_s

    def _see(self, facts: GraphFacts) -> None:
        if facts != self.seen:
            self.seen = facts
            self._changed(facts)

    def _details(self) -> GraphFacts:
        """Return the facts with names and reasons."""
        stop_unheard = self._unreceived(self._stop)
        images = self._node.get_publishers_info_by_topic(self._image_topic)
        return replace(
            self.seen,
            image_mismatch=explain_mismatch(images, self._image_type, self._image_reliability == "reliable"),
            stop_unheard=stop_unheard,
            warnings=tuple(
                filter(
                    None,
                    (
                        stop_unheard,
                        *map(self._unreceived, self._other_inputs),
                        self._other_commanders(),
                        self._same_name(),
                        *self._mismatched_bases(),
                    ),
                )
            ),
        )

    def _unreceived(self, topic: EveryPublisher) -> str:
        publishers = self._node.get_publishers_info_by_topic(topic.topic_name)
        topic.match(publishers)
        return explain_mismatch(publishers, topic.type_name, reliable=False)

    def _other_commanders(self) -> str:
        names = [_name(each) for each in self._node.get_publishers_info_by_topic(self._cmd_vel_topic)]
        own = self._node.get_fully_qualified_name()
        if own in names:
            names.remove(own)
        return f"{', '.join(names)} publishes on {self._cmd_vel_topic}, expected only this node" * bool(names)

    def _same_name(self) -> str:
        own = self._node.get_fully_qualified_name()
        count = sum(f"{space.rstrip('/')}/{name}" == own for name, space in self._node.get_node_names_and_namespaces())
        return f"{count} nodes have the name {own}, expected one; end the others or give each a namespace" * (count > 1)

    def _mismatched_bases(self) -> list[str]:
        """Return a sentence for each subscription of `cmd_vel` that can't receive the commands."""
        faults = []
        for base in self._node.get_subscriptions_info_by_topic(self._cmd_vel_topic):
            if base.topic_type.rpartition("/")[2] != self._cmd_vel_type:
                faults.append(
                    f"{_name(base)} expects {base.topic_type} on {self._cmd_vel_topic}, this node sends "
                    f"geometry_msgs/msg/{self._cmd_vel_type}; see the parameter stamped"
                )
            elif base.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL:
                faults.append(
                    f"{_name(base)} requests transient-local commands on {self._cmd_vel_topic}, expected volatile: "
                    "an old command must not be sent to it again; change its QoS"
                )
        return faults


def _name(endpoint: Any) -> str:
    return f"{endpoint.node_namespace.rstrip('/')}/{endpoint.node_name}"


def explain_mismatch(publishers: list[Any], message_type: str, reliable: bool) -> str:
    """Say which publishers of a topic can never reach our subscription, and why; empty if all can.

    Args:
        publishers: rclpy TopicEndpointInfo of the topic's publishers.
        message_type: ours, such as `sensor_msgs/msg/Image`.
        reliable: whether we request reliable delivery.
    """
    faults = []
    for publisher in publishers:
        if publisher.topic_type != message_type:
            faults.append(
                f"{_name(publisher)} sends {publisher.topic_type}, expected {message_type}; see image_transport"
            )
        elif reliable and publisher.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT:
            faults.append(
                f"{_name(publisher)} offers best effort only, this node requests reliable; "
                "set image_reliability to best_effort"
            )
    return "; ".join(faults)
