"""The messages of a recorded drive, as objects of rosbags' types, and the topics that this package writes them to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mobile_vla_inference.bags.reader import COMPRESSED_IMAGE, IMAGE, TWIST, typestore
from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.frames import read_image

IMAGE_TOPIC = "/image_raw"
INSTRUCTION_TOPIC = "/instruction"
COMMAND_TOPIC = "/cmd_vel"
FRAME_ID = "camera_optical_frame"

#: Where the time of a written bag begins, seconds: a stamp of 0 means that there is no stamp.
START_S = 1_700_000_000

_NS = 1_000_000_000
#: Suffix of an image file -> its name in the format of a CompressedImage.
_FORMATS = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png"}


def twist_message(linear_x_mps: float, angular_z_radps: float, linear_y_mps: float = 0.0) -> Any:
    """Return a geometry_msgs/Twist."""
    types = typestore().types
    vector = types["geometry_msgs/msg/Vector3"]
    return types[TWIST](
        linear=vector(x=linear_x_mps, y=linear_y_mps, z=0.0), angular=vector(x=0.0, y=0.0, z=angular_z_radps)
    )


def header_message(time_ns: int, frame_id: str) -> Any:
    """Return a std_msgs/Header with a stamp in nanoseconds."""
    types = typestore().types
    stamp = types["builtin_interfaces/msg/Time"](sec=time_ns // _NS, nanosec=time_ns % _NS)
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def image_message(rgb: np.ndarray, time_ns: int) -> Any:
    """Return uint8 RGB [height, width, 3] as sensor_msgs/Image, rgb8."""
    height, width = rgb.shape[:2]
    return typestore().types[IMAGE](
        header=header_message(time_ns, FRAME_ID),
        height=height,
        width=width,
        encoding="rgb8",
        is_bigendian=0,
        step=width * 3,
        data=np.ascontiguousarray(rgb).reshape(-1),
    )


def raw_message(path: Path, time_ns: int) -> Any:
    """Return an image file as sensor_msgs/Image, rgb8; raise FrameError where it can't be read."""
    return image_message(read_image(path), time_ns)


def compressed_message(path: Path, time_ns: int) -> Any:
    """Return a JPEG or PNG file as sensor_msgs/CompressedImage, its bytes unchanged.

    Raises:
        FrameError: it is another kind of file, or can't be read.
    """
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise FrameError(f"{path} is neither JPEG nor PNG, expected one of them; leave out --compressed")
    read_image(path)  # a broken file is refused now, not on the robot
    return typestore().types[COMPRESSED_IMAGE](
        header=header_message(time_ns, FRAME_ID),
        format=f"rgb8; {kind} compressed bgr8",
        data=np.fromfile(path, dtype=np.uint8),
    )
