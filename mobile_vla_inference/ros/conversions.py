"""Turn camera messages into RGB frames and frames into messages, without cv_bridge for what cameras commonly send.

The PyPI and older apt builds of cv_bridge break on numpy 2, so only rare encodings go through it. Messages
are duck-typed: this module imports neither rclpy nor a message package and is tested with plain objects.
"""

from __future__ import annotations

import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from mobile_vla_inference.border import MAX_FRAME_SIDE_PX, FrameError, decode_image

JPEG_QUALITY = 85


@dataclass(frozen=True)
class _Encoding:
    """How one encoding of sensor_msgs/image_encodings.hpp lies in memory.

    Attributes:
        channels: values per pixel.
        color_code: OpenCV's conversion to RGB; None where it is RGB already.
        value_bytes: 1, or 2 for the 16-bit encodings, of which the high byte is kept.
        even_width: whether two neighbouring pixels share their colour.
        even_height: whether two neighbouring rows share their colour, which follows the luma as extra rows.
    """

    channels: int
    color_code: int | None
    value_bytes: int = 1
    even_width: bool = False
    even_height: bool = False


# OpenCV's traditional Bayer names tell the 2 x 2 pixels that start at row 1, column 1; ROS tells those at the corner.
_BAYER_CODES = {
    "rggb": cv2.COLOR_BayerBG2RGB,
    "bggr": cv2.COLOR_BayerRG2RGB,
    "gbrg": cv2.COLOR_BayerGR2RGB,
    "grbg": cv2.COLOR_BayerGB2RGB,
}

_UYVY = _Encoding(2, cv2.COLOR_YUV2RGB_UYVY, even_width=True)
_YUYV = _Encoding(2, cv2.COLOR_YUV2RGB_YUYV, even_width=True)

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
    "nv21": _Encoding(1, cv2.COLOR_YUV2RGB_NV21, even_width=True, even_height=True),
}


def image_to_rgb(message: Any) -> np.ndarray:
    """Return a sensor_msgs/Image as uint8 RGB [height, width, 3].

    16-bit values are scaled to 8 bit by their full range. The result may share the message's memory and be read-only.

    Raises:
        FrameError: the size, the row length, the data or the encoding is not usable.
    """
    _check_size(message.width, message.height, "image")
    encoding = _ENCODINGS.get(message.encoding)
    if encoding is None:
        return _convert_with_cv_bridge(message)
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
    """Raise FrameError where a sensor_msgs/Image can't be a frame; microseconds, no pixel is converted."""
    _check_size(message.width, message.height, "image")
    encoding = _ENCODINGS.get(message.encoding)
    if encoding is None:
        _cv_bridge(message.encoding)
    else:
        _pixels(message, encoding)


def check_compressed(message: Any) -> None:
    """Raise FrameError where a sensor_msgs/CompressedImage can't be a frame by its header; nothing is decoded."""
    _encoded_image(message)


def compressed_to_rgb(message: Any) -> np.ndarray:
    """Return a sensor_msgs/CompressedImage (JPEG or PNG) as uint8 RGB [height, width, 3].

    The size that the header tells is checked before a pixel is decoded: a few bytes can ask for gigabytes.

    Raises:
        FrameError: neither JPEG nor PNG, too large, cut off or corrupt.
    """
    return decode_image(_encoded_image(message), f"compressed image of format {message.format!r}")


def _encoded_image(message: Any) -> np.ndarray:
    """Return the bytes of a JPEG or PNG, uint8 [bytes], whose header tells a sane size."""
    data = np.frombuffer(message.data, dtype=np.uint8)
    encoded = data.tobytes()
    if encoded.startswith(_JPEG_START):
        size = _jpeg_size(encoded)
    elif encoded.startswith(_PNG_START):
        size = _png_size(encoded)
    else:
        raise FrameError(
            f"compressed image of format {message.format!r} ({len(encoded)} bytes) is neither JPEG nor PNG, "
            "expected one of them; set the camera's image_transport format or use raw images"
        )
    if size is None:
        raise FrameError(
            f"compressed image of format {message.format!r} is cut off or corrupt ({len(encoded)} bytes), "
            "expected a whole JPEG or PNG; check the camera and the network"
        )
    _check_size(*size, "compressed image")
    return data


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
    # The words that image_transport's own publisher writes: the encoding to give, and what the JPEG was made from.
    message.format = "rgb8; jpeg compressed bgr8"
    message.data = _byte_array(encoded)
    return message


def _byte_array(values: np.ndarray) -> array.array:
    """Copy contiguous uint8 values to the one type that the setter of a message field takes without a look inside."""
    data = array.array("B")
    data.frombytes(memoryview(values).cast("B"))
    return data


def _check_size(width: int, height: int, name: str) -> None:
    if not (0 < width <= MAX_FRAME_SIDE_PX and 0 < height <= MAX_FRAME_SIDE_PX):
        raise FrameError(
            f"{name} is {width} x {height} pixels, expected 1 to {MAX_FRAME_SIDE_PX} per side; check the camera"
        )


def _pixels(message: Any, encoding: _Encoding) -> np.ndarray:
    """View the message's data as uint8 [rows, width] or [rows, width, channels]; rows may be padded."""
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
    rows = height * 3 // 2 if encoding.even_height else height
    data = np.frombuffer(message.data, dtype=np.uint8)
    # The last row may end with its pixels: some drivers leave out its padding.
    needed = step * (rows - 1) + row_bytes
    if data.size < needed:
        raise FrameError(
            f"{message.encoding} image of {width} x {height} pixels holds {data.size} bytes, expected at least "
            f"{needed}; check the camera driver and the network"
        )
    shape = (rows, width, encoding.channels, encoding.value_bytes)
    strides = (step, encoding.channels * encoding.value_bytes, encoding.value_bytes, 1)
    values = np.ndarray(shape, np.uint8, buffer=data, strides=strides)
    high_byte = 0 if encoding.value_bytes == 1 or message.is_bigendian else 1
    pixels = values[..., high_byte]
    return pixels[..., 0] if encoding.channels == 1 else pixels


def _convert_with_cv_bridge(message: Any) -> np.ndarray:
    """Leave an encoding that is not in the table to cv_bridge, where there is one that works."""
    bridge = _cv_bridge(message.encoding)
    try:
        return bridge.imgmsg_to_cv2(message, desired_encoding="rgb8")
    except _CV_BRIDGE_ERRORS as error:
        raise _encoding_error(message.encoding, error) from error


#: A cv_bridge built for numpy 1 fails in its own way: ImportError or AttributeError, at import or at first use.
_CV_BRIDGE_ERRORS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, cv2.error)


def _cv_bridge(encoding: str) -> Any:
    """Return a CvBridge for an encoding that is not in the table; raise FrameError where there is none."""
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


_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = 0xDA
#: Start-of-frame markers (ITU T.81, table B.1): C0 to CF without DHT, JPG and DAC.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"  # the last chunk's name and checksum


def _jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Return (width, height) from a JPEG's frame header; None where the header or the end of the scan is missing."""
    size, position = None, len(_JPEG_START)
    while position + 4 <= len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == _JPEG_SCAN:
            return size if encoded.find(_JPEG_END, position) >= 0 else None
        if marker in _JPEG_FRAMES and position + 9 <= len(encoded):
            height = int.from_bytes(encoded[position + 5 : position + 7], "big")
            width = int.from_bytes(encoded[position + 7 : position + 9], "big")
            size = (width, height)
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return None


def _png_size(encoded: bytes) -> tuple[int, int] | None:
    """Return (width, height) from a PNG's IHDR, which is always first; None where it or the last chunk is missing."""
    if encoded[12:16] != b"IHDR" or len(encoded) < 24 or encoded.rfind(_PNG_END) < 0:
        return None
    return int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big")
