"""What a node is given as parameters, and which of it is unknown: rclpy ignores a misspelt one without a word."""

from __future__ import annotations

import difflib

from rclpy.node import Node
from rclpy.parameter import Parameter

from mobile_vla_inference.errors import MobileVlaError

#: How many parameters a misspelt name may stand for: the limit of a speed is one of several.
_NEAREST = 5


def given_parameters(node: Node) -> dict[str, Parameter]:
    """Return what the command line and parameter files give a node, declared or not, by name."""
    with node.handle:
        return node.handle.get_parameters(Parameter)


def refuse_unknown_parameters(node: Node) -> None:
    """Check the given parameters of a node, after it has declared its own.

    Raises:
        MobileVlaError: a given parameter is not declared; the sentence names it and the nearest or all that are.
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
