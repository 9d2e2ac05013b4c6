"""Command-line arguments, their types and their checks, that several subcommands share."""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mobile_vla_inference.episodes.frames_folder import FULL_ANGULAR_RADPS, FULL_LINEAR_MPS
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.policy.storage.checkpoint_files import SETTINGS_FILE, processor_places, settings_path

#: The policy that is part of the package.
SMALL_POLICY = Path(__file__).resolve().parent.parent / "data" / "small_policy"

#: The published policy's period, for whom nothing else tells one.
STEP_PERIOD_S = 0.3

_HEAD_BYTES = 64


@dataclass(frozen=True)
class OutputKind:
    """A kind of report: its name in sentences, and how the bytes of such a file begin."""

    name: str
    begins: re.Pattern[bytes]


JSON_OUTPUT = OutputKind("JSON file", re.compile(rb"(\xef\xbb\xbf)?\s*[\[{]"))
HTML_OUTPUT = OutputKind("HTML file", re.compile(rb"(\xef\xbb\xbf)?\s*<"))
RERUN_OUTPUT = OutputKind("Rerun recording", re.compile(rb"RRF"))
VIDEO_OUTPUT = OutputKind("MP4 video", re.compile(rb"....ftyp", re.DOTALL))


def positive_number(text: str) -> float:
    """Return a finite number above 0; argparse tells the user where it is none."""
    value = _number(text)
    if not value > 0.0:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def time_s(text: str) -> float:
    """Return a finite number of seconds, 0 or more; argparse tells the user where it is none."""
    value = _number(text)
    if not value >= 0.0:
        raise argparse.ArgumentTypeError(f"{text} is no time, expected seconds, 0 or more")
    return value


def count(text: str) -> int:
    """Return a whole number above 0; argparse tells the user where it is none."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def add_period_argument(parser: argparse.ArgumentParser, default: float | None = STEP_PERIOD_S) -> None:
    """Declare `--period`, the time of an episode's step; without a default, the episodes' own."""
    parser.add_argument(
        "--period",
        type=positive_number,
        default=default,
        metavar="S",
        help=f"seconds from one step to the next (default: {'as the episodes say' if default is None else default})",
    )


def add_full_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what full throttle and full steering of an actions.csv are; `full_speeds` reads them."""
    parser.add_argument(
        "--max-linear-mps",
        type=positive_number,
        metavar="V",
        help=f"linear.x at full throttle of actions.csv, m/s (default: {FULL_LINEAR_MPS:g})",
    )
    parser.add_argument(
        "--max-angular-radps",
        type=positive_number,
        metavar="W",
        help=f"angular.z at full steering to the left, rad/s (default: {FULL_ANGULAR_RADPS:g})",
    )


def full_speeds(args: argparse.Namespace) -> tuple[float, float]:
    """Return m/s at full throttle and rad/s at full steering."""
    return args.max_linear_mps or FULL_LINEAR_MPS, args.max_angular_radps or FULL_ANGULAR_RADPS


def check_output(
    path: Path | None, *inputs: Path | None, kind: OutputKind = JSON_OUTPUT, force: bool | None = None
) -> None:
    """Raise MobileVlaError where an output can't be written, or would destroy what is not meant to be replaced.

    Asked before the work, so that no long run ends in vain. What is read is never overwritten: an input that is a
    folder counts with the files in it, a checkpoint with its settings and processors.

    Args:
        path: the file to write; None: there is none.
        inputs: what is read.
        kind: what a report is; an existing file is replaced only if it begins as this kind does, or is empty.
        force: of data that is not replaced as a report is: replace what exists, of whatever kind; None: a report.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise MobileVlaError(f"{path.parent} is not a folder, expected one to write {path.name} to; make it")
    if path.is_dir():
        raise MobileVlaError(f"{path} is a folder, expected a file to write; give it another name")
    for each in inputs:
        if each is not None and _reads(each, path):
            raise MobileVlaError(f"{path} would overwrite what is read from {each}, expected another file; choose one")
    if force is None:
        _check_kind(path, kind)
    elif not force:
        check_absent(path)
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise MobileVlaError(f"{path} can't be written ({error.strerror}); choose another place") from error


def check_absent(*paths: Path) -> None:
    """Raise MobileVlaError where one of the files or folders exists."""
    for path in paths:
        if os.path.lexists(path):
            raise MobileVlaError(f"{path} exists already, expected a new one; choose another name or give --force")


def _check_kind(path: Path, kind: OutputKind) -> None:
    """Raise MobileVlaError where a file exists that a report of this kind must not replace."""
    if not os.path.lexists(path):
        return
    if path.exists() and not path.is_file():
        raise MobileVlaError(f"{path} is no regular file, expected one to write; choose another name")
    if path.name.endswith(SETTINGS_FILE):
        raise MobileVlaError(f"{path} has the settings of a checkpoint, expected another file; choose another name")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise MobileVlaError(f"{path} exists, but can't be read ({error.strerror}); choose another name") from error
    if head and not kind.begins.match(head):
        raise MobileVlaError(
            f"{path} exists and is no {kind.name}, expected a new file or a former {kind.name}; choose another name"
        )


def _reads(source: Path, path: Path) -> bool:
    """Return whether a file that exists is read where `source` is."""
    if not path.exists():
        return False
    parents = path.resolve().parents
    processors = [place.resolve() for place in processor_places(source)]
    return (
        any(_same(path, each) for each in (source, settings_path(source)))
        or _same(path.absolute().parent, source)
        or any(place in parents for place in processors)
    )


def _same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False  # it isn't there, or its name is longer than a file can have


def _number(text: str) -> float:
    """Return a finite number, or NaN."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
