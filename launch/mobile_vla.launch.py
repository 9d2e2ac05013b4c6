"""Start vla_node, and on request also a simulated robot (`sim:=true`) and RViz (`rviz:=true`).

ros2 launch mobile_vla_inference mobile_vla.launch.py checkpoint:=/path/to/policy.pth image_topic:=/camera/image_raw
"""

from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import Action, LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from mobile_vla_inference.ros import launching
from mobile_vla_inference.ros.parameter_files import expand_home

PACKAGE = "mobile_vla_inference"
SHARE = Path(get_package_share_directory(PACKAGE))


def generate_launch_description() -> LaunchDescription:
    """Describe the arguments and the nodes."""
    arguments = [
        DeclareLaunchArgument(
            "namespace",
            default_value="",
            description="Namespace of the nodes and of every topic whose name is relative.",
        ),
        DeclareLaunchArgument(
            "params_file",
            default_value=str(SHARE / "config" / "mobile_vla.yaml"),
            description="Parameters of vla_node: YAML files, separated by commas; a later one overrides "
            "an earlier one. Each must contain a parameter of vla_node, under `/**/vla_node` or with its namespace.",
        ),
        DeclareLaunchArgument(
            "checkpoint",
            default_value="",
            description="The policy: a checkpoint file (.pth, .safetensors) or a converted folder; "
            "empty: the one in params_file.",
        ),
        DeclareLaunchArgument(
            "processors",
            default_value="",
            description="Folder with the Kosmos-2 and CLIP processors; empty: the one in params_file, "
            "else the one next to the checkpoint.",
        ),
        DeclareLaunchArgument(
            "dtype",
            default_value="",
            description="Number type of the policy (float32, float16, bfloat16); "
            "empty: the one in params_file, else auto.",
        ),
        DeclareLaunchArgument(
            "image_topic",
            default_value="image_raw",
            description="Topic of the camera images, without /compressed.",
        ),
        DeclareLaunchArgument(
            "image_transport",
            default_value="",
            description="raw subscribes to the image topic itself, compressed to image_topic/compressed; "
            "empty: the one in params_file, else raw.",
        ),
        DeclareLaunchArgument(
            "cmd_vel_topic",
            default_value="cmd_vel",
            description="Topic on which the velocities are published.",
        ),
        DeclareLaunchArgument(
            "stamped",
            default_value="",
            description="true publishes TwistStamped, false Twist; empty: the value in params_file, else Twist.",
        ),
        DeclareLaunchArgument(
            "use_sim_time",
            default_value="",
            description="true uses the time of /clock (simulation, bags); empty: the value in params_file, else false.",
        ),
        DeclareLaunchArgument(
            "autostart",
            default_value="",
            description="true configures and activates at the start, false waits for a lifecycle manager or "
            "`ros2 lifecycle set`; empty: the value in params_file, else true.",
        ),
        DeclareLaunchArgument(
            "log_level",
            default_value="info",
            choices=["debug", "info", "warn", "error", "fatal"],
            description="Lowest severity of the messages that are logged.",
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
    ]
    return launching.description(__file__, arguments, OpaqueFunction(function=describe_nodes))


def describe_nodes(context: LaunchContext) -> list[Action]:
    """Return the nodes; an empty argument does not override the parameter file.

    All errors are found here, before anything has started.
    """
    value = launching.argument_values(context)
    namespace = launching.full_namespace(context)
    for name in ("image_topic", "cmd_vel_topic"):
        launching.check_topic(name, value(name), namespace)
    given = {name: value(name) for name in ("dtype", "image_transport") if value(name)}
    given |= {name: expand_home(value(name)) for name in ("checkpoint", "processors") if value(name)}
    flags = {name: launching.flag(name, value(name)) for name in ("stamped", "use_sim_time", "autostart")}
    given |= {name: setting for name, setting in flags.items() if setting is not None}
    files, in_files = launching.parameter_files(
        "params_file", value("params_file"), f"{namespace.rstrip('/')}/vla_node"
    )
    in_force = in_files | given
    shared = {name: in_force[name] for name in ("stamped", "use_sim_time") if name in in_force}
    if value("rviz") == "true":
        launching.required_program("rviz2", "rviz2", "rviz:=true")

    remappings = [
        ("image_raw", value("image_topic")),
        ("image_raw/compressed", f"{value('image_topic')}/compressed"),
        ("cmd_vel", value("cmd_vel_topic")),
    ]
    own = {
        "package": PACKAGE,
        "namespace": value("namespace"),
        "output": "screen",
        "emulate_tty": True,
        "arguments": launching.end_with_launch(),
        "remappings": remappings,
        "ros_arguments": ["--log-level", value("log_level")],
    }
    nodes = [
        Node(
            **own,
            executable="vla_node",
            name="vla_node",
            parameters=[*files, *_parameters(given)],
            on_exit=launching.required("vla_node"),
        )
    ]
    if value("sim") == "true":
        # Raw and compressed images: the parameter file can choose either one for vla_node. In simulated time, the
        # simulated robot publishes the clock.
        clock = {"publish_clock": True} if shared.get("use_sim_time") else {}
        nodes.append(
            Node(
                **own,
                executable="sim_robot",
                name="sim_robot",
                parameters=[{"compressed": True, **shared, **clock}],
                on_exit=launching.required("sim_robot"),
            )
        )
    at_shutdown = [launching.interrupt_at_shutdown(node) for node in nodes]
    if value("rviz") == "true":
        nodes.append(
            Node(
                package="rviz2",
                executable="rviz2",
                name="rviz2",
                namespace=value("namespace"),
                output="screen",
                arguments=["-d", str(SHARE / "config" / "mobile_vla.rviz")],
                parameters=_parameters({name: shared[name] for name in ("use_sim_time",) if name in shared}),
                remappings=remappings,
            )
        )
    return [*at_shutdown, *nodes]


def _parameters(given: dict) -> list[dict]:
    """Return parameters as Node expects them; without any, no empty file is written.

    Strings are marked as strings: `checkpoint:=5` is a path.
    """
    typed = {
        name: ParameterValue(setting, value_type=str) if isinstance(setting, str) else setting
        for name, setting in given.items()
    }
    return [typed] if typed else []
