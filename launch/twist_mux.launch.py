"""Start vla_node behind twist_mux, with a joystick above the policy; every argument of mobile_vla.launch.py counts too.

ros2 launch mobile_vla_inference twist_mux.launch.py checkpoint:=/path/to/policy.pth cmd_vel_topic:=/base/cmd_vel

vla_node publishes on cmd_vel_policy, the joystick's node has to publish on cmd_vel_joy, and twist_mux passes the one of
higher priority on to the base. This is no safety-rated stop.
"""

from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, GroupAction, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

SHARE = Path(get_package_share_directory("mobile_vla_inference"))


def generate_launch_description() -> LaunchDescription:
    """Describe twist_mux and, below it, what mobile_vla.launch.py starts."""
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(SHARE / "launch" / "mobile_vla.launch.py")),
        launch_arguments={"cmd_vel_topic": "cmd_vel_policy"}.items(),
    )
    return LaunchDescription(
        [
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
            Node(
                package="twist_mux",
                executable="twist_mux",
                name="twist_mux",
                namespace=LaunchConfiguration("namespace"),
                output="screen",
                parameters=[
                    LaunchConfiguration("mux_params_file"),
                    {
                        "use_stamped": ParameterValue(LaunchConfiguration("stamped"), value_type=bool),
                        "use_sim_time": ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool),
                    },
                ],
                remappings=[("cmd_vel_out", LaunchConfiguration("cmd_vel_topic"))],
            ),
            # A group, so that the policy's own cmd_vel_topic stays inside.
            GroupAction([policy]),
        ]
    )
