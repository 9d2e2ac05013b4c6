"""Small bags for tests, good ones and bad ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mobile_vla_inference.bags.messages import header_message, twist_message
from mobile_vla_inference.bags.reader import COMPRESSED_IMAGE, IMAGE, STRING, TWIST, typestore
from mobile_vla_inference.bags.writer import BagWriter
from mobile_vla_inference.ros.conversions import rgb_to_compressed

START_NS = 1_700_000_000_000_000_000
PERIOD_NS = 50_000_000


def picture(index: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Return a picture that differs from frame to frame, uint8 RGB."""
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def raw(rgb: np.ndarray, time_ns: int) -> Any:
    height, width = rgb.shape[:2]
    return typestore().types[IMAGE](
        header=header_message(time_ns, "camera"),
        height=height,
        width=width,
        encoding="rgb8",
        is_bigendian=0,
        step=3 * width,
        data=rgb.reshape(-1),
    )


class _Plain:
    """A stand-in for a message class whose fields rgb_to_compressed fills."""

    def __init__(self) -> None:
        self.header = type("Header", (), {})()


def compressed(rgb: np.ndarray, time_ns: int) -> Any:
    data = np.frombuffer(rgb_to_compressed(rgb, _Plain, None, "camera").data, dtype=np.uint8)
    return typestore().types[COMPRESSED_IMAGE](header=header_message(time_ns, "camera"), format="jpeg", data=data)


def stamps(count: int) -> list[int]:
    return [START_NS + index * PERIOD_NS for index in range(count)]


def write_drive(
    path: Path,
    times_ns: Iterable[int] = tuple(stamps(20)),
    *,
    storage: str = "mcap",
    kind: str = IMAGE,
    instructions: dict[int, str] | None = None,
    image_topics: tuple[str, ...] = ("/image_raw",),
    commands: bool = True,
) -> Path:
    """Write a bag with images, instructions (index of the frame -> text) and a command per frame."""
    instructions = {0: "follow the track"} if instructions is None else instructions
    make = raw if kind == IMAGE else compressed
    with BagWriter(path, storage) as bag:
        bag.add_topic("/instruction", STRING)
        if commands:
            bag.add_topic("/cmd_vel", TWIST)
        for topic in image_topics:
            bag.add_topic(topic, kind)
        received_ns = START_NS
        for index, time_ns in enumerate(times_ns):
            if index in instructions:
                bag.write_message("/instruction", received_ns, typestore().types[STRING](data=instructions[index]))
            for topic in image_topics:
                bag.write_message(topic, received_ns, make(picture(index), time_ns))
            if commands:
                bag.write_message("/cmd_vel", received_ns, twist_message(0.1 * index, -0.01 * index))
            received_ns += PERIOD_NS
    return path


def storage_file(bag: Path) -> Path:
    return next(file for file in bag.iterdir() if file.suffix in (".mcap", ".db3"))
