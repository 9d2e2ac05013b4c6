"""LiveParameters: a node's parameters in force; a change is checked as a whole before any of it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic

from rcl_interfaces.msg import SetParametersResult
from rclpy.parameter import Parameter

from mobile_vla_inference.ros.parameter_declarations import ParameterError, Values


class LiveParameters(Generic[Values]):
    """Hold the values in force.

    Attributes:
        values: replaced as a whole by a change; read it again each time.
    """

    def __init__(self, values: Values) -> None:
        self.values = values

    def change(self, changes: Sequence[Parameter], apply: Callable[[Values], None]) -> SetParametersResult:
        """Put other values in force.

        Args:
            changes: what is set; parameters of rclpy's own are accepted and not looked at.
            apply: puts all values into the parts of the node, or raises ParameterError and changes nothing.

        Returns:
            what the parameter service answers: a refusal names the parameter.
        """
        own = {change.name: change.value for change in changes if hasattr(self.values, change.name)}
        try:
            values = self.values.changed(own)
            apply(values)
        except ParameterError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self.values = values
        return SetParametersResult(successful=True)
