"""`mobile_vla`: one command with a subcommand per tool.

A tool is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status. Only the tool that is called
is imported, so the overview is quick and `demo` never loads torch.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from mobile_vla_inference import __version__
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.tools.parser import HelpFormatter, Parser, suggestion

PROGRAM = "mobile_vla"


class Tool(NamedTuple):
    """A subcommand.

    Attributes:
        module: its module in tools/.
        help: what it does, one line.
        group: its heading in the overview.
    """

    module: str
    help: str
    group: str


#: The headings of the overview, in order.
POLICY, DATA, ROBOT, SIMULATION, CHECKS = (
    "policy",
    "recorded data",
    "robot (ROS 2)",
    "simulation",
    "checks and benchmarks",
)
GROUPS = (POLICY, DATA, ROBOT, SIMULATION, CHECKS)

TOOLS = {
    "infer": Tool("infer", "run a checkpoint on a folder of images", POLICY),
    "console": Tool("console", "try a policy at a prompt: infer, benchmark, memory", POLICY),
    "inspect": Tool("inspect", "show a checkpoint's sizes, settings and memory needs", POLICY),
    "convert": Tool("convert", "convert a checkpoint to a folder that loads faster", POLICY),
    "train": Tool("train", "train on recorded episodes or in simulation", POLICY),
    "evaluate": Tool("evaluate", "evaluate a checkpoint on recorded HDF5 episodes", POLICY),
    "make-checkpoint": Tool("make_checkpoint", "make a checkpoint of random weights for tests", POLICY),
    "replay": Tool("replay", "run a checkpoint on a bag; compare with the recording", DATA),
    "make-bag": Tool("make_bag", "make a bag from images and an actions.csv", DATA),
    "bag-to-episodes": Tool("bag_to_episodes", "make HDF5 episodes from a bag", DATA),
    "episodes-to-bag": Tool("episodes_to_bag", "make bags from HDF5 episodes", DATA),
    "record": Tool("record", "record images, instruction, cmd_vel, diagnostics to a bag", ROBOT),
    "play": Tool("play", "publish a bag on the ROS graph, with /clock", ROBOT),
    "health": Tool("health", "check whether a running vla_node is healthy", ROBOT),
    "demo": Tool("demo", "drive a simulated robot with the real node", SIMULATION),
    "drive": Tool("drive", "evaluate a policy in simulation: success rate by scenario", SIMULATION),
    "make-episodes": Tool("make_episodes", "record simulated episodes labelled with expert actions", SIMULATION),
    "verify": Tool("verify", "check the files of a converted folder by their hashes", CHECKS),
    "budget": Tool("budget", "check whether a policy fits the memory of a board", CHECKS),
    "bench": Tool("bench.command", "measure loading, a step, the running node, the stop", CHECKS),
    "drill": Tool("drill.command", "inject every fault into a running node; time the stop", CHECKS),
}

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

#: Errors of a disk that is full, of a user's quota, and of a limit on the size of a file.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; `arguments` are like sys.argv[1:], the default.

    Returns:
        The subcommand's status; 2, with one line on stderr, for an error that a user can correct or a full disk; 130
        after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except MobileVlaError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno in _NO_SPACE:
            where = "" if error.filename is None else f" for {error.filename}"
            print(f"{PROGRAM}: error: the disk has no space left{where}; free some and run again", file=sys.stderr)
        elif not isinstance(error, BrokenPipeError):  # the reader of stdout has exited (`| head`)
            raise
        # Stdout may hold what can't be written: without this, the flush at exit would fail with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def make_parser(called: str | None) -> Parser:
    """Return the parser; of the subcommands, only the called one is imported and knows its arguments."""
    parser = Parser(
        prog=PROGRAM,
        description="Tools for a vision-language policy that drives a robot.",
        epilog=_overview(),
        formatter_class=_OverviewFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="show the version")
    # The overview lists the subcommands by group, which argparse can't do.
    subparsers = parser.add_subparsers(prog=PROGRAM, metavar="COMMAND", required=True, help="one of those below")
    for name, tool in TOOLS.items():
        subparser = subparsers.add_parser(name, description=_sentence(tool.help))
        if name == called:
            module = import_module(f"mobile_vla_inference.tools.{tool.module}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def _run(arguments: Sequence[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    called = next((word for word in arguments if not word.startswith("-")), None)
    parser = make_parser(called)
    if called is not None and called not in TOOLS:
        parser.error(f"unknown command {called or repr(called)}{suggestion(called, TOOLS)}")
    args = parser.parse_args(arguments)
    return args.run(args)


def _complete() -> None:
    """Answer a shell that asks for completions, and exit; see argcomplete."""
    import argcomplete

    words = os.environ["COMP_LINE"].split()
    argcomplete.autocomplete(make_parser(next((word for word in words if word in TOOLS), None)))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}".rstrip(".") + "."


class _OverviewFormatter(HelpFormatter):
    """Keeps the lines of the overview."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(f"{indent}{line}" for line in text.splitlines())


def _overview() -> str:
    """Return the subcommands by group, a line for each."""
    width = max(map(len, TOOLS)) + 2
    lines = []
    for group in dict.fromkeys([*GROUPS, *(tool.group for tool in TOOLS.values())]):
        own = {name: tool for name, tool in TOOLS.items() if tool.group == group}
        if own:
            lines += [f"{group}:", *(f"  {name:<{width}}{tool.help}" for name, tool in own.items()), ""]
    return "\n".join([*lines, f"See {PROGRAM} COMMAND --help for the options of a command."])
