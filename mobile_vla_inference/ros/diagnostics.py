"""What the node knows of itself, as diagnostic_msgs: one DiagnosticStatus per subject."""

from __future__ import annotations

from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from rclpy.qos import ReliabilityPolicy

OK, WARN, ERROR, STALE = (
    DiagnosticStatus.OK,
    DiagnosticStatus.WARN,
    DiagnosticStatus.ERROR,
    DiagnosticStatus.STALE,
)


def diagnostic_status(
    node_name: str, subject: str, level: bytes, message: str, values: dict[str, Any]
) -> DiagnosticStatus:
    """Return a status named `<node>: <subject>` with `values` as text."""
    return DiagnosticStatus(
        level=level,
        name=f"{node_name}: {subject}",
        message=message,
        hardware_id=node_name,
        values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
    )


def explain_mismatch(publishers: list[Any], message_type: str, reliable: bool) -> str:
    """Say which publishers of a topic can never reach our subscription, and why; empty where all can.

    Args:
        publishers: rclpy TopicEndpointInfo of the topic's publishers.
        message_type: ours, such as `sensor_msgs/msg/Image`.
        reliable: whether we ask for reliable delivery.
    """
    faults = []
    for publisher in publishers:
        name = f"{publisher.node_namespace.rstrip('/')}/{publisher.node_name}"
        if publisher.topic_type != message_type:
            faults.append(f"{name} sends {publisher.topic_type}, expected {message_type}; see image_transport")
        elif reliable and publisher.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT:
            faults.append(f"{name} offers best effort only, we ask for reliable; set image_reliability to best_effort")
    return "; ".join(faults)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)
