"""The images of a bag: converted as in the node, and as small JPEGs for reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2

from mobile_vla_inference.bags.reader import COMPRESSED_IMAGE, IMAGE, BagError, BagMessage, BagReader
from mobile_vla_inference.decoding import is_jpeg
from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.ros import conversions

#: Type of an image message -> its check and its conversion to RGB, as in the node.
CONVERSIONS = {
    IMAGE: (conversions.check_image, conversions.image_to_rgb),
    COMPRESSED_IMAGE: (conversions.check_compressed, conversions.compressed_to_rgb),
}

_JPEG_QUALITY = 80


def decode_or_none(bag: BagReader, message: BagMessage) -> Any | None:
    """Return a message as an object; None where its bytes don't fit its type."""
    try:
        return bag.decode(message)
    except BagError:
        return None


def frames_jpeg(path: Path, topic: str, indices: Iterable[int] | None, max_width: int) -> Iterator[tuple[int, bytes]]:
    """Yield (index, JPEG bytes) of a bag's images in order; see ReplayResult.frames_jpeg."""
    wanted = None if indices is None else set(indices)
    last = None if wanted is None else max(wanted, default=-1)
    with BagReader(path) as bag:
        type_name = bag.topics[topic].type_name
        for index, message in enumerate(bag.messages((topic,))):
            if last is not None and index > last:
                return
            if wanted is None or index in wanted:
                jpeg = _jpeg(decode_or_none(bag, message), type_name, max_width)
                if jpeg is not None:
                    yield index, jpeg


def _jpeg(message: Any | None, type_name: str, max_width: int) -> bytes | None:
    """Return an image as JPEG no wider than `max_width`, unchanged where it fits; None where it can't be read."""
    if message is None:
        return None
    try:
        rgb = CONVERSIONS[type_name][1](message)
    except FrameError:
        return None
    height, width = rgb.shape[:2]
    if width <= max_width:
        if type_name == COMPRESSED_IMAGE and is_jpeg(data := bytes(message.data)):
            return data
    else:
        rgb = cv2.resize(rgb, (max_width, max(1, round(height * max_width / width))), interpolation=cv2.INTER_AREA)
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
