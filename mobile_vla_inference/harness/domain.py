"""A private ROS 2 graph: a domain that no other process uses, on this machine only.

The demo and the tests publish on `cmd_vel`, so they must never meet a real robot's graph, nor each other's.
"""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from mobile_vla_inference.errors import MobileVlaError

#: Domains whose ports are below Linux's ephemeral ports (32768 and up).
DOMAIN_IDS = range(1, 102)

# The ports of the DDS wire protocol (DDSI-RTPS 2.2, 9.6.1.1): base, ports per domain, discovery by multicast, discovery
# by unicast of a domain's first participants.
_PORT_BASE = 7400
_PORTS_PER_DOMAIN = 250
_MULTICAST_OFFSET = 0
_UNICAST_OFFSETS = range(10, 30, 2)

#: Variables that would connect the isolated graph to others.
_CONNECTING_VARIABLES = (
    "ROS_DISCOVERY_SERVER",
    "ROS_STATIC_PEERS",
    "FASTRTPS_DEFAULT_PROFILES_FILE",
    "FASTDDS_DEFAULT_PROFILES_FILE",
)


def require_rclpy() -> None:
    """Raise MobileVlaError, which says what to do, if rclpy is missing."""
    try:
        import rclpy  # noqa: F401
    except ImportError as error:
        raise MobileVlaError(
            f"rclpy can't be imported ({error}), expected a sourced ROS 2 or the environment that scripts/demo makes; "
            "source ROS 2 or run scripts/demo"
        ) from error


class DomainReservation:
    """A free domain: no other process can reserve it until it is closed or this process ends."""

    def __init__(self, domain_id: int, claim: socket.socket) -> None:
        self.domain_id = domain_id
        self._claim = claim

    def close(self) -> None:
        """Release the domain."""
        self._claim.close()


def reserve_domain() -> DomainReservation:
    """Reserve a domain that no participant on this machine uses; raise MobileVlaError if all are taken."""
    for domain_id in random.sample(DOMAIN_IDS, len(DOMAIN_IDS)):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            # A name in the abstract namespace is not a file, and is freed with the process however it ends.
            claim.bind(f"\0mobile_vla_inference.ros_domain.{domain_id}")
        except OSError:
            claim.close()
            continue
        if _is_free(domain_id):
            return DomainReservation(domain_id, claim)
        claim.close()
    raise MobileVlaError(
        f"every ROS domain from {DOMAIN_IDS[0]} to {DOMAIN_IDS[-1]} is in use on this machine, expected a free one; "
        "end some ROS processes"
    )


def isolated_environment(domain_id: int, base: Mapping[str, str]) -> dict[str, str]:
    """Return `base` with the variables that keep a process's ROS graph in a domain and on this machine.

    What is installed with this Python (the package, and ROS 2 as wheels) is added to the ament index, too.
    """
    environment = {name: value for name, value in base.items() if name not in _CONNECTING_VARIABLES}
    environment["ROS_DOMAIN_ID"] = str(domain_id)
    environment["HF_HUB_OFFLINE"] = "1"
    if base.get("ROS_DISTRO") == "humble":
        environment["ROS_LOCALHOST_ONLY"] = "1"
    else:
        environment.pop("ROS_LOCALHOST_ONLY", None)  # would override the next variable
        environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    index = Path(sys.prefix) / "share/ament_index/resource_index"
    if index.is_dir():
        prefixes = environment.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
        others = [prefix for prefix in prefixes if prefix and prefix != sys.prefix]
        environment["AMENT_PREFIX_PATH"] = os.pathsep.join([sys.prefix, *others])
    if (index / "rosidl_interfaces").is_dir():  # ROS 2 as wheels contains this implementation only
        environment["RMW_IMPLEMENTATION"] = "rmw_fastrtps_cpp"
    return environment


def isolate() -> DomainReservation:
    """Isolate this process and its children, before rclpy starts; the domain is reserved until the result is closed."""
    reservation = reserve_domain()
    environment = isolated_environment(reservation.domain_id, os.environ)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    return reservation


def _is_free(domain_id: int) -> bool:
    """Whether the discovery ports of a domain's first participants can all be bound."""
    return all(
        _can_bind(_PORT_BASE + _PORTS_PER_DOMAIN * domain_id + offset)
        for offset in (_MULTICAST_OFFSET, *_UNICAST_OFFSETS)
    )


def _can_bind(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
