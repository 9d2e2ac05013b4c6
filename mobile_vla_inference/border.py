"""What both sides of the process border need: the frame reduction, the action and the errors.

The node (rclpy, no torch) and the policy worker (torch, no rclpy) share only this module, so that a
camera frame is resized in exactly one place, by one method, online and offline.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

#: Names that a folder of frames is searched for, in name order.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")

#: A frame larger than this per side is refused: it is a corrupt header or a misconfigured camera.
MAX_FRAME_SIDE_PX = 4608

#: Longer instructions are refused before they reach the tokenizer (bytes of UTF-8).
MAX_INSTRUCTION_BYTES = 4096

#: Longest message between the node and its worker; a larger one is refused with a sentence by whoever would send it.
MAX_MESSAGE_BYTES = 1 << 17


class MobileVlaError(Exception):
    """A fault that a user can act on: one sentence with what was found, expected and what to do next."""


class CheckpointError(MobileVlaError):
    """A checkpoint, its settings or its processors can't be used."""


class FrameError(MobileVlaError):
    """An image can't be used as a frame."""


class InstructionError(MobileVlaError):
    """An instruction can't be used."""


@dataclass(frozen=True)
class Action:
    """What the policy wants for one step, normalised to about [-1, 1] per axis.

    Attributes:
        values: one float per action axis, in the order of the settings' `action_axes`.
        step_s: seconds that the policy spent on this step, preprocessing included.
    """

    values: tuple[float, ...]
    step_s: float = 0.0


def check_frame(frame: np.ndarray) -> None:
    """Raise FrameError unless `frame` is uint8 [height, width, 3] of a sane size."""
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        found = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise FrameError(f"frame is {found}, expected uint8 RGB [height, width, 3]; convert it before the step")
    height, width = frame.shape[:2]
    if not (0 < height <= MAX_FRAME_SIDE_PX and 0 < width <= MAX_FRAME_SIDE_PX):
        raise FrameError(
            f"frame is {width} x {height} pixels, expected 1 to {MAX_FRAME_SIDE_PX} per side; check the camera"
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
    """Read an image file as uint8 RGB [height, width, 3]; raise FrameError where it is none."""
    path = Path(path)
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise FrameError(f"{path} can't be read ({error.strerror}); check the path and its permissions") from error
    return decode_image(data, str(path))


def decode_image(data: np.ndarray, name: str) -> np.ndarray:
    """Decode JPEG, PNG and the like (uint8 [bytes]) to uint8 RGB [height, width, 3]; `name` is for the message."""
    bgr = None
    if data.size:
        try:
            bgr = cv2.imdecode(data, cv2.IMREAD_COLOR)
        except cv2.error:
            bgr = None
    if bgr is None:
        raise FrameError(
            f"{name} holds {data.size} bytes that no image decoder accepts, expected a JPEG or PNG; replace it"
        )
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def list_frames(folder: Path | str) -> list[Path]:
    """List the image files of a folder in name order; raise FrameError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FrameError(f"{folder} is not a folder, expected one with image files; check the path")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FrameError(f"{folder} holds no image files, expected some of {', '.join(IMAGE_SUFFIXES)}; check the path")
    return paths


def check_instruction(text: str) -> str:
    """Return the instruction with white space and control characters folded into single spaces.

    An empty result is valid and means: stand still. Raises InstructionError where the text is too long or no UTF-8.
    """
    size = len(text.encode("utf-8", errors="replace"))
    if size > MAX_INSTRUCTION_BYTES:
        raise InstructionError(
            f"instruction is {size} bytes long, expected at most {MAX_INSTRUCTION_BYTES}; send a sentence"
        )
    if "\ufffd" in text:
        raise InstructionError("instruction holds bytes that are not UTF-8, expected UTF-8 text; check the publisher")
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())


def write_text_atomically(path: Path | str, text: str) -> None:
    """Write a text file so that it holds either its old content or all of `text`, whatever interrupts."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder, in spite of a first Ctrl-C."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise
