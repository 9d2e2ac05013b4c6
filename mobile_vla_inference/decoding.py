"""Decode images of cameras and files, and detect damage that a decoder would hide.

A JPEG that lost bytes still decodes: libjpeg fills the rest with grey and only warns. simplejpeg (libjpeg-turbo, the
same pixels as OpenCV's) raises that warning as an error. A PNG contains checksums, which are compared here.
JPEG has no checksum: changed bytes that still are valid codes of the same number of blocks can't be detected.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import cv2
import numpy as np

try:
    import simplejpeg
except ImportError as missing:
    simplejpeg = None
    _MISSING = str(missing)


class PictureError(ValueError):
    """Bytes that are not a complete image; the text is the reason in a few words."""


@dataclass(frozen=True)
class PictureHeader:
    """The header of a JPEG or PNG.

    Attributes:
        kind: "JPEG" or "PNG".
        width: pixels.
        height: pixels.
        is_deep_grey: grey with 16 bits a pixel, as depth cameras write distances.
        needs_opencv: a JPEG that is rotated (EXIF) or has four channels (CMYK): only OpenCV converts these.
    """

    kind: str
    width: int
    height: int
    is_deep_grey: bool = False
    needs_opencv: bool = False


_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = 0xDA
_JPEG_APP1 = 0xE1
#: Start-of-frame markers (ITU T.81, table B.1): C0 to CF without DHT, JPG and DAC.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"  # the last chunk's name and checksum
_PNG_GREY = (0, 4)  # colour types: grey, grey with alpha


def is_jpeg(encoded: bytes) -> bool:
    """Return whether bytes begin like a JPEG."""
    return encoded.startswith(_JPEG_START)


def picture_header(encoded: bytes) -> PictureHeader | None:
    """Read the header of a JPEG or PNG, microseconds; None if the bytes are neither.

    Raises:
        PictureError: the header, or the marker at the image's end, is missing.
        ImportError: a JPEG, and its decoder simplejpeg is not installed.
    """
    if is_jpeg(encoded):
        if simplejpeg is None:
            raise ImportError(_MISSING)
        header = _jpeg_header(encoded)
    elif encoded.startswith(_PNG_START):
        header = _png_header(encoded)
    else:
        return None
    if header is None:
        raise PictureError("its header or its end is missing")
    return header


def decode_picture(encoded: bytes) -> np.ndarray | None:
    """Decode JPEG, PNG and other formats of OpenCV to uint8 RGB [height, width, 3]; None if no decoder accepts it.

    Transparency is dropped, 16-bit values are reduced to 8, the first of several images is used, and EXIF rotation is
    applied.

    Raises:
        PictureError: the image is damaged.
        ImportError: a JPEG, and its decoder simplejpeg is not installed.
    """
    header = picture_header(encoded)
    if header is not None and header.kind == "JPEG":
        rgb = _decode_jpeg(encoded)
        if not header.needs_opencv:
            return rgb
    elif header is not None:
        _check_png(encoded)
    return _decode_with_opencv(encoded)


def _decode_jpeg(encoded: bytes) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(encoded, "RGB", strict=True)
    except ValueError as error:
        raise PictureError(" ".join(str(error).split())) from error


def _decode_with_opencv(encoded: bytes) -> np.ndarray | None:
    if not encoded:
        return None
    try:
        bgr = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return None if bgr is None else cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _jpeg_header(encoded: bytes) -> PictureHeader | None:
    """Return the frame header; None if it or the end of the scan is missing."""
    size, needs_opencv, position = None, False, len(_JPEG_START)
    while position + 4 <= len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == _JPEG_SCAN:
            if size is None or encoded.find(_JPEG_END, position) < 0:
                return None
            return PictureHeader("JPEG", *size, needs_opencv=needs_opencv)
        if marker in _JPEG_FRAMES and position + 10 <= len(encoded):
            height = int.from_bytes(encoded[position + 5 : position + 7], "big")
            width = int.from_bytes(encoded[position + 7 : position + 9], "big")
            size = (width, height)
            needs_opencv |= encoded[position + 9] == 4
        if marker == _JPEG_APP1 and encoded[position + 4 : position + 8] == b"Exif":
            needs_opencv = True
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return None


def _png_header(encoded: bytes) -> PictureHeader | None:
    """Return the chunk IHDR, which is always first; None if it or the last chunk is missing."""
    if encoded[12:16] != b"IHDR" or len(encoded) < 26 or encoded.rfind(_PNG_END) < 0:
        return None
    width, height = int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big")
    return PictureHeader("PNG", width, height, is_deep_grey=encoded[24] == 16 and encoded[25] in _PNG_GREY)


def _check_png(encoded: bytes) -> None:
    """Raise PictureError if a chunk is cut off or its checksum differs: not every decoder checks this."""
    position, name = len(_PNG_START), b""
    while name != b"IEND":
        length = int.from_bytes(encoded[position : position + 4], "big")
        end = position + 12 + length
        if end > len(encoded):
            raise PictureError("its last chunk is missing")
        name = encoded[position + 4 : position + 8]
        if zlib.crc32(encoded[position + 4 : end - 4]) != int.from_bytes(encoded[end - 4 : end], "big"):
            raise PictureError(f"the checksum of its chunk {name.decode('ascii', 'replace')} is wrong")
        position = end
