"""EveryPublisher: hear a topic whatever reliability and durability its publishers offer, each message once.

A subscription that asks for reliable delivery never hears a best-effort publisher, and one that doesn't ask for it may
lose what a reliable one sends: so there are both, and what arrives by both counts once. Only a transient-local
subscription is told what was said before it came; it is added when such a publisher is seen, because beside any other
publisher it makes the middleware warn of messages that are lost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription

#: Messages that may wait for the executor: none of them is overwritten by a later one.
_DEPTH = 100
#: Messages that are remembered, to know them again when they arrive by another subscription.
_REMEMBERED = 4 * _DEPTH

#: Whether rclpy hands on when a message was sent; Humble's doesn't, and there what arrives twice is handled twice.
_HAS_INFO = hasattr(Subscription, "CallbackType")

_RELIABILITIES = (ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT)


class EveryPublisher:
    """Subscriptions to one topic that together match every publisher.

    The callbacks of `group` and `take_pending` belong to one thread, the executor's; `match` to any other.
    """

    def __init__(
        self,
        node: Node,
        message_type: type,
        topic: str,
        callback: Callable[[Any], None],
        group: CallbackGroup,
        replayed: Callable[[Any], bool] | None = None,
    ) -> None:
        """Subscribe.

        Args:
            node: the subscribing node.
            message_type: with one field, `data`.
            topic: its name.
            callback: given each message that is sent from now on, in order for each publisher; it must do no harm where
                it is given one twice (see _HAS_INFO).
            group: callback group.
            replayed: given what transient-local publishers have sent, from before this came or from now on; returns
                whether it heeds it, and `callback` is not given that once more; None: the past does not count.
        """
        self._node, self._type, self._topic, self._group = node, message_type, topic, group
        self._callback = callback
        self._replayed = replayed
        self._replaying: set[ReliabilityPolicy] = set()
        self._seen: OrderedDict[tuple[int, Any], None] = OrderedDict()
        self.type_name = f"{message_type.__module__.split('.')[0]}/msg/{message_type.__name__}"

        on_message = self._on_message if _HAS_INFO else callback
        self._subscriptions = [
            self._subscribe(reliability, DurabilityPolicy.VOLATILE, on_message) for reliability in _RELIABILITIES
        ]
        self.topic_name = self._subscriptions[0].topic_name

    def _subscribe(self, reliability: ReliabilityPolicy, durability: DurabilityPolicy, callback: Callable) -> Any:
        qos = QoSProfile(depth=_DEPTH, reliability=reliability, durability=durability)
        return self._node.create_subscription(self._type, self._topic, callback, qos, callback_group=self._group)

    def match(self, publishers: list[Any]) -> None:
        """Subscribe to the past, too, where one of the topic's publishers (rclpy's TopicEndpointInfo) offers it."""
        if self._replayed is None:
            return
        for publisher in publishers:
            reliability = publisher.qos_profile.reliability
            offers_past = publisher.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
            if offers_past and publisher.topic_type == self.type_name and reliability not in self._replaying:
                self._replaying.add(reliability)
                on_replayed = self._on_replayed if _HAS_INFO else self._replayed
                self._subscribe(reliability, DurabilityPolicy.TRANSIENT_LOCAL, on_replayed)

    def _on_message(self, message: Any, info: Any) -> None:
        if self._is_new(message, info):
            self._remember(message, info)
            self._callback(message)

    def _on_replayed(self, message: Any, info: Any) -> None:
        if self._is_new(message, info) and self._replayed(message):
            self._remember(message, info)

    def _is_new(self, message: Any, info: Any) -> bool:
        return _key(message, info) not in self._seen

    def _remember(self, message: Any, info: Any) -> None:
        self._seen[_key(message, info)] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def take_pending(self) -> None:
        """Handle what has arrived already, before the executor would come to it."""
        for subscription in self._subscriptions:
            with subscription.handle:
                while (taken := subscription.handle.take_message(subscription.msg_type, subscription.raw)) is not None:
                    self._on_message(*taken)


def _key(message: Any, info: Any) -> tuple[int, Any]:
    """Return what tells a message from others: when its publisher sent it, and what it says."""
    return (info["source_timestamp"] if isinstance(info, dict) else info.source_timestamp, message.data)
