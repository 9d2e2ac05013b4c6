"""What the node knows of itself, as diagnostic_msgs: one DiagnosticStatus per subject."""

from __future__ import annotations

from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

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


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)
