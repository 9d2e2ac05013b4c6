"""Options that several subcommands share, the types of their values, and the check of what a subcommand writes."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mobile_vla_inference.episodes.frames_folder import FULL_ANGULAR_RADPS, FULL_LINEAR_MPS
from mobile_vla_inference.errors import InstructionError, MobileVlaError
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.policy.storage.checkpoint_files import SETTINGS_FILE, processor_places, settings_path
from mobile_vla_inference.policy_facts import DEVICES, DTYPES, ENGINES

#: The policy that is part of the package.
SMALL_POLICY = Path(__file__).resolve().parent.parent / "data" / "small_policy"

#: The instruction if none is given: the simulated world has boxes and a cup.
DEFAULT_INSTRUCTION = "go around the box on the left to the cup"

#: Step period of the published policy, seconds: the default if neither a recording nor an option gives one.
STEP_PERIOD_S = 0.3

_HEAD_BYTES = 64


@dataclass(frozen=True)
class OutputKind:
    """A kind of report: its name in sentences, and the first bytes of such a file."""

    name: str
    begins: re.Pattern[bytes]


JSON_OUTPUT = OutputKind("JSON file", re.compile(rb"(\xef\xbb\xbf)?\s*[\[{]"))
HTML_OUTPUT = OutputKind("HTML file", re.compile(rb"(\xef\xbb\xbf)?\s*<"))
RERUN_OUTPUT = OutputKind("Rerun recording", re.compile(rb"RRF"))
VIDEO_OUTPUT = OutputKind("MP4 video", re.compile(rb"....ftyp", re.DOTALL))


# ---- types of values -------------------------------------------------------------------------------------------------


def positive_number(text: str) -> float:
    """Return a finite number above 0."""
    return _number(text, lambda value: value > 0.0, "a number above 0")


def non_negative_number(text: str) -> float:
    """Return a finite number, 0 or more."""
    return _number(text, lambda value: value >= 0.0, "a number, 0 or more")


def time_s(text: str) -> float:
    """Return a finite number of seconds, 0 or more."""
    return _number(text, lambda value: value >= 0.0, "a time in seconds, 0 or more")


def share(text: str) -> float:
    """Return a number from 0 to 1."""
    return _number(text, lambda value: 0.0 <= value <= 1.0, "a share from 0 to 1")


def count(text: str) -> int:
    """Return a whole number above 0."""
    return _whole(text, 1, "a whole number above 0")


def whole_number(text: str) -> int:
    """Return a whole number, 0 or more."""
    return _whole(text, 0, "a whole number, 0 or more")


def instruction(text: str) -> str:
    """Return an instruction in its one form (instructions.py).

    Raises:
        InstructionError: it is empty, too long or not plain text.
    """
    checked = check_instruction(text)
    if not checked:
        raise InstructionError("--instruction is empty, expected a sentence such as 'go to the cup'; give one")
    return checked


def _number(text: str, fits: Callable[[float], bool], expected: str) -> float:
    """Return a finite number that fits, or have argparse report what was expected."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and fits(value)):
        raise argparse.ArgumentTypeError(f"{text} is not {expected}")
    return value


def _whole(text: str, least: int, expected: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text} is not {expected}")
    return int(text)


# ---- options ---------------------------------------------------------------------------------------------------------


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--checkpoint`, required."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CK", help="checkpoint file or folder")


def add_instruction_argument(parser: argparse.ArgumentParser, default: str = "as recorded") -> None:
    """Declare `--instruction` in place of a recorded one."""
    parser.add_argument(
        "--instruction", type=instruction, metavar="TEXT", help=f"instruction to use (default: {default})"
    )


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how a policy is loaded and where it runs; read by `load_policy` and `node_loading_parameters`."""
    parser.add_argument("--device", choices=DEVICES, default="auto", help="device to run on; auto: cuda if available")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="data type of the weights; auto: float32 on cpu, float16 on cuda",
    )
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto", help="how a step is computed; auto: the fastest on the device"
    )
    add_processors_argument(parser)
    parser.add_argument("--force", action="store_true", help="load even if memory seems too small")


def node_loading_parameters(args: argparse.Namespace) -> dict[str, str | bool]:
    """Return the options of `add_loading_arguments` as parameters of vla_node."""
    parameters = {"device": args.device, "dtype": args.dtype, "engine": args.engine, "force_load": args.force}
    return parameters if args.processors is None else {**parameters, "processors": str(args.processors.resolve())}


def add_processors_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--processors`, the folder with the two tokenizers."""
    parser.add_argument(
        "--processors", type=Path, metavar="DIR", help="folder with the tokenizers (default: next to the checkpoint)"
    )


def add_json_argument(parser: argparse.ArgumentParser, content: str = "results") -> None:
    """Declare `--json`; `content` says what is written."""
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write the {content} as JSON")


def add_topic_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which topics of a bag are read."""
    parser.add_argument("--image-topic", metavar="TOPIC", help="image topic (default: the only one)")
    parser.add_argument(
        "--command-topic", metavar="TOPIC", help="topic of recorded velocities (default: cmd_vel, or the only one)"
    )


def add_period_argument(parser: argparse.ArgumentParser, default: float | None = STEP_PERIOD_S) -> None:
    """Declare `--period`, the time from one step of an episode to the next; None: the episodes give the default."""
    missing = " (default: as recorded in the episodes)" if default is None else ""
    parser.add_argument(
        "--period", type=positive_number, default=default, metavar="S", help=f"time between steps, seconds{missing}"
    )


def add_full_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the speeds that full throttle and full steering of an actions.csv mean; `full_speeds` reads them."""
    parser.add_argument(
        "--max-linear-mps",
        type=positive_number,
        metavar="M/S",
        help=f"linear.x at full throttle of actions.csv, m/s (default: {FULL_LINEAR_MPS:g})",
    )
    parser.add_argument(
        "--max-angular-radps",
        type=positive_number,
        metavar="RAD/S",
        help=f"angular.z at full steering to the left of actions.csv, rad/s (default: {FULL_ANGULAR_RADPS:g})",
    )


def full_speeds(args: argparse.Namespace) -> tuple[float, float]:
    """Return m/s at full throttle and rad/s at full steering."""
    return args.max_linear_mps or FULL_LINEAR_MPS, args.max_angular_radps or FULL_ANGULAR_RADPS


# ---- what is written -------------------------------------------------------------------------------------------------


def check_output(
    path: Path | None, *inputs: Path | None, kind: OutputKind = JSON_OUTPUT, force: bool | None = None
) -> None:
    """Raise MobileVlaError if an output can't be written, or would replace a file that must be kept.

    Call it before the work: a long run must not end without its results. Inputs are never overwritten: neither the
    files of an input folder, nor the settings and processors of a checkpoint.

    Args:
        path: the file to write; None: nothing is written.
        inputs: files and folders that are read.
        kind: of a report; an existing file is replaced only if it is empty or begins as this kind does.
        force: for data, which no report replaces: whether an existing file of any kind is replaced; None: a report.
    """
    if path is None:
        return
    try:
        if not path.absolute().parent.is_dir():
            raise MobileVlaError(f"{path.parent} is not a folder, expected one to write {path.name} to; create it")
        with contextlib.suppress(FileNotFoundError):
            path.lstat()
    except OSError as error:  # such as a name that is too long
        raise MobileVlaError(f"{path} can't be written ({error.strerror}); choose another name") from error
    if path.is_dir():
        raise MobileVlaError(f"{path} is a folder, expected a file to write; give it another name")
    for each in inputs:
        if each is not None and _reads(each, path):
            raise MobileVlaError(f"{path} would overwrite the input {each}, expected another file; choose another name")
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
    """Raise MobileVlaError if one of the files or folders exists."""
    for path in paths:
        if os.path.lexists(path):
            raise MobileVlaError(f"{path} already exists, expected a new one; choose another name or give --force")


def check_distinct(*outputs: Path | None) -> None:
    """Raise MobileVlaError if two outputs are the same file; None is an output that is not wanted."""
    given = [path for path in outputs if path is not None]
    for index, path in enumerate(given):
        if path.resolve() in [other.resolve() for other in given[:index]]:
            raise MobileVlaError(f"{path} is given for two outputs, expected a file for each; choose another name")


def _check_kind(path: Path, kind: OutputKind) -> None:
    """Raise MobileVlaError if a file exists that a report of this kind must not replace."""
    if not os.path.lexists(path):
        return
    if path.exists() and not path.is_file():
        raise MobileVlaError(f"{path} is not a regular file, expected one; choose another name")
    if path.name.endswith(SETTINGS_FILE):
        raise MobileVlaError(
            f"{path} contains the settings of a checkpoint, expected another file; choose another name"
        )
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise MobileVlaError(f"{path} exists, but can't be read ({error.strerror}); choose another name") from error
    if head and not kind.begins.match(head):
        raise MobileVlaError(
            f"{path} exists and is not a {kind.name}, expected a new file or an old {kind.name}; choose another name"
        )


def _reads(source: Path, path: Path) -> bool:
    """Return whether `path` exists and is one of the files that are read with `source`."""
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
        return False  # one doesn't exist, or its name is too long for a file
