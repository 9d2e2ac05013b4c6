"""Camera frames: read, decode, check, and reduce them to the policy's input size.

The node, the policy worker and every offline tool reduce frames here, so that the policy always sees the same image.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mobile_vla_inference.decoding import PictureError, PictureHeader, decode_picture, picture_header
from mobile_vla_inference.errors import FrameError

_LOG = logging.getLogger(__name__)

#: Suffixes of image files in a folder of frames.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")

#: A frame larger than this per side is refused: it is a corrupt header or a misconfigured camera.
MAX_FRAME_SIDE_PX = 4608


def check_frame(frame: np.ndarray) -> None:
    """Raise FrameError unless `frame` is uint8 [height, width, 3] of a sane size."""
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        found = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise FrameError(f"frame is {found}, expected uint8 RGB [height, width, 3]; convert it before the step")
    check_frame_size(frame.shape[1], frame.shape[0], "frame")


def check_frame_size(width: int, height: int, name: str) -> None:
    """Raise FrameError, with the name, unless both sides are sane."""
    if not (0 < width <= MAX_FRAME_SIDE_PX and 0 < height <= MAX_FRAME_SIDE_PX):
        raise FrameError(
            f"{name} is {width} x {height} pixels, expected 1 to {MAX_FRAME_SIDE_PX} per side; reduce it, or check the "
            "camera"
        )


def reduce_frame(frame: np.ndarray, size_px: int, keep_aspect: bool = False) -> np.ndarray:
    """Reduce a camera frame to the policy's input size.

    Args:
        frame: uint8 RGB [height, width, 3].
        size_px: side of the square result.
        keep_aspect: crop the centred square first; otherwise the whole frame is squeezed, as in training.

    Returns:
        uint8 RGB [size_px, size_px, 3], contiguous. Area averaging when shrinking, bilinear when enlarging.

    Raises:
        FrameError: the frame is not a usable image.
    """
    check_frame(frame)
    height, width = frame.shape[:2]
    if keep_aspect and height != width:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        frame = frame[top : top + side, left : left + side]
        height = width = side
    if (height, width) == (size_px, size_px):
        return np.ascontiguousarray(frame)
    shrinking = height >= size_px and width >= size_px
    return cv2.resize(frame, (size_px, size_px), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)


def read_image(path: Path | str) -> np.ndarray:
    """Read an image file as uint8 RGB [height, width, 3]; raise FrameError if it is not an image."""
    path = Path(path)
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise FrameError(f"{path} can't be read ({error.strerror}); check the path and its permissions") from error
    return decode_image(data, str(path))


def check_picture(encoded: bytes, name: str, deep_grey: bool = False) -> PictureHeader | None:
    """Read the header of a JPEG or PNG, microseconds; None if the bytes are neither.

    Raises:
        FrameError: as decode_image, as far as the header shows it; a few bytes can declare gigabytes of pixels.
    """
    try:
        header = picture_header(encoded)
    except PictureError as error:
        raise _damaged(encoded, name, error) from error
    except ImportError as error:
        raise FrameError(
            f"{name} is a JPEG, and without simplejpeg ({error}) a damaged one can't be recognised, expected the "
            "packages of requirements/runtime.txt; run `pip install simplejpeg`"
        ) from error
    if header is not None:
        check_frame_size(header.width, header.height, name)
        if header.is_deep_grey and not deep_grey:
            raise FrameError(
                f"{name} is a grey PNG of 16 bits, which is how depth cameras write distances, expected a colour or "
                "8-bit grey image; use the colour camera"
            )
    return header


def decode_image(data: np.ndarray, name: str, deep_grey: bool = False) -> np.ndarray:
    """Decode JPEG, PNG and the like to uint8 RGB [height, width, 3].

    Args:
        data: the bytes, uint8 [bytes].
        name: what they are, for the message.
        deep_grey: whether a grey PNG of 16 bits is accepted as an image; otherwise it counts as distances.

    Raises:
        FrameError: not an image, a damaged one (also a JPEG that lost bytes), one that is too large, or distances.
    """
    encoded = data.tobytes()
    check_picture(encoded, name, deep_grey)
    try:
        rgb = decode_picture(encoded)
    except PictureError as error:
        raise _damaged(encoded, name, error) from error
    if rgb is None:
        raise FrameError(
            f"{name} contains {data.size} bytes that no image decoder accepts, expected a JPEG or PNG; replace it"
        )
    check_frame_size(rgb.shape[1], rgb.shape[0], name)
    return rgb


def _damaged(encoded: bytes, name: str, reason: PictureError) -> FrameError:
    return FrameError(
        f"{name} is cut off or corrupt ({len(encoded)} bytes: {reason}), expected a whole JPEG or PNG; replace it, or "
        "check the camera and the network"
    )


def list_frames(folder: Path | str) -> list[Path]:
    """List the image files of a folder in the order of the numbers in their names; see frame_order.

    Hidden files are left out; other files without an image's suffix are counted in a warning.

    Raises:
        FrameError: there is no such folder, or it contains no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FrameError(f"{folder} is not a folder, expected one with image files; check the path")
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    paths = sorted((path for path in files if path.suffix.lower() in IMAGE_SUFFIXES), key=frame_order)
    suffixes = (path.suffix.lower() or "without a suffix" for path in files)
    skipped = Counter(suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES)
    others = ", ".join(f"{number} {suffix}" for suffix, number in sorted(skipped.items()))
    if not paths:
        found = f" (but {others})" if others else ""
        raise FrameError(
            f"{folder} contains no image files{found}, expected some of {', '.join(IMAGE_SUFFIXES)}; check the "
            "path, or "
            "convert them"
        )
    if others:
        _LOG.warning(
            "%s: read %d images, left out other files: %s; images are %s, convert what is missing",
            folder,
            len(paths),
            others,
            ", ".join(IMAGE_SUFFIXES),
        )
    return paths


#: A number in a file's name, with or without decimals, such as a time stamp.
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)")


def frame_order(path: Path) -> tuple[Any, ...]:
    """Return the key that sorts frames as they were counted: frame_2 before frame_10, 7.25.png before 7.5.png.

    The numbers of a name are compared one after the other; names of equal numbers (1.png, 01.png) as texts.
    """
    words = _NUMBER.split(path.stem)  # text, number, text, ...
    key = [Fraction(word) if index % 2 else word for index, word in enumerate(words)]
    return tuple(key), path.name
