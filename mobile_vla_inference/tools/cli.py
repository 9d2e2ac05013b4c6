"""`mobile_vla`: one command with a subcommand per tool.

A tool is a module with `HELP` (one line), `add_arguments(parser)` and `run(args) -> int`, the exit status. Only the
tool that is called is imported, so that the overview is quick and `demo` never loads torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mobile_vla_inference import __version__
from mobile_vla_inference.errors import MobileVlaError

#: Subcommand -> its module in tools/ and its line in the overview.
TOOLS = {
    "bag-to-episodes": ("bag_to_episodes", "make HDF5 episodes from a bag with images, instruction and cmd_vel"),
    "bench": ("bench.command", "measure loading, a policy step, the running node and how it stops"),
    "budget": ("budget", "tell whether a policy fits a board of 8 or 16 GB, item by item"),
    "console": ("console", "ask a policy by hand at a prompt: infer, benchmark, memory, ..."),
    "convert": ("convert", "convert a checkpoint to a folder that loads at once, in another number type"),
    "demo": ("demo", "drive a simulated robot, or on frames of yours, and show the figures"),
    "drill": ("drill.command", "inject every fault into a running node and time how it stops the robot"),
    "drive": ("drive", "let a policy drive in the simulated world, and count how often it does what it was told"),
    "episodes-to-bag": ("episodes_to_bag", "make bags from HDF5 episodes"),
    "evaluate": ("evaluate", "run a checkpoint over recorded HDF5 episodes, or find its settings by them"),
    "health": ("health", "tell whether a running vla_node is well, by its own diagnostics"),
    "infer": ("infer", "run a checkpoint over the images of a folder"),
    "inspect": ("inspect", "tell what a checkpoint holds, what it needs and what is assumed"),
    "make-bag": ("make_bag", "make a bag from a folder with images and what a person did"),
    "make-checkpoint": ("make_checkpoint", "write a synthetic checkpoint in the published layout"),
    "make-episodes": ("make_episodes", "record episodes of the simulated world, with the expert's word for every step"),
    "play": ("play", "publish a bag on the ROS graph, with /clock"),
    "record": ("record", "record images, instruction, cmd_vel and diagnostics to a bag"),
    "replay": ("replay", "run a checkpoint over a recorded drive and compare it with what was recorded"),
    "train": ("train", "train on recorded episodes, or on a course in the simulated world"),
    "verify": ("verify", "check every file of a converted folder by its hash"),
}

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; `arguments` are like sys.argv[1:], the default.

    Returns:
        The subcommand's status; 2, with one line on stderr, for what a user can put right; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except MobileVlaError as error:
        print(f"mobile_vla: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has left (`| head`): nothing more can be told, not even by the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def _complete() -> None:
    """Answer a shell that asks what could follow, and exit; see argcomplete."""
    import argcomplete

    words = os.environ["COMP_LINE"].split()
    argcomplete.autocomplete(_parser(next((word for word in words if word in TOOLS), None)))


def _run(arguments: Sequence[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    called = next((word for word in arguments if not word.startswith("-")), None)
    args = _parser(called).parse_args(arguments)
    return args.run(args)


class _Parser(argparse.ArgumentParser):
    """A parser, and its subparsers, that take `~` in a path for the home folder: no shell does after `--json=`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, _path)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody who has no home here
        raise argparse.ArgumentTypeError(f"{text} begins with a home folder that is not there: {error}") from error


def _parser(called: str | None) -> argparse.ArgumentParser:
    """Return the parser; of the subcommands, only the called one knows its arguments."""
    parser = _Parser(
        prog="mobile_vla", description="Tools round a policy that drives a robot by images and instructions."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)
    for name, (module, summary) in TOOLS.items():
        subparser = subparsers.add_parser(name, help=summary)
        if name == called:
            tool = import_module(f"mobile_vla_inference.tools.{module}")
            subparser.description = tool.HELP
            tool.add_arguments(subparser)
            subparser.set_defaults(run=tool.run)
    return parser
