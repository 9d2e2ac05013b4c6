"""A folder with `images/` and `actions.csv` (frame, stamp_s, image, steering, throttle) as messages of a drive."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from mobile_vla_inference.border import FrameError

COLUMNS = ("frame", "stamp_s", "image", "steering", "throttle")

#: What full throttle and full steering are, where nobody says more: the file knows shares of full only.
FULL_LINEAR_MPS, FULL_ANGULAR_RADPS = 1.0, 1.0


@dataclass(frozen=True)
class RecordedFrame:
    """One line of actions.csv.

    Attributes:
        stamp_s: seconds since the beginning of the drive.
        image: path of the image file.
        steering: -1 left to 1 right.
        throttle: 0 to 1 (negative: backward).
    """

    stamp_s: float
    image: Path
    steering: float
    throttle: float


def read_frames_folder(folder: Path | str) -> list[RecordedFrame]:
    """Read the lines of a folder's actions.csv, in order; every image is known to exist.

    Raises:
        FrameError: the folder, the file, a column, a value or an image is missing or wrong.
    """
    folder = Path(folder)
    table = folder / "actions.csv"
    try:
        with table.open(encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (lines.fieldnames or ())]
            if missing:
                raise FrameError(
                    f"{table} lacks the column {', '.join(missing)}, expected {', '.join(COLUMNS)}; "
                    "correct its first line"
                )
            frames = [_frame(folder, table, number, line) for number, line in enumerate(lines, start=2)]
    except FileNotFoundError as error:
        raise FrameError(
            f"{folder} has no actions.csv, expected one beside images/ ({', '.join(COLUMNS)}); check the path"
        ) from error
    except OSError as error:
        raise FrameError(f"{table} can't be read ({error.strerror}); check the path and its permissions") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise FrameError(f"{table} is no CSV in UTF-8 ({error}); correct it") from error
    if not frames:
        raise FrameError(f"{table} holds no frame, expected a line per image; correct it")
    for number, (former, frame) in enumerate(itertools.pairwise(frames), start=3):
        if frame.stamp_s <= former.stamp_s:
            raise FrameError(
                f"{table} line {number} is stamped {frame.stamp_s:g} s after {former.stamp_s:g} s, expected times that "
                "rise; correct it"
            )
    return frames


def _frame(folder: Path, table: Path, number: int, line: dict[str, str | None]) -> RecordedFrame:
    values = {}
    for column in ("stamp_s", "steering", "throttle"):
        try:
            values[column] = float(line[column])
        except (TypeError, ValueError):
            values[column] = math.nan
        if not math.isfinite(values[column]):
            raise FrameError(f"{table} line {number} has {column} {line[column]!r}, expected a number; correct it")
    image = folder / (line["image"] or "")
    if not image.is_file():
        raise FrameError(f"{table} line {number} names {line['image']!r}, expected an image file there; copy it")
    if values["stamp_s"] < 0.0:
        raise FrameError(f"{table} line {number} has stamp_s {values['stamp_s']:g}, expected 0 or more; correct it")
    return RecordedFrame(values["stamp_s"], image, values["steering"], values["throttle"])
