"""Start vla_node, and with `sim:=true` a simulated robot beside it.

ros2 launch mobile_vla_inference mobile_vla.launch.py checkpoint:=/path/to/policy.pth image_topic:=/camera/image_raw
"""

from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PythonExpression
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription

PACKAGE = "mobile_vla_inference"


def generate_launch_description() -> LaunchDescription:
    """Describe the nodes and what can be set from outside."""
    share = Path(get_package_share_directory(PACKAGE))
    namespace = LaunchConfiguration("namespace")
    image_topic = LaunchConfiguration("image_topic")
    cmd_vel_topic = LaunchConfiguration("cmd_vel_topic")
    use_sim_time = ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool)
    is_compressed = PythonExpression(["'", LaunchConfiguration("image_transport"), "' == 'compressed'"])
    remappings = [
        ("image_raw", image_topic),
        ("image_raw/compressed", [image_topic, "/compressed"]),
        ("cmd_vel", cmd_vel_topic),
    ]
    log_arguments = ["--log-level", LaunchConfiguration("log_level")]
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "namespace",
                default_value="",
                description="Namespace of the nodes and of every topic whose name is relative.",
            ),
            DeclareLaunchArgument(
                "params_file",
                default_value=str(share / "config" / "mobile_vla.yaml"),
                description="Parameters of vla_node as a YAML file; the arguments below override it.",
            ),
            DeclareLaunchArgument(
                "checkpoint",
                description="The policy: a checkpoint file (.pth, .safetensors) or a converted folder.",
            ),
            DeclareLaunchArgument(
                "image_topic",
                default_value="image_raw",
                description="The camera's topic, without /compressed.",
            ),
            DeclareLaunchArgument(
                "image_transport",
                default_value="raw",
                choices=["raw", "compressed"],
                description="raw subscribes to the image topic itself, compressed to image_topic/compressed.",
            ),
            DeclareLaunchArgument(
                "cmd_vel_topic",
                default_value="cmd_vel",
                description="Where velocities are published.",
            ),
            DeclareLaunchArgument(
                "use_sim_time",
                default_value="false",
                choices=["true", "false"],
                description="Take the time from /clock (simulation, bags).",
            ),
            DeclareLaunchArgument(
                "autostart",
                default_value="true",
                choices=["true", "false"],
                description="Configure and activate at start; false leaves that to a lifecycle manager.",
            ),
            DeclareLaunchArgument(
                "log_level",
                default_value="info",
                choices=["debug", "info", "warn", "error", "fatal"],
                description="The least severe messages that are logged.",
            ),
            DeclareLaunchArgument(
                "sim",
                default_value="false",
                choices=["true", "false"],
                description="Also start sim_robot, a simulated camera and base on the same topics.",
            ),
            Node(
                package=PACKAGE,
                executable="vla_node",
                name="vla_node",
                namespace=namespace,
                output="screen",
                emulate_tty=True,
                parameters=[
                    LaunchConfiguration("params_file"),
                    {
                        "checkpoint": ParameterValue(LaunchConfiguration("checkpoint"), value_type=str),
                        "image_transport": LaunchConfiguration("image_transport"),
                        "autostart": ParameterValue(LaunchConfiguration("autostart"), value_type=bool),
                        "use_sim_time": use_sim_time,
                    },
                ],
                remappings=remappings,
                ros_arguments=log_arguments,
            ),
            Node(
                package=PACKAGE,
                executable="sim_robot",
                name="sim_robot",
                namespace=namespace,
                output="screen",
                emulate_tty=True,
                condition=IfCondition(LaunchConfiguration("sim")),
                parameters=[
                    {
                        "use_sim_time": use_sim_time,
                        "compressed": ParameterValue(is_compressed, value_type=bool),
                    }
                ],
                remappings=remappings,
                ros_arguments=log_arguments,
            ),
        ]
    )
