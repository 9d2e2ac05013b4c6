"""Start a camera driver for the policy: `source:=usb_cam`, `v4l2_camera` or `gscam` (a Jetson's CSI camera).

ros2 launch mobile_vla_inference camera.launch.py source:=gscam width:=640 height:=480
The images are published on image_topic. Each driver is a separate package (ros-DISTRO-usb-cam, -v4l2-camera, -gscam).
"""

from __future__ import annotations

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch_ros.actions import Node

from mobile_vla_inference.ros import launching


def generate_launch_description() -> LaunchDescription:
    """Describe the arguments and the driver."""
    arguments = [
        DeclareLaunchArgument(
            "source",
            default_value="usb_cam",
            choices=["usb_cam", "v4l2_camera", "gscam"],
            description="Camera driver; gscam is for a CSI camera, through nvarguscamerasrc.",
        ),
        DeclareLaunchArgument("device", default_value="/dev/video0", description="Video device of a USB camera."),
        DeclareLaunchArgument("sensor_id", default_value="0", description="Number of a CSI camera, from 0."),
        DeclareLaunchArgument("width", default_value="640", description="Width of the published images, pixels."),
        DeclareLaunchArgument("height", default_value="480", description="Height of the published images, pixels."),
        DeclareLaunchArgument(
            "frame_rate_hz", default_value="30", description="Frame rate of the camera, frames per second."
        ),
        DeclareLaunchArgument(
            "image_topic", default_value="image_raw", description="Topic on which the images are published."
        ),
    ]
    return launching.description(__file__, arguments, OpaqueFunction(function=describe_driver))


def describe_driver(context: LaunchContext) -> list[Node]:
    """Return the chosen driver, with its own parameter names."""
    value = launching.argument_values(context)
    source, device, sensor_id = value("source"), value("device"), value("sensor_id")
    width, height = (launching.number(name, value(name), int) for name in ("width", "height"))
    frame_rate_hz = launching.number("frame_rate_hz", value("frame_rate_hz"), float)
    launching.check_topic("image_topic", value("image_topic"), "/")
    frame = "camera_optical_frame"  # REP-103: z forward, x right, y down
    if source == "usb_cam":
        executable, topic = "usb_cam_node_exe", "image_raw"
        parameters = {
            "video_device": device,
            "image_width": width,
            "image_height": height,
            "framerate": frame_rate_hz,
            "frame_id": frame,
        }
    elif source == "v4l2_camera":
        executable, topic = "v4l2_camera_node", "image_raw"
        parameters = {"video_device": device, "image_size": [width, height], "camera_frame_id": frame}
    else:
        executable, topic = "gscam_node", "camera/image_raw"
        # The Jetson's hardware (nvvidconv) scales the images, so that the CPU never handles the full resolution.
        camera = f"nvarguscamerasrc sensor-id={sensor_id}"
        sensor = f"video/x-raw(memory:NVMM), framerate={round(frame_rate_hz)}/1"
        scaled = f"nvvidconv ! video/x-raw, width={width}, height={height}, format=BGRx"
        parameters = {
            "gscam_config": f"{camera} ! {sensor} ! {scaled} ! videoconvert ! video/x-raw, format=RGB",
            "image_encoding": "rgb8",
            "frame_id": frame,
        }
    launching.required_program(source, executable, f"source:={source}")
    return [
        Node(
            package=source,
            executable=executable,
            name="camera",
            output="screen",
            parameters=[parameters],
            remappings=[(topic, value("image_topic"))],
            on_exit=launching.required(f"the camera driver {source}"),
        )
    ]
