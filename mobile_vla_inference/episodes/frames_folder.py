"""Read a folder with `images/` and `actions.csv` (frame, stamp_s, image, steering, throttle)."""

from __future__ import annotations

import csv
import io
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.outside_files import read_text

COLUMNS = ("frame", "stamp_s", "image", "steering", "throttle")

#: Default speeds at full throttle and full steering: the file only has shares of full.
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
    """Read the lines of a folder's actions.csv, in order, and check that every image exists.

    All formats of spreadsheets are read: with a byte order mark or in UTF-16, with commas, semicolons or tabs, and with
    decimal commas where commas don't separate.

    Raises:
        FrameError: the folder, the file, a column, a value or an image is missing or wrong.
    """
    folder = Path(folder)
    table = folder / "actions.csv"
    if not table.exists():
        raise FrameError(
            f"{folder} has no actions.csv, expected one next to images/ ({', '.join(COLUMNS)}); check the path"
        )
    try:
        lines = _read_lines(table)
    except csv.Error as error:
        raise FrameError(f"{table} is not CSV in UTF-8 ({error}); save it as such") from error
    frames = [_frame(folder, table, number, line) for number, line in lines]
    if not frames:
        raise FrameError(f"{table} contains no frame, expected a line per image; correct it")
    for (former, frame), (number, _) in zip(itertools.pairwise(frames), lines[1:]):
        if frame.stamp_s <= former.stamp_s:
            raise FrameError(
                f"{table} line {number} has stamp_s {frame.stamp_s:g} after {former.stamp_s:g}, expected stamps that "
                "increase; correct it"
            )
    return frames


#: Largest table, bytes: twice that of a million frames.
_MAX_TABLE_BYTES = 1 << 26
#: Separators of cells: a comma, or those of spreadsheets with decimal commas.
_DELIMITERS = (",", ";", "\t")
_NUMBERS = ("stamp_s", "steering", "throttle")
#: Columns with shares of full, the option for the speed at full, and its unit.
_FULL = (("throttle", "--max-linear-mps", "m/s"), ("steering", "--max-angular-radps", "rad/s"))


def _read_lines(table: Path) -> list[tuple[int, dict[str, str | None]]]:
    """Return (line number, {column: cell}) of every line that is not empty, with decimal points."""
    text = io.StringIO(read_text(table, "a table of frames", _MAX_TABLE_BYTES, error=FrameError), newline="")
    header, header_number = text.readline(), 1
    if header.startswith("sep="):  # Excel's own note on the delimiter
        header, header_number = text.readline(), 2
    delimiter = max(_DELIMITERS, key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise FrameError(
            f"{table} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}, expected "
            f"{', '.join(COLUMNS)}; correct its first line"
        )
    twice = [column for column in COLUMNS if names.count(column) > 1]
    if twice:
        raise FrameError(f"{table} has the column {twice[0]} twice, expected it once; correct its first line")
    lines = []
    reader = csv.reader(text, delimiter=delimiter)
    for cells in reader:
        number = header_number + reader.line_num
        cells = [cell.strip() for cell in cells]
        if any(cells[len(names) :]):
            raise FrameError(
                f"{table} line {number} has {len(cells)} cells, expected {len(names)} as in the first line; correct it"
            )
        if any(cells):
            line = dict(itertools.zip_longest(names, cells[: len(names)]))
            if delimiter != ",":
                line.update({column: line[column].replace(",", ".") for column in _NUMBERS if line[column]})
            lines.append((number, line))
    return lines


def _frame(folder: Path, table: Path, number: int, line: dict[str, str | None]) -> RecordedFrame:
    values = {}
    for column in _NUMBERS:
        try:
            values[column] = float(line[column])
        except (TypeError, ValueError):
            values[column] = math.nan
        if not math.isfinite(values[column]):
            raise FrameError(f"{table} line {number} has {column} {line[column]!r}, expected a number; correct it")
    image = folder / (line["image"] or "")
    if not image.is_file():
        raise FrameError(f"{table} line {number} names {_no_image(folder, line['image'] or '')}")
    if values["stamp_s"] < 0.0:
        raise FrameError(f"{table} line {number} has stamp_s {values['stamp_s']:g}, expected 0 or more; correct it")
    for column, option, unit in _FULL:
        if abs(values[column]) > 1.0 + 1e-6:
            raise FrameError(
                f"{table} line {number} has {column} {values[column]:g}, expected -1 to 1, a share of full {column}; "
                f"divide the column by its value at full {column}, and give the speed at full with {option} in {unit}"
            )
    return RecordedFrame(values["stamp_s"], image, values["steering"], values["throttle"])


def _no_image(folder: Path, name: str) -> str:
    """Return the rest of the message about an image that is not at its path."""
    if not name:
        return f"no image, expected a path relative to {folder}; write it into the column image"
    inner = f"images/{Path(name).name}"
    if (folder / inner).is_file():
        return f"{name!r}, which is not in {folder} ({inner} is), expected a path relative to it; write {inner}"
    return f"{name!r}, which is not in {folder}, expected the path of an image file relative to it; copy or correct it"
