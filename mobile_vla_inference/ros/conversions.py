"""Convert camera messages to RGB frames and frames to messages; common encodings need no cv_bridge.

The PyPI and older apt builds of cv_bridge fail with numpy 2, so only rare encodings go through it. Messages are
duck-typed: this module imports neither rclpy nor a message package, and is tested with plain objects.
"""

from __future__ import annotations

import array
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.frames import check_frame_size, check_picture, decode_image

JPEG_QUALITY = 85


@dataclass(frozen=True)
class _Encoding:
    """How one encoding of sensor_msgs/image_encodings.hpp lies in memory.

    Attributes:
        channels: values per pixel.
        color_code: OpenCV's conversion to RGB; None for RGB itself, and for nv24, which OpenCV can't convert.
        value_bytes: 1, or 2 for a 16-bit encoding, of which the high byte is kept.
        even_width: whether two neighbouring pixels share their chroma.
        even_height: whether two neighbouring rows share their chroma.
        chroma_rows: rows of `step` bytes with the chroma, which follow the luma, per row of the image.
    """

    channels: int
    color_code: int | None
    value_bytes: int = 1
    even_width: bool = False
    even_height: bool = False
    chroma_rows: float = 0.0


# OpenCV names a Bayer pattern by the 2 x 2 pixels that start at row 1, column 1; ROS by those at the corner.
_BAYER_CODES = {
    "rggb": cv2.COLOR_BayerBG2RGB,
    "bggr": cv2.COLOR_BayerRG2RGB,
    "gbrg": cv2.COLOR_BayerGR2RGB,
    "grbg": cv2.COLOR_BayerGB2RGB,
}

_UYVY = _Encoding(2, cv2.COLOR_YUV2RGB_UYVY, even_width=True)
_YUYV = _Encoding(2, cv2.COLOR_YUV2RGB_YUYV, even_width=True)
_NV24 = _Encoding(1, None, chroma_rows=2.0)

_ENCODINGS = {
    **{f"rgb{8 * n}": _Encoding(3, None, n) for n in (1, 2)},
    **{f"bgr{8 * n}": _Encoding(3, cv2.COLOR_BGR2RGB, n) for n in (1, 2)},
    **{f"rgba{8 * n}": _Encoding(4, cv2.COLOR_RGBA2RGB, n) for n in (1, 2)},
    **{f"bgra{8 * n}": _Encoding(4, cv2.COLOR_BGRA2RGB, n) for n in (1, 2)},
    **{f"mono{8 * n}": _Encoding(1, cv2.COLOR_GRAY2RGB, n) for n in (1, 2)},
    **{f"bayer_{order}{8 * n}": _Encoding(1, code, n) for order, code in _BAYER_CODES.items() for n in (1, 2)},
    "8UC1": _Encoding(1, cv2.COLOR_GRAY2RGB),
    "8UC3": _Encoding(3, cv2.COLOR_BGR2RGB),
    "uyvy": _UYVY,
    "yuv422": _UYVY,
    "yuyv": _YUYV,
    "yuv422_yuy2": _YUYV,
    "nv12": _Encoding(1, cv2.COLOR_YUV2RGB_NV12, even_width=True, even_height=True, chroma_rows=0.5),
    "nv21": _Encoding(1, cv2.COLOR_YUV2RGB_NV21, even_width=True, even_height=True, chroma_rows=0.5),
    "nv24": _NV24,
}


def image_to_rgb(message: Any) -> np.ndarray:
    """Return a sensor_msgs/Image as uint8 RGB [height, width, 3].

    16-bit values are scaled to 8 bit by their full range; YUV is BT.601 with luma from 16 to 235, as in OpenCV and
    cv_bridge. The result may share the message's memory and be read-only.

    Raises:
        FrameError: the size, the row length, the data or the encoding can't be used.
    """
    check_frame_size(message.width, message.height, "image")
    encoding = _ENCODINGS.get(message.encoding)
    if encoding is None:
        return _convert_with_cv_bridge(message)
    if encoding is _NV24:
        return _nv24_to_rgb(message, encoding)
    pixels = _pixels(message, encoding)
    if encoding.color_code is None:
        return pixels
    try:
        return cv2.cvtColor(pixels, encoding.color_code)
    except cv2.error as error:
        raise FrameError(
            f"{message.encoding} image of {message.width} x {message.height} pixels is refused by OpenCV "
            f"({error.err}), expected a whole camera frame; check the camera driver"
        ) from error


def check_image(message: Any) -> None:
    """Raise FrameError if a sensor_msgs/Image can't be a frame; takes microseconds, converts no pixel."""
    check_frame_size(message.width, message.height, "image")
    encoding = _ENCODINGS.get(message.encoding)
    if encoding is None:
        _cv_bridge(message.encoding)
    else:
        _checked_data(message, encoding)


def check_compressed(message: Any) -> None:
    """Raise FrameError if the header of a sensor_msgs/CompressedImage can't be a frame's; decodes nothing."""
    encoded = bytes(message.data)
    name, is_deep_grey = _compressed_name(message.format)
    if check_picture(encoded, name, is_deep_grey) is None:
        raise FrameError(
            f"{name} ({len(encoded)} bytes) is neither JPEG nor PNG, expected one of them; set the camera's "
            "image_transport format or use raw images"
        )


def compressed_to_rgb(message: Any) -> np.ndarray:
    """Return a sensor_msgs/CompressedImage (JPEG or PNG) as uint8 RGB [height, width, 3].

    The bytes decide which of the two it is, because drivers mix up the words in `format`. But a `format` whose raw
    encoding would be refused, such as that of a depth image, is refused.

    Raises:
        FrameError: neither JPEG nor PNG, not a colour or grey image, too large, cut off or corrupt.
    """
    check_compressed(message)
    return decode_image(np.frombuffer(message.data, dtype=np.uint8), *_compressed_name(message.format))


#: Words of a `format` that mean another codec than JPEG and PNG, or not a colour or grey image.
_OTHER_FORMATS = re.compile(
    r"depth|disparity|rvl|theora|ffmpeg|h\.?26[45]|hevc|avc|av1|vp[89]|webp|tiff?|avif|heic|gif|bmp|jp2|jpeg2000|jxl"
)
#: An abstract encoding of sensor_msgs/image_encodings.hpp: an OpenCV type.
_CV_TYPE = re.compile(r"(8|16|32|64)[USF]C[0-9]*")
_SHOWN_FORMAT_CHARACTERS = 60


def _compressed_name(text: str) -> tuple[str, bool]:
    """Return a CompressedImage's name in sentences, and whether its format allows 16-bit grey (mono16).

    Raises:
        FrameError: its format is not that of a colour or grey image as JPEG or PNG.
    """
    shown = text if len(text) <= _SHOWN_FORMAT_CHARACTERS else text[:_SHOWN_FORMAT_CHARACTERS] + "..."
    name = f"compressed image of format {shown!r}"
    # image_transport writes "ENCODING; CODEC compressed ENCODING", many drivers only the codec or the encoding.
    encoding = text.partition(";")[0].strip()
    is_bayer = encoding.startswith("bayer_")
    is_other_type = _CV_TYPE.fullmatch(encoding) is not None and encoding not in _ENCODINGS
    if is_bayer or is_other_type or _OTHER_FORMATS.search(text.lower()):
        hint = "compress after debayering" if is_bayer else "subscribe to the camera's colour images"
        raise FrameError(f"{name} is not for this policy, expected a colour or grey image as JPEG or PNG; {hint}")
    return name, encoding == "mono16"


def rgb_to_image(
    rgb: np.ndarray, message_type: Callable[[], Any], stamp: Any, frame_id: str, encoding: str = "rgb8"
) -> Any:
    """Return uint8 RGB [height, width, 3] as a message of `message_type` (sensor_msgs.msg.Image), rgb8 or bgr8."""
    if encoding not in ("rgb8", "bgr8"):
        raise ValueError(f"encoding is {encoding!r}, expected 'rgb8' or 'bgr8'")
    pixels = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR) if encoding == "bgr8" else np.ascontiguousarray(rgb)
    message = message_type()
    message.header.stamp = stamp
    message.header.frame_id = frame_id
    message.height, message.width = pixels.shape[:2]
    message.encoding = encoding
    message.is_bigendian = 0
    message.step = message.width * 3
    message.data = _byte_array(pixels)
    return message


def rgb_to_compressed(rgb: np.ndarray, message_type: Callable[[], Any], stamp: Any, frame_id: str) -> Any:
    """Return uint8 RGB [height, width, 3] as JPEG in a message of `message_type` (sensor_msgs.msg.CompressedImage)."""
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    message = message_type()
    message.header.stamp = stamp
    message.header.frame_id = frame_id
    # As image_transport's own publisher writes it: the encoding to return, and the one that the JPEG was made from.
    message.format = "rgb8; jpeg compressed bgr8"
    message.data = _byte_array(encoded)
    return message


def _byte_array(values: np.ndarray) -> array.array:
    """Copy contiguous uint8 values to the one type that the setter of a message field does not check per value."""
    data = array.array("B")
    data.frombytes(memoryview(values).cast("B"))
    return data


def _checked_data(message: Any, encoding: _Encoding) -> np.ndarray:
    """Return the message's data, uint8 [bytes]; raise FrameError unless size and row length fit a whole image."""
    width, height, step = message.width, message.height, message.step
    if (encoding.even_width and width % 2) or (encoding.even_height and height % 2):
        raise FrameError(
            f"{message.encoding} image is {width} x {height} pixels, expected even sides because pixels share their "
            "colour; check the camera's resolution"
        )
    row_bytes = width * encoding.channels * encoding.value_bytes
    if step < row_bytes:
        raise FrameError(
            f"{message.encoding} image of width {width} has a step of {step} bytes, expected at least {row_bytes}; "
            "check the camera driver"
        )
    rows = height + int(height * encoding.chroma_rows)
    data = np.frombuffer(message.data, dtype=np.uint8)
    # The last row can end with its pixels: some drivers omit its padding.
    needed = step * rows - (step - row_bytes) * max(1, int(encoding.chroma_rows))
    if data.size < needed:
        raise FrameError(
            f"{message.encoding} image of {width} x {height} pixels holds {data.size} bytes, expected at least "
            f"{needed}; check the camera driver and the network"
        )
    if encoding.chroma_rows and data.size > step * rows:
        # The chroma would be read from the wrong place: some drivers pad the height of a plane, and no field shows it.
        raise FrameError(
            f"{message.encoding} image of {width} x {height} pixels and a step of {step} bytes holds {data.size} "
            f"bytes, expected {step * rows}: the chroma plane may be padded; set the driver to bgr8"
        )
    return data


def _pixels(message: Any, encoding: _Encoding) -> np.ndarray:
    """View the message's data as uint8 [rows, width] or [rows, width, channels]; rows may be padded."""
    data = _checked_data(message, encoding)
    rows = message.height + int(message.height * encoding.chroma_rows)
    shape = (rows, message.width, encoding.channels, encoding.value_bytes)
    strides = (message.step, encoding.channels * encoding.value_bytes, encoding.value_bytes, 1)
    values = np.ndarray(shape, np.uint8, buffer=data, strides=strides)
    high_byte = 0 if encoding.value_bytes == 1 or message.is_bigendian else 1
    pixels = values[..., high_byte]
    return pixels[..., 0] if encoding.channels == 1 else pixels


def _nv24_to_rgb(message: Any, encoding: _Encoding) -> np.ndarray:
    """Convert luma and, below it in rows twice as long, a pair of chroma values for each pixel.

    OpenCV has no conversion for it: every pixel is written twice as YUYV, and every second one of the result is kept.
    """
    data, width, height, step = _checked_data(message, encoding), message.width, message.height, message.step
    packed = np.empty((height, width, 4), np.uint8)
    packed[..., 0::2] = np.ndarray((height, width, 1), np.uint8, buffer=data, strides=(step, 1, 1))
    packed[..., 1::2] = np.ndarray((height, width, 2), np.uint8, data, offset=step * height, strides=(2 * step, 2, 1))
    return cv2.cvtColor(packed.reshape(height, 2 * width, 2), cv2.COLOR_YUV2RGB_YUYV)[:, ::2]


def _convert_with_cv_bridge(message: Any) -> np.ndarray:
    """Convert an encoding that is not in the table with cv_bridge, if one is installed that works."""
    bridge = _cv_bridge(message.encoding)
    try:
        return bridge.imgmsg_to_cv2(message, desired_encoding="rgb8")
    except _CV_BRIDGE_ERRORS as error:
        raise _encoding_error(message.encoding, error) from error


#: A cv_bridge built for numpy 1 fails with ImportError or AttributeError, at import or at first use.
_CV_BRIDGE_ERRORS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, cv2.error)


def _cv_bridge(encoding: str) -> Any:
    """Return a CvBridge for an encoding that is not in the table; raise FrameError if there is none."""
    try:
        from cv_bridge import CvBridge

        return CvBridge()
    except _CV_BRIDGE_ERRORS as error:
        raise _encoding_error(encoding, error) from error


def _encoding_error(encoding: str, error: Exception) -> FrameError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return FrameError(
        f"image encoding is {encoding!r} and cv_bridge can't convert it ({reason}), expected one of "
        f"{', '.join(_ENCODINGS)}; set the camera's pixel format"
    )
