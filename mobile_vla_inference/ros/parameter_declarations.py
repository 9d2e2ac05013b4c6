"""How a node declares its parameters: each one is a field of a frozen dataclass.

The field is the only source of a parameter's name, type, default, range and description. The ROS declaration, the
checks, the live changes and the documentation are derived from it.
"""

from __future__ import annotations

import array
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, get_type_hints

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node
from rclpy.parameter import Parameter

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.ros.overrides import given_parameters
from mobile_vla_inference.ros.parameter_files import expand_home

_ARRAYS = (list, tuple, array.array, bytes)
_ARRAY_TYPES = {
    tuple[str, ...]: Parameter.Type.STRING_ARRAY,
    tuple[float, ...]: Parameter.Type.DOUBLE_ARRAY,
}
_TYPE_NAMES = {
    bool: "bool",
    int: "integer",
    float: "double",
    str: "string",
    tuple[str, ...]: "string array",
    tuple[float, ...]: "double array",
}


class ParameterError(MobileVlaError):
    """A parameter can't be used."""


def parameter(
    default: Any,
    description: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    read_only: bool = False,
    path: bool = False,
) -> Any:
    """Return a dataclass field that is a parameter.

    Args:
        default: of the field's type: bool, int, float, str, or a tuple of str or float, whose default is empty.
        description: shown by `ros2 param describe`.
        low: smallest value.
        high: largest value.
        choices: the only values; an empty one stands for "not set".
        read_only: a change needs a restart.
        path: a leading `~` stands for the home folder.
    """
    metadata = {
        "description": description,
        "low": low,
        "high": high,
        "choices": choices,
        "read_only": read_only,
        "path": path,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Declaration:
    """One parameter; the attributes are those of `parameter`, with its name and type."""

    name: str
    type: Any
    default: Any
    description: str
    low: float | None
    high: float | None
    choices: tuple[str, ...] | None
    read_only: bool
    path: bool

    @property
    def type_name(self) -> str:
        """The type as ROS calls it."""
        return _TYPE_NAMES[self.type]

    @property
    def array_type(self) -> Parameter.Type | None:
        """The ROS type of an array; None for a single value."""
        return _ARRAY_TYPES.get(self.type)

    @property
    def expected(self) -> str:
        """The values that are allowed, as part of a sentence."""
        if self.choices is not None:
            return f"one of {', '.join(filter(None, self.choices))}"
        if self.type is bool:
            return "true or false"
        name = f"{'an' if self.type is int else 'a'} {self.type_name}"
        return name if self.low is None else f"{name} {self.range_text}"

    @property
    def range_text(self) -> str:
        """The range, as part of a sentence; empty without one."""
        return "" if self.low is None else f"from {_number(self.low)} to {_number(self.high)}"

    @property
    def descriptor(self) -> ParameterDescriptor:
        """Description and range for the parameter services."""
        description = self.description
        if self.choices is not None:
            description += f" One of {', '.join(filter(None, self.choices))}."
        descriptor = ParameterDescriptor(description=description, read_only=self.read_only)
        if self.low is not None and self.type is float:
            descriptor.floating_point_range = [FloatingPointRange(from_value=self.low, to_value=self.high, step=0.0)]
        elif self.low is not None:
            descriptor.integer_range = [IntegerRange(from_value=int(self.low), to_value=int(self.high), step=1)]
        return descriptor

    def check(self, value: Any) -> None:
        """Raise ParameterError if a value of the right type is outside the range or the choices."""
        if self.choices is not None and value not in self.choices:
            raise ParameterError(f"parameter {self.name} is {value!r}, expected {self.expected}; correct it")
        if self.low is not None and not (math.isfinite(value) and self.low <= value <= self.high):
            raise ParameterError(f"parameter {self.name} is {value!r}, expected a number {self.range_text}; correct it")

    def check_given(self, given: Parameter) -> None:
        """Raise ParameterError if a value of the command line or of a file has a wrong type or is not allowed."""
        if not self._has_type(given):
            found = [] if given.type_ is Parameter.Type.NOT_SET else given.value
            raise ParameterError(
                f"parameter {self.name} is {found!r}, expected {self.expected}{self._hint(given)}; correct it"
            )
        self.check(given.value)

    def _has_type(self, given: Parameter) -> bool:
        if self.array_type is None:
            return given.type_ is Parameter.Type.from_parameter_value(self.default)
        # An empty list has no type for rcl: `[]`, also as `ros2 param dump` writes it, is not set.
        return given.type_ in (self.array_type, Parameter.Type.NOT_SET)

    def _hint(self, given: Parameter) -> str:
        """Say how a whole number is written where a double is expected."""
        if self.type is float and given.type_ is Parameter.Type.INTEGER:
            return f", write {float(given.value)!r}"
        if self.type == tuple[float, ...] and given.type_ is Parameter.Type.INTEGER_ARRAY:
            return f", write {[float(each) for each in given.value]}"
        return ""


@dataclass(frozen=True)
class DeclaredParameters:
    """Base of a dataclass whose fields are all made by `parameter`; its values are always allowed ones."""

    def __post_init__(self) -> None:
        """Raise ParameterError, with the parameter's name, for a value that is not allowed."""
        for declaration in declarations(type(self)):
            declaration.check(getattr(self, declaration.name))

    def changed(self: Values, changes: dict[str, Any]) -> Values:
        """Return a copy with `changes`; raise ParameterError for a value that is not allowed."""
        return replace(self, **{name: _as_field(value) for name, value in changes.items()})


Values = TypeVar("Values", bound=DeclaredParameters)


def declarations(kind: type[DeclaredParameters]) -> list[Declaration]:
    """Return the parameters of a dataclass in its order."""
    types = get_type_hints(kind)
    return [Declaration(each.name, types[each.name], each.default, **each.metadata) for each in fields(kind)]


def declare_parameters(node: Node, kind: type[Values]) -> Values:
    """Declare every parameter of a dataclass on `node`, and return the values in force.

    Raises:
        ParameterError: a given value has the wrong type or is not allowed.
    """
    given = given_parameters(node)
    declared = declarations(kind)
    values = {each.name: _declare(node, each, given.get(each.name)) for each in declared}
    # Humble has no such hook: an array can be set to empty there only by a request that contains the array's type.
    add_callback = getattr(node, "add_pre_set_parameters_callback", None)
    if add_callback is not None:
        types = {each.name: each.array_type for each in declared}
        add_callback(lambda parameters: [_with_type(each, types.get(each.name)) for each in parameters])
    return kind(**values)


def _declare(node: Node, declaration: Declaration, given: Parameter | None) -> Any:
    """Declare one parameter and return its value; `given` is the value of the command line or of a file, if any."""
    if given is not None:
        declaration.check_given(given)
    array_type = declaration.array_type
    try:
        declared = node.declare_parameter(declaration.name, array_type or declaration.default, declaration.descriptor)
    except Exception as error:  # rclpy raises several unrelated classes for a bad override, by distribution
        raise ParameterError(
            f"parameter {declaration.name} is refused, expected {declaration.expected}: {error}"
        ) from error
    if array_type is not None and declared.value is None:
        # An empty array can only be set, not declared: its type can't be derived from it. And if one parameter has no
        # value, rclpy answers a request for all parameters with nothing.
        declared = Parameter(declaration.name, array_type, [])
        node.set_parameters([declared])
    return expand_home(declared.value) if declaration.path else _as_field(declared.value)


def _with_type(given: Parameter, array_type: Parameter.Type | None) -> Parameter:
    """Return a parameter to set; an empty array gets the declared type: `[]` on a command line has another."""
    is_empty = isinstance(given.value, _ARRAYS) and len(given.value) == 0
    return Parameter(given.name, array_type, []) if array_type is not None and is_empty else given


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _as_field(value: Any) -> Any:
    """Return a parameter's value as the dataclass stores it: an array as a tuple."""
    return tuple(value) if isinstance(value, (list, array.array)) else value
