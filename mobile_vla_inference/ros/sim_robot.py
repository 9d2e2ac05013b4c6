"""The executable `sim_robot`: a simulated robot that publishes camera images and follows `cmd_vel`.

It closes the loop around the policy without a robot. It shows the world of `mobile_vla drive` (`scenario`), an endless
drawn world, or the images of a folder one after the other. Stamps are on the ROS clock, or on the `/clock` that it
publishes itself (`publish_clock`); motion and timers are on the steady clock, which can't be paused.
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
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
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
from mobile_vla_inference.ros.live_parameters import LiveParameters
from mobile_vla_inference.ros.overrides import refuse_unknown_parameters
from mobile_vla_inference.ros.parameter_declarations import (
    DeclaredParameters,
    ParameterError,
    declarations,
    declare_parameters,
    parameter,
)
from mobile_vla_inference.ros.sim_views import fill_odometry, layout_markers, robot_transforms
from mobile_vla_inference.ros.startup import start_ros
from mobile_vla_inference.sim.camera import FolderCamera, SimulatedCamera
from mobile_vla_inference.sim.live_world import LiveWorld
from mobile_vla_inference.sim.phrases import instruction
from mobile_vla_inference.sim.renderer import FIELD_OF_VIEW_DEG, FRAME_PX
from mobile_vla_inference.sim.robot import DifferentialDrive
from mobile_vla_inference.sim.scenarios import SCENARIOS
from mobile_vla_inference.sim.world import BASES, Motion

#: A camera drops frames rather than delay the next one: the sensor data profile of ROS 2, with one frame kept.
IMAGE_QOS = QoSProfile(depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT)
COMMAND_QOS = QoSProfile(depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.RELIABLE)
LATCHED_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)

TRANSFORMS_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
CLOCK_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)

_CLOCK_PERIOD_S = 0.01
#: How often the loop checks for a stop request while no message and no timer wakes it.
_STOP_CHECK_S = 0.1


@dataclass(frozen=True)
class SimParameters(DeclaredParameters):
    """Every parameter of sim_robot; `scenario` and `seed` take effect at the next reset, the others need a restart."""

    rate_hz: float = parameter(20.0, "images per second", low=0.1, high=240.0, read_only=True)
    width: int = parameter(
        320, "width of the simulated camera's images, pixels", low=16, high=MAX_FRAME_SIDE_PX, read_only=True
    )
    height: int = parameter(
        240, "height of the simulated camera's images, pixels", low=16, high=MAX_FRAME_SIDE_PX, read_only=True
    )
    encoding: str = parameter("rgb8", "encoding of image_raw", choices=("rgb8", "bgr8"), read_only=True)
    compressed: bool = parameter(False, "also publish JPEG images on image_raw/compressed", read_only=True)
    frames_dir: str = parameter(
        "",
        "folder of images to publish in the order of their names, in a loop; empty: simulate a camera",
        read_only=True,
        path=True,
    )
    scenario: str = parameter(
        "",
        f"world with boxes and a cup, seen by a camera of {FRAME_PX} x {FRAME_PX} pixels; empty: an endless world",
        choices=("", *SCENARIOS),
    )
    seed: int = parameter(0, "seed of the simulated world", low=0, high=2**31 - 1)
    base: str = parameter("differential", "base in the world of a scenario", choices=BASES, read_only=True)
    cmd_vel_timeout_s: float = parameter(
        0.5, "seconds without a command after which the robot stops", low=0.05, high=60.0, read_only=True
    )
    stamped: bool = parameter(False, "cmd_vel is a TwistStamped instead of a Twist", read_only=True)
    publish_clock: bool = parameter(
        False, "publish the time since the start on /clock, for nodes with use_sim_time", read_only=True
    )
    frame_id: str = parameter("camera_optical_frame", "frame of the images: z forward, x right, y down", read_only=True)


class _FreeDrive:
    """A camera on a differential drive, in an endless world without a task; it has the interface of a LiveWorld."""

    def __init__(self, camera: FolderCamera | SimulatedCamera, command_timeout_s: float) -> None:
        self._drive = DifferentialDrive(command_timeout_s=command_timeout_s)
        self.frame = camera.frame
        self.step = self._drive.step

    @property
    def motion(self) -> Motion:
        """How the robot moves now."""
        return Motion(self._drive.linear_x_mps, 0.0, self._drive.angular_z_radps)

    def command(self, command: VelocityCommand, now_s: float) -> None:
        """Move with this velocity until the timeout or the next command."""
        self._drive.command(command.linear_x_mps, command.angular_z_radps, now_s)


class SimRobot(Node):
    """Publish `image_raw`, follow `cmd_vel`, and publish the pose on `odom` and `/tf` if their messages are installed.

    In the world of a scenario it also offers `camera_info`, `~/markers`, the state of the episode on `~/episode`, and
    the service `~/reset`.
    """

    def __init__(self) -> None:
        """Declare the parameters and start; raise MobileVlaError if a parameter or an image can't be used."""
        super().__init__("sim_robot")
        self._live = LiveParameters(declare_parameters(self, SimParameters))
        refuse_unknown_parameters(self)
        settings = self._live.values
        self._encoding = settings.encoding
        self._frame_id = settings.frame_id
        self._world = self._live_world(settings) if settings.scenario else None
        self._robot = self._world or _FreeDrive(_camera(settings), settings.cmd_vel_timeout_s)
        self.add_on_set_parameters_callback(lambda changes: self._live.change(changes, self._check_change))
        self._image_publisher = self.create_publisher(Image, "image_raw", IMAGE_QOS)
        self._compressed_publisher = (
            self.create_publisher(CompressedImage, "image_raw/compressed", IMAGE_QOS) if settings.compressed else None
        )
        self._odometry_type = _message_type("nav_msgs", "Odometry")
        if self._odometry_type is not None:
            self._odometry_publisher = self.create_publisher(self._odometry_type, "odom", COMMAND_QOS)
        self._transforms_type = _message_type("tf2_msgs", "TFMessage")
        if self._transforms_type is not None:
            self._transforms_publisher = self.create_publisher(self._transforms_type, "/tf", TRANSFORMS_QOS)
        command_type = TwistStamped if settings.stamped else Twist
        self.create_subscription(command_type, "cmd_vel", self._follow, COMMAND_QOS)
        steady_clock = Clock(clock_type=ClockType.STEADY_TIME)
        self._clock_publisher = None
        if settings.publish_clock:
            self._clock_from_s = time.monotonic()
            self._clock_publisher = self.create_publisher(ClockMessage, "/clock", CLOCK_QOS)
            self.create_timer(_CLOCK_PERIOD_S, self._publish_clock, clock=steady_clock)
        self.create_timer(1.0 / settings.rate_hz, self._publish, clock=steady_clock)
        source = f"images of {settings.frames_dir}" if settings.frames_dir else "a simulated world"
        self.get_logger().info(f"publishing {source} on {self._image_publisher.topic_name}")

    def _live_world(self, settings: SimParameters) -> LiveWorld:
        """Create the world of a scenario, and the topics and the service that only it has."""
        if settings.frames_dir:
            raise MobileVlaError("parameters scenario and frames_dir are given, expected one of them; leave out one")
        world = LiveWorld(settings.scenario, settings.seed, settings.base, settings.cmd_vel_timeout_s)
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

    def _check_change(self, settings: SimParameters) -> None:
        """Raise ParameterError if the next reset could not use another scenario or seed."""
        before = self._live.values
        if self._world is None and (settings.scenario, settings.seed) != (before.scenario, before.seed):
            raise ParameterError("parameters scenario and seed can't be set: sim_robot was started without a scenario")
        if self._world is not None and not settings.scenario:
            raise ParameterError(f"parameter scenario is empty, expected one of {', '.join(SCENARIOS)}; correct it")

    def _reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Put the robot at the start of the world that the parameters name."""
        self._world.reset(self._live.values.scenario, self._live.values.seed)
        response.success, response.message = True, self._publish_episode()
        return response

    def _publish_episode(self) -> str:
        """Publish the state of the episode if it has changed; return it as JSON."""
        episode = self._world.episode
        text = json.dumps(
            {**episode, "instruction": instruction(episode["scenario"], episode["seed"])}, ensure_ascii=False
        )
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
        """Return the time for stamps: the published /clock, or the ROS clock."""
        if self._clock_publisher is None:
            return self.get_clock().now().to_msg()
        return Time(nanoseconds=round((time.monotonic() - self._clock_from_s) * 1e9)).to_msg()

    def _publish_clock(self) -> None:
        self._clock_publisher.publish(ClockMessage(clock=self._now()))

    def _show_layout(self, stamp: Any) -> None:
        """Publish the markers of a new world."""
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
            fill_odometry(odometry, pose, self._robot.motion)
            self._odometry_publisher.publish(odometry)
        if self._transforms_type is not None:
            transforms = robot_transforms(TransformStamped, stamp, pose, self._frame_id)
            self._transforms_publisher.publish(self._transforms_type(transforms=transforms))
        if self._world is not None:
            if self._markers_type is not None:
                self._show_layout(stamp)
            self._camera_info_publisher.publish(_camera_info(stamp, self._frame_id))
            self._publish_episode()


def main(args: Sequence[str] | None = None) -> int:
    """Run until SIGINT or SIGTERM; `args` are like sys.argv, the default.

    Returns:
        0 after a stop request; 2, with a sentence on stderr, if an argument, a parameter or an image can't be used.
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
            + "\n".join(f"  {p.name} ({p.default!r}): {p.descriptor.description}" for p in declarations(SimParameters)),
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
    cv2.setNumThreads(1)  # the images are small, and the policy needs the cores
    node = SimRobot()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stop.is_set():
            executor.spin_once(timeout_sec=_STOP_CHECK_S)
    finally:
        executor.shutdown()
        node.destroy_node()


def _camera(settings: SimParameters) -> FolderCamera | SimulatedCamera:
    if settings.frames_dir:
        return FolderCamera(Path(settings.frames_dir))
    return SimulatedCamera(settings.width, settings.height, settings.seed)


def _camera_info(stamp: Any, frame_id: str) -> CameraInfo:
    """Describe the camera of a scenario's world: a pinhole camera without distortion."""
    focal_px = FRAME_PX / 2.0 / math.tan(math.radians(FIELD_OF_VIEW_DEG / 2.0))
    middle_px = (FRAME_PX - 1) / 2.0
    info = CameraInfo(width=FRAME_PX, height=FRAME_PX, distortion_model="plumb_bob", d=[0.0] * 5)
    info.header.stamp, info.header.frame_id = stamp, frame_id
    info.k = [focal_px, 0.0, middle_px, 0.0, focal_px, middle_px, 0.0, 0.0, 1.0]
    info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    info.p = [focal_px, 0.0, middle_px, 0.0, 0.0, focal_px, middle_px, 0.0, 0.0, 0.0, 1.0, 0.0]
    return info


def _message_type(package: str, name: str) -> type | None:
    """Return a message's class; None if it is not installed: the PyPI wheels of ROS 2 lack some message packages."""
    try:
        return getattr(import_module(f"{package}.msg"), name)
    except ImportError:
        return None


if __name__ == "__main__":
    sys.exit(main())
