"""EveryPublisher: receive a topic at any reliability and durability of its publishers, each message once.

A reliable subscription never matches a best-effort publisher; a best-effort one can lose the messages of a reliable
publisher; only a transient-local one receives messages that were published before it existed. So further subscriptions
are added to the reliable one when a publisher needs them. Unneeded ones would make the middleware warn of lost
messages, and would receive each message twice. A message that arrives twice is handled once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription

#: Messages that can wait for the executor: none of them is overwritten by a later one.
_DEPTH = 100
#: Messages that are remembered, to recognise them when they arrive through another subscription.
_REMEMBERED = 4 * _DEPTH

#: Whether rclpy passes on when a message was sent. In Humble it doesn't: a message that arrives twice is handled twice.
_HAS_INFO = hasattr(Subscription, "CallbackType")


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
            callback: called with each message that is sent from now on, in order for each publisher; it must do no harm
                if it is called twice with one (see _HAS_INFO).
            group: callback group.
            replayed: called with the messages of transient-local publishers, also with those sent earlier; returns
                whether it has handled the message, which is not passed to `callback` then; None: earlier messages are
                not received.
        """
        self._node, self._type, self._topic, self._group = node, message_type, topic, group
        self._callback = callback
        self._replayed = replayed
        self._seen: OrderedDict[tuple[int, Any], None] = OrderedDict()
        self._on_live = self._on_message if _HAS_INFO else callback
        self._on_past = self._on_replayed if _HAS_INFO else replayed
        self._subscriptions: dict[tuple[ReliabilityPolicy, DurabilityPolicy], Any] = {}
        self._subscribe(ReliabilityPolicy.RELIABLE, DurabilityPolicy.VOLATILE)
        self.topic_name = next(iter(self._subscriptions.values())).topic_name
        self.type_name = f"{message_type.__module__.split('.')[0]}/msg/{message_type.__name__}"

    def _subscribe(self, reliability: ReliabilityPolicy, durability: DurabilityPolicy) -> None:
        """Subscribe with these policies, unless there is such a subscription."""
        if (reliability, durability) not in self._subscriptions:
            callback = self._on_live if durability == DurabilityPolicy.VOLATILE else self._on_past
            qos = QoSProfile(depth=_DEPTH, reliability=reliability, durability=durability)
            self._subscriptions[reliability, durability] = self._node.create_subscription(
                self._type, self._topic, callback, qos, callback_group=self._group
            )

    def match(self, publishers: list[Any]) -> None:
        """Add the subscriptions that the topic's publishers (rclpy's TopicEndpointInfo) need."""
        for publisher in publishers:
            if publisher.topic_type != self.type_name:
                continue
            qos = publisher.qos_profile
            best_effort = qos.reliability == ReliabilityPolicy.BEST_EFFORT
            reliability = ReliabilityPolicy.BEST_EFFORT if best_effort else ReliabilityPolicy.RELIABLE
            self._subscribe(reliability, DurabilityPolicy.VOLATILE)
            if self._replayed is not None and qos.durability == DurabilityPolicy.TRANSIENT_LOCAL:
                self._subscribe(reliability, DurabilityPolicy.TRANSIENT_LOCAL)

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

    def take_pending(self) -> list[Any]:
        """Handle the messages that have arrived but wait for the executor, and return them."""
        handled = []
        live = DurabilityPolicy.VOLATILE
        for subscription in [each for (_, kind), each in list(self._subscriptions.items()) if kind == live]:
            with subscription.handle:
                for _ in range(_DEPTH):  # bounded, in case more arrive all the time
                    taken = subscription.handle.take_message(subscription.msg_type, subscription.raw)
                    if taken is None:
                        break
                    self._on_message(*taken)
                    handled.append(taken[0])
        return handled


def _key(message: Any, info: Any) -> tuple[int, Any]:
    """Return what identifies a message: when its publisher sent it, and its content."""
    return (info["source_timestamp"] if isinstance(info, dict) else info.source_timestamp, message.data)
