"""The executable `sim_robot`: a simulated robot that publishes camera images and follows `cmd_vel`.

It closes the loop round the policy where there is no robot: the world of `mobile_vla drive` (`scenario`), an endless
drawn one, or the images of a folder in turn. Stamps are on the ROS clock, or on the `/clock` that it publishes itself
(`publish_clock`); motion and timers are on the steady one, which nobody can pause.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import rclpy
from geometry_msgs.msg import TransformStamped, Twist, TwistStamped
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import String
from std_srvs.srv import Trigger

from mobile_vla_inference.action import VelocityCommand
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.frames import MAX_FRAME_SIDE_PX
from mobile_vla_inference.ros.conversions import rgb_to_compressed, rgb_to_image
from mobile_vla_inference.ros.overrides import given_parameters, refuse_unknown_parameters
from mobile_vla_inference.ros.sim_views import BASE_FRAME, ODOM_FRAME, layout_markers, robot_transforms
from mobile_vla_inference.ros.startup import start_ros
from mobile_vla_inference.sim.camera import FolderCamera, SimulatedCamera
from mobile_vla_inference.sim.live_world import LiveWorld
from mobile_vla_inference.sim.phrases import instruction
from mobile_vla_inference.sim.renderer import FIELD_OF_VIEW_DEG, FRAME_PX
from mobile_vla_inference.sim.robot import DifferentialDrive, Pose
from mobile_vla_inference.sim.scenarios import SCENARIOS
from mobile_vla_inference.sim.world import BASES, Motion

#: A camera drops frames rather than delay the next one (the field's sensor profile, with one frame kept).
IMAGE_QOS = QoSProfile(depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT)
COMMAND_QOS = QoSProfile(depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.RELIABLE)
LATCHED_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)

TRANSFORMS_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
CLOCK_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)

ENCODINGS = ("rgb8", "bgr8")

_CLOCK_PERIOD_S = 0.01
#: How often the loop looks for a stop request while no message and no timer wakes it.
_STOP_CHECK_S = 0.1


@dataclass(frozen=True)
class _Parameter:
    """One parameter of the node, read once, at the start; a live one again at each reset of a world."""

    name: str
    default: bool | int | float | str
    description: str
    least: float | None = None
    most: float | None = None
    live: bool = False

    @property
    def descriptor(self) -> ParameterDescriptor:
        """Its description and range for the parameter services."""
        descriptor = ParameterDescriptor(description=self.description, read_only=not self.live)
        if isinstance(self.default, float):
            descriptor.floating_point_range = [FloatingPointRange(from_value=self.least, to_value=self.most)]
        elif self.least is not None:
            descriptor.integer_range = [IntegerRange(from_value=self.least, to_value=self.most, step=1)]
        return descriptor


_PARAMETERS = (
    _Parameter("rate_hz", 20.0, "images per second", 0.1, 240.0),
    _Parameter("width", 320, "width of the simulated camera's images, pixels", 16, MAX_FRAME_SIDE_PX),
    _Parameter("height", 240, "height of the simulated camera's images, pixels", 16, MAX_FRAME_SIDE_PX),
    _Parameter("encoding", "rgb8", "encoding of image_raw: rgb8 or bgr8"),
    _Parameter("compressed", False, "publish JPEG images on image_raw/compressed too"),
    _Parameter("frames_dir", "", "folder of images to publish in name order, over and over; empty: simulate a camera"),
    _Parameter(
        "scenario",
        "",
        f"world with boxes and a cup, {FRAME_PX} pixels wide and high: {', '.join(SCENARIOS)}; empty: an endless world",
        live=True,
    ),
    _Parameter("seed", 0, "seed of the simulated world", 0, 2**31 - 1, live=True),
    _Parameter("base", "differential", f"base in the world of a scenario: {' or '.join(BASES)}"),
    _Parameter("cmd_vel_timeout_s", 0.5, "seconds without a command after which the robot stops", 0.05, 60.0),
    _Parameter("stamped", False, "cmd_vel is a TwistStamped instead of a Twist"),
    _Parameter("publish_clock", False, "publish the time since the start on /clock, for nodes with use_sim_time"),
    _Parameter("frame_id", "camera_optical_frame", "frame of the images: z ahead, x right, y down"),
)


class _FreeDrive:
    """A camera on a differential drive, in a world without end or task; used as a LiveWorld is."""

    def __init__(self, camera: FolderCamera | SimulatedCamera, command_timeout_s: float) -> None:
        self._drive = DifferentialDrive(command_timeout_s=command_timeout_s)
        self.frame = camera.frame
        self.step = self._drive.step

    @property
    def motion(self) -> Motion:
        """How the robot moves now."""
        return Motion(self._drive.linear_x_mps, 0.0, self._drive.angular_z_radps)

    def command(self, command: VelocityCommand, now_s: float) -> None:
        """Move so until the timeout or the next command."""
        self._drive.command(command.linear_x_mps, command.angular_z_radps, now_s)


class SimRobot(Node):
    """Publish `image_raw`, follow `cmd_vel`, and tell the pose on `odom` and `/tf`, where their messages are installed.

    In the world of a scenario also `camera_info`, `~/markers`, what becomes of the episode on `~/episode`, `~/reset`.
    """

    def __init__(self) -> None:
        """Declare the parameters and start; raise MobileVlaError where a parameter or an image can't be used."""
        super().__init__("sim_robot")
        settings = {parameter.name: _declare(self, parameter) for parameter in _PARAMETERS}
        refuse_unknown_parameters(self)
        self._encoding = _one_of(settings, "encoding", ENCODINGS)
        self._frame_id = settings["frame_id"]
        self._world = self._live_world(settings) if settings["scenario"] else None
        self._robot = self._world or _FreeDrive(_camera(settings), settings["cmd_vel_timeout_s"])
        self.add_on_set_parameters_callback(self._check_change)
        self._image_publisher = self.create_publisher(Image, "image_raw", IMAGE_QOS)
        self._compressed_publisher = (
            self.create_publisher(CompressedImage, "image_raw/compressed", IMAGE_QOS)
            if settings["compressed"]
            else None
        )
        self._odometry_type = _message_type("nav_msgs", "Odometry")
        if self._odometry_type is not None:
            self._odometry_publisher = self.create_publisher(self._odometry_type, "odom", COMMAND_QOS)
        self._transforms_type = _message_type("tf2_msgs", "TFMessage")
        if self._transforms_type is not None:
            self._transforms_publisher = self.create_publisher(self._transforms_type, "/tf", TRANSFORMS_QOS)
        command_type = TwistStamped if settings["stamped"] else Twist
        self.create_subscription(command_type, "cmd_vel", self._follow, COMMAND_QOS)
        steady_clock = Clock(clock_type=ClockType.STEADY_TIME)
        self._clock_publisher = None
        if settings["publish_clock"]:
            self._clock_from_s = time.monotonic()
            self._clock_publisher = self.create_publisher(ClockMessage, "/clock", CLOCK_QOS)
            self.create_timer(_CLOCK_PERIOD_S, self._publish_clock, clock=steady_clock)
        self.create_timer(1.0 / settings["rate_hz"], self._publish, clock=steady_clock)
        source = f"images of {frames_dir}" if (frames_dir := settings["frames_dir"]) else "a simulated world"
        self.get_logger().info(f"publishing {source} on {self._image_publisher.topic_name}")

    def _live_world(self, settings: dict[str, Any]) -> LiveWorld:
        """Build the world of a scenario, and offer what only it has."""
        if settings["frames_dir"]:
            raise MobileVlaError("parameters scenario and frames_dir are given, expected one of them; leave out one")
        scenario, base = _one_of(settings, "scenario", SCENARIOS), _one_of(settings, "base", BASES)
        world = LiveWorld(scenario, settings["seed"], base, settings["cmd_vel_timeout_s"])
        self._camera_info_publisher = self.create_publisher(CameraInfo, "camera_info", IMAGE_QOS)
        self._episode_publisher = self.create_publisher(String, "~/episode", LATCHED_QOS)
        self._published_episode = ""
        self._markers_type = _message_type("visualization_msgs", "MarkerArray")
        if self._markers_type is not None:
            self._marker_type = _message_type("visualization_msgs", "Marker")
            self._markers_publisher = self.create_publisher(self._markers_type, "~/markers", LATCHED_QOS)
            self._shown_layout = None
        self.create_service(Trigger, "~/reset", self._reset)
        return world

    def _check_change(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        """Take another scenario or seed for the next reset."""
        if self._world is None and any(each.name in ("scenario", "seed") for each in parameters):
            return SetParametersResult(successful=False, reason="sim_robot was started without a scenario")
        bad = next((each.value for each in parameters if each.name == "scenario" and each.value not in SCENARIOS), None)
        if bad is not None:
            return SetParametersResult(successful=False, reason=f"scenario is {bad!r}, not {', '.join(SCENARIOS)}")
        return SetParametersResult(successful=True)

    def _reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Put the robot at the start of the world that the parameters name."""
        self._world.reset(self.get_parameter("scenario").value, self.get_parameter("seed").value)
        response.success, response.message = True, self._tell_episode()
        return response

    def _tell_episode(self) -> str:
        """Publish what became of the episode, where that is new; return it as JSON."""
        episode = self._world.episode
        told = instruction(episode["scenario"], episode["seed"])
        text = json.dumps({**episode, "instruction": told}, ensure_ascii=False)
        if text != self._published_episode:
            self._published_episode = text
            self._episode_publisher.publish(String(data=text))
        return text

    def _follow(self, message: Twist | TwistStamped) -> None:
        twist = message.twist if isinstance(message, TwistStamped) else message
        try:
            self._robot.command(VelocityCommand(twist.linear.x, twist.linear.y, twist.angular.z), time.monotonic())
        except ValueError as error:
            self.get_logger().warning(str(error), throttle_duration_sec=1.0)

    def _now(self) -> Any:
        """Return the time for stamps: that of the /clock published here, or the ROS clock's."""
        if self._clock_publisher is None:
            return self.get_clock().now().to_msg()
        return Time(nanoseconds=round((time.monotonic() - self._clock_from_s) * 1e9)).to_msg()

    def _publish_clock(self) -> None:
        self._clock_publisher.publish(ClockMessage(clock=self._now()))

    def _show_layout(self, stamp: Any) -> None:
        """Publish the markers of a world that is new."""
        layout = self._world.world.layout
        if layout is not self._shown_layout:
            self._shown_layout = layout
            markers = layout_markers(self._marker_type, stamp, layout)
            self._markers_publisher.publish(self._markers_type(markers=markers))

    def _publish(self) -> None:
        pose = self._robot.step(time.monotonic())
        stamp = self._now()
        rgb = self._robot.frame(pose)
        self._image_publisher.publish(rgb_to_image(rgb, Image, stamp, self._frame_id, self._encoding))
        if self._compressed_publisher is not None:
            self._compressed_publisher.publish(rgb_to_compressed(rgb, CompressedImage, stamp, self._frame_id))
        if self._odometry_type is not None:
            odometry = self._odometry_type()
            odometry.header.stamp = stamp
            _fill_odometry(odometry, pose, self._robot.motion)
            self._odometry_publisher.publish(odometry)
        if self._transforms_type is not None:
            transforms = robot_transforms(TransformStamped, stamp, pose, self._frame_id)
            self._transforms_publisher.publish(self._transforms_type(transforms=transforms))
        if self._world is not None:
            if self._markers_type is not None:
                self._show_layout(stamp)
            self._camera_info_publisher.publish(_camera_info(stamp, self._frame_id))
            self._tell_episode()


def main(args: Sequence[str] | None = None) -> int:
    """Run until SIGINT or SIGTERM; `args` are like sys.argv, the default.

    Returns:
        0 after a stop request; 2, with a sentence on stderr, where an argument, a parameter or an image can't be used.
    """
    stop = threading.Event()
    # rclpy's own handlers would invalidate the context in the middle of a callback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        start_ros(
            "sim_robot",
            "A simulated robot: publishes camera images on image_raw and follows cmd_vel.\n\n"
            "Parameters (--ros-args -p NAME:=VALUE):\n"
            + "\n".join(f"  {p.name} ({p.default!r}): {p.description}" for p in _PARAMETERS),
            args,
        )
        _run(stop)
    except MobileVlaError as error:
        print(f"sim_robot: {error}", file=sys.stderr)
        return 2
    finally:
        if rclpy.ok():
            rclpy.shutdown()
    return 0


def _run(stop: threading.Event) -> None:
    cv2.setNumThreads(1)  # the pictures are small, and the cores are the policy's
    node = SimRobot()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stop.is_set():
            executor.spin_once(timeout_sec=_STOP_CHECK_S)
    finally:
        executor.shutdown()
        node.destroy_node()


def _declare(node: Node, parameter: _Parameter) -> Any:
    """Declare a parameter and return its value; raise MobileVlaError where a given one has the wrong type or range."""
    try:
        value = node.declare_parameter(parameter.name, parameter.default, parameter.descriptor).value
    except ParameterException:
        value = None
    if value is None:  # also what rclpy makes of an empty list
        found = given_parameters(node)[parameter.name].value
        raise MobileVlaError(f"parameter {parameter.name} is {found!r}, expected {_expectation(parameter)}; correct it")
    return value


def _expectation(parameter: _Parameter) -> str:
    kind = {bool: "true or false", int: "a whole number", float: "a number with a decimal point", str: "a text"}
    limits = "" if parameter.least is None else f" from {parameter.least} to {parameter.most}"
    return kind[type(parameter.default)] + limits


def _one_of(settings: dict[str, Any], name: str, choices: Sequence[str]) -> str:
    """Return a parameter that has to be one of some words."""
    if settings[name] not in choices:
        expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise MobileVlaError(f"parameter {name} is {settings[name]!r}, expected {expected}; correct it")
    return settings[name]


def _camera(settings: dict[str, Any]) -> FolderCamera | SimulatedCamera:
    if settings["frames_dir"]:
        return FolderCamera(Path(settings["frames_dir"]).expanduser())
    return SimulatedCamera(settings["width"], settings["height"], settings["seed"])


def _camera_info(stamp: Any, frame_id: str) -> CameraInfo:
    """Describe the camera of a scenario's world: a pinhole without distortion."""
    focal_px = FRAME_PX / 2.0 / math.tan(math.radians(FIELD_OF_VIEW_DEG / 2.0))
    middle_px = (FRAME_PX - 1) / 2.0
    info = CameraInfo(width=FRAME_PX, height=FRAME_PX, distortion_model="plumb_bob", d=[0.0] * 5)
    info.header.stamp, info.header.frame_id = stamp, frame_id
    info.k = [focal_px, 0.0, middle_px, 0.0, focal_px, middle_px, 0.0, 0.0, 1.0]
    info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    info.p = [focal_px, 0.0, middle_px, 0.0, 0.0, focal_px, middle_px, 0.0, 0.0, 0.0, 1.0, 0.0]
    return info


def _message_type(package: str, name: str) -> type | None:
    """Return a message's class where it is installed: a robot's ROS 2 has what the wheels of ROS 2 don't hold."""
    try:
        return getattr(import_module(f"{package}.msg"), name)
    except ImportError:
        return None


def _fill_odometry(odometry: Any, pose: Pose, motion: Motion) -> None:
    odometry.header.frame_id = ODOM_FRAME
    odometry.child_frame_id = BASE_FRAME
    odometry.pose.pose.position.x = pose.x_m
    odometry.pose.pose.position.y = pose.y_m
    odometry.pose.pose.orientation.z = math.sin(pose.yaw_rad / 2.0)
    odometry.pose.pose.orientation.w = math.cos(pose.yaw_rad / 2.0)
    odometry.twist.twist.linear.x = motion.linear_x_mps
    odometry.twist.twist.linear.y = motion.linear_y_mps
    odometry.twist.twist.angular.z = motion.angular_z_radps


if __name__ == "__main__":
    sys.exit(main())
