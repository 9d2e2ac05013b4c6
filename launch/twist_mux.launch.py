"""Start vla_node behind twist_mux, with a joystick above the policy; every argument of mobile_vla.launch.py counts too.

ros2 launch mobile_vla_inference twist_mux.launch.py checkpoint:=/path/to/policy.pth cmd_vel_topic:=/base/cmd_vel

vla_node publishes on cmd_vel_policy, the joystick's node has to publish on cmd_vel_joy, and twist_mux passes the one of
higher priority on to the base. This is no safety-rated stop.
"""

from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import Action, LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, GroupAction, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from mobile_vla_inference.ros import launching

SHARE = Path(get_package_share_directory("mobile_vla_inference"))


MOBILE_VLA = SHARE / "launch" / "mobile_vla.launch.py"


def generate_launch_description() -> LaunchDescription:
    """Describe twist_mux and, below it, what mobile_vla.launch.py starts."""
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
            description="The base's topic: what twist_mux lets through is published there.",
        ),
        DeclareLaunchArgument(
            "stamped",
            default_value="false",
            choices=["true", "false"],
            description="true: TwistStamped from policy and joystick, and to the base; needs twist_mux 4.4.",
        ),
        DeclareLaunchArgument(
            "use_sim_time",
            default_value="false",
            choices=["true", "false"],
            description="Take the time from /clock (simulation, bags).",
        ),
    ]
    of_policy = below.get_launch_description(LaunchContext()).get_launch_arguments()
    return LaunchDescription(
        [
            *arguments,
            OpaqueFunction(function=launching.refuse_unknown_arguments, args=[__file__, [*arguments, *of_policy]]),
            OpaqueFunction(function=check_mux),
            # A group, so that the policy's own cmd_vel_topic stays inside. It comes first: whatever is wrong with it is
            # found before anything has started.
            GroupAction([policy]),
            OpaqueFunction(function=describe_mux),
        ]
    )


def check_mux(context: LaunchContext) -> None:
    """Refuse what twist_mux can't be started with, before anything has started."""
    describe_mux(context)


def describe_mux(context: LaunchContext) -> list[Action]:
    """Return twist_mux, now that the arguments are known."""

    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    namespace = launching.full_namespace(value("namespace"), context.launch_configurations.get("ros_namespace", ""))
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
