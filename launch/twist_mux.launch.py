"""Start vla_node behind twist_mux, where a joystick has priority over the policy.

It also takes every argument of mobile_vla.launch.py.

ros2 launch mobile_vla_inference twist_mux.launch.py checkpoint:=/path/to/policy.pth cmd_vel_topic:=/base/cmd_vel

vla_node publishes on cmd_vel_policy, the joystick's node must publish on cmd_vel_joy, and twist_mux forwards the one
with the higher priority to the base. This is not a safety-rated stop.
"""

from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import Action, LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, GroupAction, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_ros.actions import Node

from mobile_vla_inference.ros import launching

SHARE = Path(get_package_share_directory("mobile_vla_inference"))
MOBILE_VLA = SHARE / "launch" / "mobile_vla.launch.py"


def generate_launch_description() -> LaunchDescription:
    """Describe the arguments, twist_mux, and the nodes of mobile_vla.launch.py."""
    below = PythonLaunchDescriptionSource(str(MOBILE_VLA))
    policy = IncludeLaunchDescription(below, launch_arguments={"cmd_vel_topic": "cmd_vel_policy"}.items())
    arguments = [
        DeclareLaunchArgument(
            "namespace",
            default_value="",
            description="Namespace of the nodes and of every topic whose name is relative.",
        ),
        DeclareLaunchArgument(
            "mux_params_file",
            default_value=str(SHARE / "config" / "twist_mux.yaml"),
            description="Inputs, priorities and locks of twist_mux as a YAML file.",
        ),
        DeclareLaunchArgument(
            "cmd_vel_topic",
            default_value="cmd_vel",
            description="Topic of the base, on which twist_mux publishes.",
        ),
        DeclareLaunchArgument(
            "stamped",
            default_value="false",
            choices=["true", "false"],
            description="true: TwistStamped on all inputs and the output; needs twist_mux 4.4.",
        ),
        DeclareLaunchArgument(
            "use_sim_time",
            default_value="false",
            choices=["true", "false"],
            description="true: use the time of /clock (simulation, bags).",
        ),
    ]
    of_policy = below.get_launch_description(LaunchContext()).get_launch_arguments()
    return launching.description(
        __file__,
        arguments,
        OpaqueFunction(function=check_mux),
        # A group, so that the policy's cmd_vel_topic does not change that of twist_mux. It comes first, so that its
        # errors are found before anything has started.
        GroupAction([policy]),
        OpaqueFunction(function=describe_mux),
        included=of_policy,
    )


def check_mux(context: LaunchContext) -> None:
    """Find the errors in the arguments of twist_mux before anything has started."""
    describe_mux(context)


def describe_mux(context: LaunchContext) -> list[Action]:
    """Return twist_mux."""
    value = launching.argument_values(context)
    namespace = launching.full_namespace(context)
    launching.check_topic("cmd_vel_topic", value("cmd_vel_topic"), namespace)
    node = f"{namespace.rstrip('/')}/twist_mux"
    files, _ = launching.parameter_files("mux_params_file", value("mux_params_file"), node)
    launching.required_program("twist_mux", "twist_mux", "twist_mux.launch.py")
    return [
        Node(
            package="twist_mux",
            executable="twist_mux",
            name="twist_mux",
            namespace=value("namespace"),
            output="screen",
            parameters=[
                *files,
                {"use_stamped": value("stamped") == "true", "use_sim_time": value("use_sim_time") == "true"},
            ],
            remappings=[("cmd_vel_out", value("cmd_vel_topic"))],
            on_exit=launching.required("twist_mux"),
        )
    ]
