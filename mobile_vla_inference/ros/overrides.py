"""Parameters from the command line and from files; an unknown one is refused, because rclpy ignores it."""

from __future__ import annotations

import difflib

from rclpy.node import Node
from rclpy.parameter import Parameter

from mobile_vla_inference.errors import MobileVlaError

#: How many similar names are suggested for a misspelt one: there are several speed limits.
_NEAREST = 5


def given_parameters(node: Node) -> dict[str, Parameter]:
    """Return a node's parameters from the command line and parameter files, declared or not, by name."""
    with node.handle:
        return node.handle.get_parameters(Parameter)


def refuse_unknown_parameters(node: Node) -> None:
    """Check the given parameters of a node, after it has declared its own.

    Raises:
        MobileVlaError: a given parameter is not declared; the sentence contains it and similar names, or all names.
    """
    unknown = sorted(name for name in given_parameters(node) if not node.has_parameter(name))
    if not unknown:
        return
    declared = sorted(node.get_parameters_by_prefix(""))
    near = {name: difflib.get_close_matches(name, declared, n=_NEAREST) for name in unknown}
    expected = dict.fromkeys(each for names in near.values() for each in names) if all(near.values()) else declared
    raise MobileVlaError(
        f"{node.get_name()} has no parameter {', '.join(map(repr, unknown))}, expected {', '.join(expected)}; "
        "correct the -p argument or the parameter file"
    )
