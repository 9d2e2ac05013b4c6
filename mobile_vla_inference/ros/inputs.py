"""EveryPublisher: hear a topic whatever reliability and durability its publishers offer, each message once.

A subscription that asks for reliable delivery never hears a best-effort publisher, and one that doesn't ask for it may
lose what a reliable one sends; only a transient-local subscription is told what was said before it came. So there are
several, and what arrives by more than one of them counts once.
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

    Not thread-safe: the callbacks of `group` and `take_pending` belong to one thread, the executor's.
    """

    def __init__(
        self,
        node: Node,
        message_type: type,
        topic: str,
        callback: Callable[[Any], None],
        group: CallbackGroup,
        replayed: Callable[[Any], None] | None = None,
    ) -> None:
        """Subscribe.

        Args:
            node: the subscribing node.
            message_type: with one field, `data`.
            topic: its name.
            callback: given each message that is sent from now on, in order for each publisher; it must do no harm where
                it is given one twice (see _HAS_INFO).
            group: callback group.
            replayed: given what transient-local publishers have sent, from before this came or from now on, perhaps in
                addition to `callback`; None: the past does not count.
        """
        self._callback = callback
        self._seen: OrderedDict[tuple[int, Any], None] = OrderedDict()
        self.type_name = f"{message_type.__module__.split('.')[0]}/msg/{message_type.__name__}"

        def subscribe(durability: DurabilityPolicy, on_message: Callable) -> list[Any]:
            return [
                node.create_subscription(
                    message_type,
                    topic,
                    on_message,
                    QoSProfile(depth=_DEPTH, reliability=reliability, durability=durability),
                    callback_group=group,
                )
                for reliability in _RELIABILITIES
            ]

        self._subscriptions = subscribe(DurabilityPolicy.VOLATILE, self._on_message if _HAS_INFO else callback)
        if replayed is not None:
            subscribe(DurabilityPolicy.TRANSIENT_LOCAL, replayed)
        self.topic_name = self._subscriptions[0].topic_name

    def _on_message(self, message: Any, info: Any) -> None:
        sent_ns = info["source_timestamp"] if isinstance(info, dict) else info.source_timestamp
        key = (sent_ns, message.data)
        if sent_ns and key in self._seen:
            return
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        self._callback(message)

    def take_pending(self) -> None:
        """Handle what has arrived already, before the executor would come to it."""
        for subscription in self._subscriptions:
            with subscription.handle:
                while (taken := subscription.handle.take_message(subscription.msg_type, subscription.raw)) is not None:
                    self._on_message(*taken)
