"""Draw text into images, Korean included.

OpenCV 5 brings letters for Korean. Older versions draw ASCII only, and Korean with their module `freetype` (the apt
package python3-opencv has it) and a font of the system: `apt install fonts-noto-cjk` or `fonts-nanum`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

#: Fonts with Korean letters, as Debian and Ubuntu name them.
_FONT_NAMES = ("NotoSansCJK-Regular.ttc", "NotoSansKR-Regular.otf", "NanumGothic.ttf", "NanumBarunGothic.ttf")
#: Where fonts are looked for.
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts")
#: Height of a capital letter of FONT_HERSHEY_SIMPLEX at scale 1, and of a text of OpenCV's size 1.
_HERSHEY_PX, _CAPITAL = 21.0, 0.72

Color = tuple[int, int, int]


def can_draw(text: str) -> bool:
    """Return whether every letter of a text can be drawn."""
    return text.isascii() or hasattr(cv2, "FontFace") or _freetype(FONT_FOLDERS) is not None


def text_width_px(text: str, size_px: int) -> int:
    """Return how wide a text is drawn."""
    if hasattr(cv2, "FontFace"):
        return cv2.getTextSize((1, 1), text, (0, 0), cv2.FontFace("sans"), size_px)[2]
    if not text.isascii() and (freetype := _freetype(FONT_FOLDERS)) is not None:
        return freetype.getTextSize(text, size_px, -1)[0][0]
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, _hershey_scale(size_px), 1)[0][0]


def draw_text(image: np.ndarray, text: str, origin: tuple[int, int], color: Color, size_px: int) -> None:
    """Draw a text into an image; letters that can't be drawn are left out (see `can_draw`).

    Args:
        image: uint8 [height, width, 3]; changed.
        text: one line.
        origin: x and y of the left end of its base line, pixels.
        color: in the order of the image's channels.
        size_px: size of the font.
    """
    if hasattr(cv2, "FontFace"):
        cv2.putText(image, text, origin, color, cv2.FontFace("sans"), size_px)
    elif not text.isascii() and (freetype := _freetype(FONT_FOLDERS)) is not None:
        freetype.putText(image, text, origin, size_px, color, -1, cv2.LINE_AA, True)
    else:
        ascii_text = text.encode("ascii", errors="ignore").decode()
        scale = _hershey_scale(size_px)
        cv2.putText(image, ascii_text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, color, 1, cv2.LINE_AA)


def fitting_size_px(text: str, width_px: int, largest_px: int, smallest_px: int) -> int:
    """Return the largest size at which a text fits into a width; the smallest one where none does."""
    sizes = range(largest_px, smallest_px, -1)
    return next((size for size in sizes if text_width_px(text, size) <= width_px), smallest_px)


def _hershey_scale(size_px: int) -> float:
    return size_px * _CAPITAL / _HERSHEY_PX


@cache
def _freetype(folders: tuple[str, ...]) -> Any | None:
    """Return OpenCV's writer with a font that has Korean letters; None where either is missing."""
    font = _system_font(folders)
    if font is None or not hasattr(cv2, "freetype"):
        return None
    writer = cv2.freetype.createFreeType2()
    writer.loadFontData(str(font), 0)
    return writer


def _system_font(folders: tuple[str, ...]) -> Path | None:
    for name in _FONT_NAMES:
        for folder in folders:
            if (found := next(Path(folder).rglob(name), None)) is not None:
                return found
    return None
