"""The node's parameters: one declaration each, mirrored in a frozen dataclass.

The dataclass is the only source of name, type, default, range and description; the ROS declarations,
the checks and docs/parameters.md follow from it.
"""

from __future__ import annotations

import array
import math
import sys
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, get_type_hints

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node
from rclpy.parameter import Parameter

from mobile_vla_inference.action import AXES, ActionMapping
from mobile_vla_inference.control.gate import GateLimits
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.policy_facts import PolicyFacts
from mobile_vla_inference.ros.overrides import given_parameters
from mobile_vla_inference.ros.parameter_files import expand_home


class ParameterError(MobileVlaError):
    """A parameter can't be used."""


def _parameter(
    default: Any,
    description: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    read_only: bool = False,
    path: bool = False,
) -> Any:
    """Declare a parameter; `path` is one in which `~` stands for the home folder."""
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
class NodeParameters:
    """Every parameter of vla_node; read-only ones need a restart to change."""

    checkpoint: str = _parameter(
        "", "Checkpoint file (.pth, .safetensors) or converted folder.", read_only=True, path=True
    )
    processors: str = _parameter(
        "",
        "Folder with the Kosmos-2 and CLIP processors; empty: the one beside the checkpoint.",
        read_only=True,
        path=True,
    )
    device: str = _parameter(
        "auto",
        "Where the policy runs; auto takes the GPU if there is one.",
        choices=("auto", "cuda", "cpu"),
        read_only=True,
    )
    dtype: str = _parameter(
        "auto",
        "Precision of the policy; auto is float16 on a GPU and float32 on a CPU.",
        choices=("auto", "float32", "float16", "bfloat16"),
        read_only=True,
    )
    engine: str = _parameter(
        "auto",
        "How a step runs; auto takes the fastest that runs on the device.",
        choices=("auto", "graph", "compiled", "packed", "flat", "eager"),
        read_only=True,
    )
    force_load: bool = _parameter(
        False, "Load even where the available memory seems too small for the policy.", read_only=True
    )
    autostart: bool = _parameter(True, "Configure and activate at start, without a lifecycle manager.", read_only=True)
    image_transport: str = _parameter(
        "raw",
        "raw subscribes image_raw, compressed image_raw/compressed.",
        choices=("raw", "compressed"),
        read_only=True,
    )
    image_reliability: str = _parameter(
        "best_effort",
        "Reliability of the image subscription; best_effort matches every publisher.",
        choices=("best_effort", "reliable"),
        read_only=True,
    )
    stamped: bool = _parameter(False, "Publish TwistStamped instead of Twist on cmd_vel.", read_only=True)
    base_frame_id: str = _parameter("base_link", "frame_id of the TwistStamped commands.", read_only=True)
    publish_rate_hz: float = _parameter(
        20.0, "Rate at which cmd_vel repeats between steps; zero comes at 10 Hz at least.", low=1.0, high=200.0
    )
    action_axes: tuple[str, ...] = _parameter(
        (), f"Twist axis that each action drives, of {', '.join(AXES)}; not set ([]): as policy.json says."
    )
    action_scale: tuple[float, ...] = _parameter(
        (), "Command units (m/s, rad/s) per normalised unit, one per axis; not set ([]): as policy.json says."
    )
    max_linear_x_mps: float = _parameter(0.5, "Largest forward or backward speed.", low=0.0, high=5.0)
    max_linear_y_mps: float = _parameter(0.5, "Largest sideways speed (omnidirectional bases).", low=0.0, high=5.0)
    max_angular_z_radps: float = _parameter(1.0, "Largest turn rate.", low=0.0, high=10.0)
    max_linear_acceleration_mps2: float = _parameter(
        1.0, "Largest change of a linear speed per second; a stop is immediate.", low=0.01, high=50.0
    )
    max_angular_acceleration_radps2: float = _parameter(
        3.0, "Largest change of the turn rate per second; a stop is immediate.", low=0.01, high=100.0
    )
    image_timeout_s: float = _parameter(0.5, "An image older than this stops the robot.", low=0.05, high=10.0)
    future_stamp_tolerance_s: float = _parameter(
        0.1, "Images stamped further in the future than this are refused.", low=0.0, high=10.0
    )
    step_timeout_s: float = _parameter(
        2.0,
        "A longer policy step is a hang: the robot stops and the worker restarts. An action stops the robot once its "
        "image is so old.",
        low=0.1,
        high=120.0,
    )
    resume_within_s: float = _parameter(
        2.0, "Images that come back later than this leave the robot stopped until ~/enable.", low=0.05, high=60.0
    )
    state_gap_s: float = _parameter(
        2.0, "A longer gap between stepped images clears the hidden state.", low=0.1, high=600.0, read_only=True
    )
    stop_hold_s: float = _parameter(1.0, "How long zero is published before the node falls silent.", low=1.0, high=60.0)
    exclusive_cmd_vel: bool = _parameter(
        False, "Stand still while anybody else publishes on cmd_vel; otherwise the diagnostics warn of it."
    )
    soft_stop: bool = _parameter(
        False,
        "Slow down by the acceleration limits on an empty instruction or ~/enable false; faults always halt at once.",
    )
    memory_warn_mib: float = _parameter(
        1024.0, "Less available memory than this is a warning in the diagnostics.", low=0.0, high=1e6
    )
    memory_error_mib: float = _parameter(
        256.0, "Less available memory than this is an error in the diagnostics.", low=0.0, high=1e6
    )
    load_timeout_s: float = _parameter(
        600.0, "A load that takes longer is a hang.", low=1.0, high=7200.0, read_only=True
    )
    max_restarts: int = _parameter(
        5,
        "Worker restarts in a row before giving up; a minute without a fault ends the row.",
        low=0,
        high=1000,
        read_only=True,
    )

    def __post_init__(self) -> None:
        """Refuse, by name, what no robot should run with."""
        for declared in fields(self):
            _check(declared.name, getattr(self, declared.name), declared.metadata)

    def gate_limits(self) -> GateLimits:
        """Return the part that the gate enforces."""
        return GateLimits(**{limit.name: getattr(self, limit.name) for limit in fields(GateLimits)})

    def changed(self, changes: dict[str, Any]) -> NodeParameters:
        """Return a copy with `changes`, checked; raise ParameterError for a bad value."""
        return replace(self, **{name: _own_value(value) for name, value in changes.items()})

    def action_mapping(self, facts: PolicyFacts) -> ActionMapping:
        """Return how actions become velocities: by the policy's `facts`, unless these parameters differ.

        Raises:
            ParameterError: the axes and the scale don't fit the policy's actions.
        """
        try:
            mapping = ActionMapping(
                self.action_axes or facts.action_axes, self.action_scale or facts.action_scale, facts.action_offset
            )
        except ValueError as error:
            raise ParameterError(f"parameters action_axes and action_scale don't fit the policy: {error}") from error
        return mapping


def _own_value(value: Any) -> Any:
    """Return a parameter's value as this dataclass holds it: arrays as tuples."""
    return tuple(value) if isinstance(value, (list, array.array)) else value


def _check(name: str, value: Any, metadata: dict[str, Any]) -> None:
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if choices is not None and value not in choices:
        raise ParameterError(f"parameter {name} is {value!r}, expected one of {', '.join(choices)}; correct it")
    if low is not None and not (math.isfinite(value) and low <= value <= high):
        raise ParameterError(f"parameter {name} is {value!r}, expected a number from {low:g} to {high:g}; correct it")


def declare_parameters(node: Node) -> NodeParameters:
    """Declare every parameter on `node`, each with a value of its type, and return the values in force.

    Raises:
        ParameterError: a value of the wrong type, outside its range, or a parameter that does not exist.
    """
    given = given_parameters(node)
    values = {}
    for declared in fields(NodeParameters):
        value = _declare(node, declared, given.get(declared.name))
        values[declared.name] = expand_home(value) if declared.metadata["path"] else _own_value(value)
    # Humble has no such hook: there, not set again takes a request that names the array's type.
    add_callback = getattr(node, "add_pre_set_parameters_callback", None)
    if add_callback is not None:
        add_callback(_with_typed_empty_arrays)
    return NodeParameters(**values)


def _declare(node: Node, declared: Field, given: Parameter | None) -> Any:
    """Declare one parameter and return its value; `given` is what the command line and files say, if anything."""
    array_type = _ARRAY_TYPES.get(_type_of(declared))
    if given is not None:
        if not _has_type(given, declared):
            found = [] if given.type_ is Parameter.Type.NOT_SET else given.value
            raise ParameterError(
                f"parameter {declared.name} is {found!r}, expected {_expected(declared)}{_hint(declared, given)}; "
                "correct it"
            )
        _check(declared.name, given.value, declared.metadata)
    try:
        parameter = node.declare_parameter(declared.name, array_type or declared.default, _descriptor(declared))
    except Exception as error:  # rclpy raises several unrelated classes for a bad override, by distribution
        raise ParameterError(
            f"parameter {declared.name} is refused, expected {_expected(declared)}: {error}"
        ) from error
    if array_type is not None and parameter.value is None:
        # An empty array can't be declared, because its type can't be told from it, only set. Without a value, rclpy
        # would answer a request for all parameters with nothing.
        parameter = Parameter(declared.name, array_type, [])
        node.set_parameters([parameter])
    return parameter.value


def _has_type(given: Parameter, declared: Field) -> bool:
    array_type = _ARRAY_TYPES.get(_type_of(declared))
    if array_type is None:
        return given.type_ is Parameter.Type.from_parameter_value(declared.default)
    # An empty list has no type for rcl: `[]`, also as `ros2 param dump` writes it, is not set.
    return given.type_ in (array_type, Parameter.Type.NOT_SET)


def _hint(declared: Field, given: Parameter) -> str:
    """Say how a whole number is written where a double is expected."""
    if _type_of(declared) is float and given.type_ is Parameter.Type.INTEGER:
        return f", write {float(given.value)!r}"
    if _type_of(declared) == tuple[float, ...] and given.type_ is Parameter.Type.INTEGER_ARRAY:
        return f", write {[float(each) for each in given.value]}"
    return ""


def _with_typed_empty_arrays(parameters: list[Parameter]) -> list[Parameter]:
    """Return parameters to set, an empty array as one of the declared type: `[]` on a command line has another."""
    types = {declared.name: _ARRAY_TYPES.get(_type_of(declared)) for declared in fields(NodeParameters)}
    return [
        Parameter(each.name, types[each.name], [])
        if types.get(each.name) is not None and isinstance(each.value, _ARRAYS) and len(each.value) == 0
        else each
        for each in parameters
    ]


def parameters_markdown() -> str:
    """Return docs/parameters.md: every parameter with its type, default, range and description."""
    rows = [
        "# Parameters of vla_node",
        "",
        "Made from the declarations in `mobile_vla_inference/ros/parameters.py` by",
        "`python -m mobile_vla_inference.ros.parameters > docs/parameters.md`. A change of a *live* parameter counts",
        "at once; the others are read-only. A bad value is refused by name, at the start and later. An array that is",
        "*not set* is an empty list, `[]`. In `checkpoint` and `processors`, `~` is the home folder.",
        "",
        "```bash",
        "ros2 param dump /vla_node > tuned.yaml       # start with it again: params_file:=tuned.yaml",
        "ros2 param set /vla_node action_axes '[]'    # not set again; Humble wants the type (9: strings, 8: doubles):",
        "ros2 service call /vla_node/set_parameters rcl_interfaces/srv/SetParameters \\",
        "    '{parameters: [{name: action_axes, value: {type: 9}}]}'",
        "```",
        "",
        "Of two parameter files with the same section, a `[]` in the later one leaves the list of the earlier one: so",
        "rcl merges them.",
        "",
        "| parameter | type | default | allowed | live | meaning |",
        "|---|---|---|---|---|---|",
    ]
    for declared in fields(NodeParameters):
        metadata = declared.metadata
        allowed = ", ".join(metadata["choices"] or ())
        if metadata["low"] is not None:
            allowed = f"{metadata['low']:g} to {metadata['high']:g}"
        default = "not set" if declared.default == () else f"`{declared.default!r}`".replace("'", '"')
        live = "" if metadata["read_only"] else "yes"
        cells = (f"`{declared.name}`", _type_name(declared), default, allowed, live, metadata["description"])
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _type_of(declared: Field) -> Any:
    return get_type_hints(NodeParameters)[declared.name]


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


def _type_name(declared: Field) -> str:
    return _TYPE_NAMES[_type_of(declared)]


def _expected(declared: Field) -> str:
    metadata = declared.metadata
    if metadata["choices"] is not None:
        return f"one of {', '.join(metadata['choices'])}"
    if _type_of(declared) is bool:
        return "true or false"
    name = f"{'an' if _type_of(declared) is int else 'a'} {_type_name(declared)}"
    return name if metadata["low"] is None else f"{name} from {metadata['low']:g} to {metadata['high']:g}"


def _descriptor(declared: Field) -> ParameterDescriptor:
    metadata = declared.metadata
    description = metadata["description"]
    if metadata["choices"] is not None:
        description += f" One of {', '.join(metadata['choices'])}."
    descriptor = ParameterDescriptor(description=description, read_only=metadata["read_only"])
    low, high = metadata["low"], metadata["high"]
    if low is not None and isinstance(declared.default, float):
        descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
    elif low is not None:
        descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
    return descriptor


if __name__ == "__main__":
    sys.stdout.write(parameters_markdown())
