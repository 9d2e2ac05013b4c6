"""Start vla_node, and if asked a simulated robot (`sim:=true`) and RViz (`rviz:=true`) beside it.

ros2 launch mobile_vla_inference mobile_vla.launch.py checkpoint:=/path/to/policy.pth image_topic:=/camera/image_raw
"""

from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import Action, LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from mobile_vla_inference.ros import launching
from mobile_vla_inference.ros.parameter_files import expand_home

PACKAGE = "mobile_vla_inference"
SHARE = Path(get_package_share_directory(PACKAGE))


def generate_launch_description() -> LaunchDescription:
    """Describe the nodes and what can be set from outside."""
    arguments = [
        DeclareLaunchArgument(
            "namespace",
            default_value="",
            description="Namespace of the nodes and of every topic whose name is relative.",
        ),
        DeclareLaunchArgument(
            "params_file",
            default_value=str(SHARE / "config" / "mobile_vla.yaml"),
            description="Parameters of vla_node: YAML files, separated by commas; a later one overrides. Each has to "
            "name a parameter of it, under `/**/vla_node` or with its namespace.",
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
            description="Precision of the policy (float32, float16, bfloat16); empty: as params_file says, else auto.",
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
            description="true takes the time from /clock (simulation, bags); empty: as params_file says, else false.",
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
    ]
    check = OpaqueFunction(function=launching.refuse_unknown_arguments, args=[__file__, arguments])
    return LaunchDescription([*arguments, check, OpaqueFunction(function=describe_nodes)])


def describe_nodes(context: LaunchContext) -> list[Action]:
    """Return the nodes, now that the arguments are known: an empty one must not override the parameter file.

    Whatever can be wrong is found here, before anything has started.
    """

    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    namespace = launching.full_namespace(value("namespace"), context.launch_configurations.get("ros_namespace", ""))
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
        # Raw and compressed images both: what vla_node takes may be said in the parameter file. In simulated time, the
        # simulation is what the time comes from.
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
    """Return parameters as Node takes them: where there are none, no empty file is made.

    Texts are marked as such: `checkpoint:=5` is a path.
    """
    typed = {
        name: ParameterValue(setting, value_type=str) if isinstance(setting, str) else setting
        for name, setting in given.items()
    }
    return [typed] if typed else []
