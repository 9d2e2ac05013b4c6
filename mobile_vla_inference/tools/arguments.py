"""Command-line arguments, their types and their checks, that several subcommands share."""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from mobile_vla_inference.bags.frames_folder import FULL_ANGULAR_RADPS, FULL_LINEAR_MPS
from mobile_vla_inference.border import MobileVlaError

#: The published policy's period, for whom nothing else tells one.
STEP_PERIOD_S = 0.3


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


def check_output(path: Path | None, *inputs: Path | None) -> None:
    """Raise MobileVlaError where a file that is asked for can't be written, or would overwrite one of the inputs.

    An input that is a folder counts with the files in it. Asked before the work, so that no long run ends in vain.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise MobileVlaError(f"{path.parent} is not a folder, expected one to write {path.name} to; make it")
    if path.is_dir():
        raise MobileVlaError(f"{path} is a folder, expected a file to write; give it another name")
    for each in inputs:
        if each is not None and path.exists() and (_same(path, each) or _same(path.absolute().parent, each)):
            raise MobileVlaError(f"{path} would overwrite what is read from {each}, expected another file; choose one")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise MobileVlaError(f"{path} can't be written ({error.strerror}); choose another place") from error


def _same(path: Path, other: Path) -> bool:
    return other.exists() and path.samefile(other)


def _number(text: str) -> float:
    """Return a finite number, or NaN."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
