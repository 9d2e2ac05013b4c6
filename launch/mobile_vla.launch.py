"""Start vla_node, and if asked a simulated robot (`sim:=true`) and RViz (`rviz:=true`) beside it.

ros2 launch mobile_vla_inference mobile_vla.launch.py checkpoint:=/path/to/policy.pth image_topic:=/camera/image_raw
"""

from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

PACKAGE = "mobile_vla_inference"
SHARE = Path(get_package_share_directory(PACKAGE))


def generate_launch_description() -> LaunchDescription:
    """Describe the nodes and what can be set from outside."""
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "namespace",
                default_value="",
                description="Namespace of the nodes and of every topic whose name is relative.",
            ),
            DeclareLaunchArgument(
                "params_file",
                default_value=str(SHARE / "config" / "mobile_vla.yaml"),
                description="Parameters of vla_node: YAML files, separated by commas; a later one overrides.",
            ),
            DeclareLaunchArgument(
                "checkpoint",
                default_value="",
                description="The policy: a checkpoint file (.pth, .safetensors) or a converted folder; "
                "empty: as params_file says.",
            ),
            DeclareLaunchArgument(
                "processors",
                default_value="",
                description="Folder with the Kosmos-2 and CLIP processors; empty: as params_file says, "
                "else the one beside the checkpoint.",
            ),
            DeclareLaunchArgument(
                "dtype",
                default_value="",
                description="Precision of the policy (float32, float16, bfloat16); empty: as params_file says, "
                "else auto.",
            ),
            DeclareLaunchArgument(
                "image_topic",
                default_value="image_raw",
                description="The camera's topic, without /compressed.",
            ),
            DeclareLaunchArgument(
                "image_transport",
                default_value="",
                description="raw subscribes to the image topic itself, compressed to image_topic/compressed; "
                "empty: as params_file says, else raw.",
            ),
            DeclareLaunchArgument(
                "cmd_vel_topic",
                default_value="cmd_vel",
                description="Where velocities are published.",
            ),
            DeclareLaunchArgument(
                "stamped",
                default_value="",
                description="true publishes TwistStamped, false Twist; empty: as params_file says, else Twist.",
            ),
            DeclareLaunchArgument(
                "use_sim_time",
                default_value="",
                description="true takes the time from /clock (simulation, bags); empty: as params_file says, "
                "else false.",
            ),
            DeclareLaunchArgument(
                "autostart",
                default_value="",
                description="true configures and activates at start, false leaves that to a lifecycle manager or "
                "`ros2 lifecycle set`; empty: as params_file says, else true.",
            ),
            DeclareLaunchArgument(
                "log_level",
                default_value="info",
                choices=["debug", "info", "warn", "error", "fatal"],
                description="The least severe messages that are logged.",
            ),
            DeclareLaunchArgument(
                "rviz",
                default_value="false",
                choices=["true", "false"],
                description="Also start RViz with the debug image, the camera and the odometry; needs rviz2.",
            ),
            DeclareLaunchArgument(
                "sim",
                default_value="false",
                choices=["true", "false"],
                description="Also start sim_robot, a simulated camera and base on the same topics.",
            ),
            OpaqueFunction(function=describe_nodes),
        ]
    )


def describe_nodes(context: LaunchContext) -> list[Node]:
    """Return the nodes, now that the arguments are known: an empty one must not override the parameter file."""
    namespace = LaunchConfiguration("namespace")
    image_topic = LaunchConfiguration("image_topic")
    remappings = [
        ("image_raw", image_topic),
        ("image_raw/compressed", [image_topic, "/compressed"]),
        ("cmd_vel", LaunchConfiguration("cmd_vel_topic")),
    ]
    log_arguments = ["--log-level", LaunchConfiguration("log_level")]
    files = [name.strip() for name in LaunchConfiguration("params_file").perform(context).split(",") if name.strip()]
    arguments = {
        "checkpoint": (LaunchConfiguration("checkpoint"), str),
        "processors": (LaunchConfiguration("processors"), str),
        "dtype": (LaunchConfiguration("dtype"), str),
        "image_transport": (LaunchConfiguration("image_transport"), str),
        "stamped": (LaunchConfiguration("stamped"), bool),
        "use_sim_time": (LaunchConfiguration("use_sim_time"), bool),
        "autostart": (LaunchConfiguration("autostart"), bool),
    }
    given = {
        name: ParameterValue(argument, value_type=kind)
        for name, (argument, kind) in arguments.items()
        if argument.perform(context)
    }

    def pick(*names: str) -> list[dict]:
        """Return those of some parameters that are given, as Node takes them; where none is, no empty file is made."""
        picked = {name: given[name] for name in names if name in given}
        return [picked] if picked else []

    return [
        Node(
            package=PACKAGE,
            executable="vla_node",
            name="vla_node",
            namespace=namespace,
            output="screen",
            emulate_tty=True,
            parameters=[*files, *pick(*given)],
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
            # Raw and compressed images both: what vla_node takes may be said in the parameter file.
            parameters=[{"compressed": True}, *pick("stamped", "use_sim_time")],
            remappings=remappings,
            ros_arguments=log_arguments,
        ),
        Node(
            package="rviz2",
            executable="rviz2",
            name="rviz2",
            namespace=namespace,
            output="screen",
            condition=IfCondition(LaunchConfiguration("rviz")),
            arguments=["-d", str(SHARE / "config" / "mobile_vla.rviz")],
            parameters=pick("use_sim_time"),
            remappings=remappings,
        ),
    ]
