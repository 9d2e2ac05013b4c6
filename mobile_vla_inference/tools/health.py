"""`mobile_vla health`: whether a running vla_node is healthy, by its own diagnostics; for a container's health check.

A node is healthy if it sends diagnostics and its policy is loading, ready or restarting. A robot that stands for a
reason (no instruction, a latched stop) is healthy: a restart would not help.
"""

from __future__ import annotations

import argparse
import os
import time

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.tools.arguments import add_json_argument, check_output
from mobile_vla_inference.tools.results import write_json

#: States of the policy that need no repair.
_HEALTHY = ("loading", "ready", "restarting")


class HealthError(MobileVlaError):
    """No healthy node was found."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--node", default="/vla_node", metavar="NAME", help="full name of the node (default: /vla_node)"
    )
    parser.add_argument(
        "--timeout", type=float, default=5.0, metavar="S", help="seconds to wait for its diagnostics (default: 5)"
    )
    add_json_argument(parser, "diagnostics")


def run(args: argparse.Namespace) -> int:
    """Print one line about the node; return 0 if it is healthy.

    Raises:
        HealthError: it sends no diagnostics, or its policy has failed.
    """
    check_output(args.json)
    statuses = _diagnostics(args.node.strip("/"), args.timeout)
    write_json(args.json, statuses)
    policy, gate = statuses["policy"], statuses["gate"]
    if policy["state"] not in _HEALTHY:
        cause = policy["last_error"] or policy["message"]
        raise HealthError(
            f"the policy of {args.node} is {policy['state']} ({cause}), expected one of {', '.join(_HEALTHY)}; see the "
            "node's log, then configure it again or restart it"
        )
    print(f"{args.node}: policy {policy['state']}, {policy['steps']} steps; {gate['message']}")
    return 0


def _diagnostics(node_name: str, timeout_s: float) -> dict[str, dict[str, str]]:
    """Return the newest diagnostics of a node: subject -> key -> value, with `message`."""
    # Shared memory of another user can't be read, and messages get lost without an error; UDP needs no permission.
    os.environ.setdefault("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray

    found: dict[str, dict[str, str]] = {}

    def receive(array: DiagnosticArray) -> None:
        for status in array.status:
            name, _, subject = status.name.partition(": ")
            if name == node_name:
                found[subject] = {"message": status.message, **{entry.key: entry.value for entry in status.values}}

    rclpy.init(args=[])
    node = rclpy.create_node("mobile_vla_health")
    try:
        node.create_subscription(DiagnosticArray, "/diagnostics", receive, 10)
        deadline_s = time.monotonic() + timeout_s
        while not found and (remaining_s := deadline_s - time.monotonic()) > 0:
            rclpy.spin_once(node, timeout_sec=remaining_s)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    if not found:
        raise HealthError(
            f"/{node_name} sent no diagnostics in {timeout_s:g} s, expected them every second; check that it runs and "
            "that ROS_DOMAIN_ID is the same"
        )
    return found
