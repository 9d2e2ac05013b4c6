"""Draw the node's decision on the camera image, for `~/debug_image`."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from mobile_vla_inference.action import VelocityCommand
from mobile_vla_inference.lettering import draw_text

_MOVING_RGB = (0, 200, 80)
_STANDING_RGB = (230, 60, 40)
_TEXT_RGB = (255, 255, 255)
#: Narrower frames are enlarged, so that the text is readable.
_MIN_WIDTH_PX = 480
_TEXT_PX = 18
_MARGIN_PX = 8


def draw_command(
    frame: np.ndarray, command: VelocityCommand, limits: tuple[float, float, float], lines: Sequence[str]
) -> np.ndarray:
    """Return a copy of a frame with the command as an arrow and lines of text above it.

    Args:
        frame: uint8 RGB [height, width, 3].
        command: the velocity in force; the lengths of the arrow and of the turn bar are relative to `limits`.
        limits: largest magnitude per axis, in the order of VelocityCommand.values.
        lines: text, from top to bottom; the first line is green if the robot moves, red if it stands.
    """
    width = frame.shape[1]
    factor = max(1.0, _MIN_WIDTH_PX / width)
    image = cv2.resize(frame, None, fx=factor, fy=factor) if factor > 1.0 else frame.copy()
    color = _STANDING_RGB if command.is_zero else _MOVING_RGB
    band_px = len(lines) * (_TEXT_PX + 4) + _MARGIN_PX
    image[:band_px] //= 3
    for row, line in enumerate(lines):
        draw_text(image, line, (_MARGIN_PX, (row + 1) * (_TEXT_PX + 4)), _TEXT_RGB if row else color, _TEXT_PX)
    _draw_arrow(image, command, limits, color)
    return image


def _draw_arrow(
    image: np.ndarray, command: VelocityCommand, limits: tuple[float, float, float], color: tuple[int, int, int]
) -> None:
    """Draw the velocity as seen from above, at the bottom: forward is up, left is left; a bar shows the turn rate."""
    height, width = image.shape[:2]
    shares = [value / limit if limit > 0 else 0.0 for value, limit in zip(command.values, limits)]
    reach_px = height // 4
    start = (width // 2, height - reach_px - _MARGIN_PX)
    tip = (round(start[0] - shares[1] * reach_px), round(start[1] - shares[0] * reach_px))
    if tip != start:
        cv2.arrowedLine(image, start, tip, color, 4, cv2.LINE_AA, tipLength=0.25)
    cv2.circle(image, start, 5, color, -1, cv2.LINE_AA)
    bar_y = height - 2 * _MARGIN_PX
    cv2.line(image, (start[0], bar_y), (round(start[0] - shares[2] * width / 3), bar_y), color, 6)
