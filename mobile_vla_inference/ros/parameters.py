"""The parameters of vla_node; docs/parameters.md is generated from their declarations."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields

from mobile_vla_inference.action import AXES, ActionMapping
from mobile_vla_inference.control.gate import PUBLISH_RATE_HZ, GateLimits
from mobile_vla_inference.control.worker_options import WorkerOptions
from mobile_vla_inference.policy_facts import DEVICES, DTYPES, ENGINES, PolicyFacts
from mobile_vla_inference.ros.parameter_declarations import (
    DeclaredParameters,
    ParameterError,
    declarations,
    parameter,
)


@dataclass(frozen=True)
class NodeParameters(DeclaredParameters):
    """Every parameter of vla_node; read-only ones need a restart to change.

    The defaults of the gate and of the worker are those of GateLimits and WorkerOptions.
    """

    checkpoint: str = parameter(
        "", "Checkpoint file (.pth, .safetensors) or converted folder.", read_only=True, path=True
    )
    processors: str = parameter(
        "",
        "Folder with the Kosmos-2 and CLIP processors; empty: the one next to the checkpoint.",
        read_only=True,
        path=True,
    )
    device: str = parameter(
        "auto",
        "Device of the policy; auto uses the GPU if there is one.",
        choices=DEVICES,
        read_only=True,
    )
    dtype: str = parameter(
        "auto",
        "Number type of the policy; auto is float16 on a GPU and float32 on a CPU.",
        choices=DTYPES,
        read_only=True,
    )
    engine: str = parameter(
        "auto",
        "How a step is computed; auto uses the fastest engine that the device supports.",
        choices=ENGINES,
        read_only=True,
    )
    force_load: bool = parameter(
        False, "Load the policy even if the available memory seems too small for it.", read_only=True
    )
    autostart: bool = parameter(
        True, "Configure and activate at the start, without a lifecycle manager.", read_only=True
    )
    image_transport: str = parameter(
        "raw",
        "raw subscribes to image_raw, compressed to image_raw/compressed.",
        choices=("raw", "compressed"),
        read_only=True,
    )
    image_reliability: str = parameter(
        "best_effort",
        "Reliability of the image subscription; best_effort matches every publisher.",
        choices=("best_effort", "reliable"),
        read_only=True,
    )
    stamped: bool = parameter(False, "Publish TwistStamped instead of Twist on cmd_vel.", read_only=True)
    base_frame_id: str = parameter("base_link", "frame_id of the TwistStamped commands.", read_only=True)
    publish_rate_hz: float = parameter(
        PUBLISH_RATE_HZ,
        "Rate at which cmd_vel is repeated between steps; zero is repeated at 10 Hz or more.",
        low=1.0,
        high=200.0,
    )
    action_axes: tuple[str, ...] = parameter(
        (), f"Twist axis that each action drives, of {', '.join(AXES)}; not set ([]): those of policy.json."
    )
    action_scale: tuple[float, ...] = parameter(
        (), "Command units (m/s, rad/s) per normalised unit, one per axis; not set ([]): those of policy.json."
    )
    max_linear_x_mps: float = parameter(
        GateLimits.max_linear_x_mps, "Largest forward or backward speed.", low=0.0, high=5.0
    )
    max_linear_y_mps: float = parameter(
        GateLimits.max_linear_y_mps, "Largest sideways speed (omnidirectional bases).", low=0.0, high=5.0
    )
    max_angular_z_radps: float = parameter(GateLimits.max_angular_z_radps, "Largest turn rate.", low=0.0, high=10.0)
    max_linear_acceleration_mps2: float = parameter(
        GateLimits.max_linear_acceleration_mps2,
        "Largest change of a linear speed per second; a stop is immediate.",
        low=0.01,
        high=50.0,
    )
    max_angular_acceleration_radps2: float = parameter(
        GateLimits.max_angular_acceleration_radps2,
        "Largest change of the turn rate per second; a stop is immediate.",
        low=0.01,
        high=100.0,
    )
    image_timeout_s: float = parameter(
        GateLimits.image_timeout_s, "An image older than this stops the robot.", low=0.05, high=10.0
    )
    future_stamp_tolerance_s: float = parameter(
        0.1, "Images stamped further in the future than this are refused.", low=0.0, high=10.0
    )
    step_timeout_s: float = parameter(
        GateLimits.step_timeout_s,
        "A policy step that takes longer counts as a hang: the robot stops and the worker is restarted. The robot also "
        "stops if the image of the newest action is older.",
        low=0.1,
        high=120.0,
    )
    resume_within_s: float = parameter(
        GateLimits.resume_within_s,
        "If no image arrives for longer than this, the robot stays stopped until ~/enable.",
        low=0.05,
        high=60.0,
    )
    state_gap_s: float = parameter(
        WorkerOptions.state_gap_s,
        "A longer gap between two stepped images clears the LSTM state.",
        low=0.1,
        high=600.0,
        read_only=True,
    )
    stop_hold_s: float = parameter(
        GateLimits.stop_hold_s, "How long zero is published before the node publishes nothing.", low=1.0, high=60.0
    )
    exclusive_cmd_vel: bool = parameter(
        False, "Stand still while another node publishes on cmd_vel; if false, the diagnostics only warn."
    )
    soft_stop: bool = parameter(
        GateLimits.soft_stop,
        "Slow down within the acceleration limits on an empty instruction or ~/enable false; a fault always stops the "
        "robot at once.",
    )
    memory_warn_mib: float = parameter(
        1024.0, "Less available memory than this is a warning in the diagnostics.", low=0.0, high=1e6
    )
    memory_error_mib: float = parameter(
        256.0, "Less available memory than this is an error in the diagnostics.", low=0.0, high=1e6
    )
    load_timeout_s: float = parameter(
        WorkerOptions.load_timeout_s, "A load that takes longer counts as a hang.", low=1.0, high=7200.0, read_only=True
    )
    max_restarts: int = parameter(
        WorkerOptions.max_restarts,
        "Worker restarts in a row before the node gives up; a minute without a fault resets the count.",
        low=0,
        high=1000,
        read_only=True,
    )

    def gate_limits(self) -> GateLimits:
        """Return the part that the gate enforces."""
        return GateLimits(**{limit.name: getattr(self, limit.name) for limit in fields(GateLimits)})

    def action_mapping(self, facts: PolicyFacts) -> ActionMapping:
        """Return how actions become velocities: by these parameters if they are set, else by the policy's `facts`.

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


def parameters_markdown() -> str:
    """Return docs/parameters.md: every parameter with its type, default, range and description."""
    rows = [
        "# Parameters of vla_node",
        "",
        "Generated from the declarations in `mobile_vla_inference/ros/parameters.py` by",
        "`python -m mobile_vla_inference.ros.parameters > docs/parameters.md`. A change of a *live* parameter takes",
        "effect at once; the others are read-only. An invalid value is refused, with the parameter's name, at the",
        "start and later. An array that is *not set* is an empty list, `[]`. In `checkpoint` and `processors`, `~` is",
        "the home folder.",
        "",
        "```bash",
        "ros2 param dump /vla_node > tuned.yaml       # use them at the next start: params_file:=tuned.yaml",
        "ros2 param set /vla_node action_axes '[]'    # not set; Humble needs the type (9: strings, 8: doubles):",
        "ros2 service call /vla_node/set_parameters rcl_interfaces/srv/SetParameters \\",
        "    '{parameters: [{name: action_axes, value: {type: 9}}]}'",
        "```",
        "",
        "If two parameter files have the same section, a `[]` in the later one does not replace the list of the",
        "earlier one: this is how rcl merges them.",
        "",
        "| parameter | type | default | allowed | live | meaning |",
        "|---|---|---|---|---|---|",
    ]
    for declared in declarations(NodeParameters):
        allowed = declared.range_text.removeprefix("from ") or ", ".join(declared.choices or ())
        default = "not set" if declared.default == () else f"`{declared.default!r}`".replace("'", '"')
        live = "" if declared.read_only else "yes"
        cells = (f"`{declared.name}`", declared.type_name, default, allowed, live, declared.description)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(parameters_markdown())
