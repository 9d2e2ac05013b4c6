"""`mobile_vla console`: try a policy image by image: infer, benchmark, continuous, memory, clear and more.

On a terminal there is a prompt with history and completion; Ctrl-C stops a command, Ctrl-D exits. Commands can also
be piped, one a line; the exit status is then 2 if one of them failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_vla_inference.errors import InstructionError, MobileVlaError
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.replay.timing import percentiles_ms
from mobile_vla_inference.tools.arguments import (
    DEFAULT_INSTRUCTION,
    SMALL_POLICY,
    add_loading_arguments,
    instruction,
)
from mobile_vla_inference.tools.console_session import (
    ConsoleSession,
    Frames,
    Inference,
    MemoryFigures,
    open_frames,
)
from mobile_vla_inference.tools.loading import load_policy
from mobile_vla_inference.tools.parser import suggestion
from mobile_vla_inference.tools.progress import progress_bar
from mobile_vla_inference.tools.results import warn

_BENCHMARK_STEPS = 50
_PROMPT = "mobile_vla> "
_FAILED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=SMALL_POLICY,
        metavar="CK",
        help="checkpoint file or folder (default: the bundled small policy)",
    )
    parser.add_argument(
        "--frames",
        metavar="DIR|BAG|N",
        help="folder of images, bag, or number of a camera (default: a simulated camera)",
    )
    parser.add_argument(
        "--instruction",
        type=instruction,
        default=DEFAULT_INSTRUCTION,
        metavar="TEXT",
        help="what the robot is instructed to do",
    )
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer commands until there are no more; return the exit status."""
    console = Console(soft_wrap=True, highlight=False)
    frames = open_frames(args.frames)
    try:
        commands = Commands(_start(args, console, frames), console)
        if sys.stdin.isatty():
            _converse(commands)
            return 0
        return _read_all(commands, sys.stdin)
    finally:
        frames.close()


def _start(args: argparse.Namespace, console: Console, frames: Frames) -> ConsoleSession:
    policy = load_policy(args, args.checkpoint)
    policy.warm_up()
    session = ConsoleSession(policy, frames, args.instruction)
    warn(*policy.describe().warnings)
    name = "the bundled small policy" if args.checkpoint == SMALL_POLICY else str(args.checkpoint)
    console.print(f"{escape(name)} on {escape(frames.title)}; [bold]help[/] lists the commands")
    return session


class QuitRequest(Exception):  # noqa: N818
    """The user wants to exit."""


@dataclass(frozen=True)
class _Command:
    call: Callable[[str], None]
    arguments: str
    summary: str


class Commands:
    """The commands of the console by name, each answered on a rich console."""

    def __init__(self, session: ConsoleSession, console: Console) -> None:
        self._session = session
        self._console = console
        self.table = {
            "infer": _Command(self._infer, "", "run one step on the current image; the LSTM state is kept"),
            "benchmark": _Command(self._benchmark, "[n]", f"time n steps (default {_BENCHMARK_STEPS})"),
            "continuous": _Command(
                self._continuous, "[n]", "run a step on each next image at the step period, until Ctrl-C or for n steps"
            ),
            "memory": _Command(self._memory, "", "memory of the process, the system and the GPU"),
            "clear": _Command(self._clear, "", "free unused memory and show how much"),
            "reset": _Command(self._reset, "", "reset the LSTM state"),
            "instruction": _Command(self._instruction, "[TEXT]", "set the instruction, or show it"),
            "frame": _Command(self._frame, "[next|N|PATH]", "select the current image, or show its name"),
            "info": _Command(self._info, "", "show what is loaded"),
            "help": _Command(self._help, "", "show this list"),
            "quit": _Command(self._quit, "", "exit, as Ctrl-D does"),
        }

    def answer(self, line: str) -> bool:
        """Run a line's command; return whether it succeeded; raise QuitRequest if the user wants to exit."""
        name, _, rest = line.strip().partition(" ")
        if not name or name.startswith("#"):
            return True
        try:
            command = self.table.get(name)
            if command is None:
                raise MobileVlaError(f"unknown command {name}{suggestion(name, self.table)}; help lists the commands")
            if rest.strip() and not command.arguments:
                raise MobileVlaError(f"{name} takes no argument, found {rest.strip()!r}; leave it out")
            command.call(rest.strip())
        except MobileVlaError as error:
            self._console.print(f"[red]error:[/] {escape(str(error))}")
            return False
        return True

    def interrupted(self) -> None:
        """Print that Ctrl-C has stopped a command."""
        self._console.print("stopped")

    def _infer(self, _: str) -> None:
        self._print_step(self._session.infer())

    def _print_step(self, result: Inference) -> None:
        action = " ".join(f"{value:+.3f}" for value in result.action)
        x, y, z = result.velocity.values
        self._console.print(
            f"{escape(result.frame)}: action [bold]{action}[/] (normalised), velocity x {x:+.3f} y {y:+.3f} m/s, "
            f"z {z:+.3f} rad/s, {result.step_s * 1000.0:.1f} ms, step {self._session.steps}"
        )

    def _benchmark(self, rest: str) -> None:
        count = _count(rest, _BENCHMARK_STEPS)
        samples_s: list[float] = []
        try:
            with progress_bar("benchmark", "step", count) as bar:
                for step_s in self._session.measure(count):
                    samples_s.append(step_s)
                    bar.update()
        finally:
            self._print_benchmark(samples_s, count)

    def _print_benchmark(self, samples_s: list[float], count: int) -> None:
        if not samples_s:
            return
        figures = percentiles_ms(samples_s)
        table = Table("steps", *figures, "rate", box=None)
        cells = (f"{value:.2f} ms" for value in figures.values())
        table.add_row(f"{len(samples_s)} of {count}", *cells, f"{1000.0 / figures['mean']:.1f} /s")
        self._console.print(table)

    def _continuous(self, rest: str) -> None:
        if not rest and not sys.stdin.isatty():
            raise MobileVlaError(
                "continuous has no end in a pipe, expected a number of steps; give one, such as continuous 10"
            )
        limit = _count(rest, 0) or None
        period_s = self._session.policy.settings.step_period_s
        self._console.print(f"a step every {period_s:g} s" + ("; Ctrl-C stops it" if limit is None else ""))
        due_s = time.monotonic()
        done = 0
        while True:
            self._print_step(self._session.infer())
            done += 1
            if done == limit:
                return
            self._session.next_frame()
            due_s = max(due_s + period_s, time.monotonic())
            time.sleep(max(0.0, due_s - time.monotonic()))

    def _memory(self, _: str) -> None:
        figures = self._session.memory()
        table = Table("memory", box=None)
        table.add_column("MiB", justify="right")
        for name, value in _memory_rows(figures):
            table.add_row(name, f"{value:,.0f}")
        self._console.print(table)
        if figures.gpu_allocated_mib is None:
            self._console.print("no GPU")

    def _clear(self, _: str) -> None:
        before, after = self._session.clear()
        table = Table("memory", box=None)
        for column in ("before", "after", "freed"):
            table.add_column(f"{column} (MiB)", justify="right")
        table.add_row(*_freed_row("process", before.process_mib, after.process_mib))
        if before.gpu_reserved_mib is not None and after.gpu_reserved_mib is not None:
            table.add_row(*_freed_row("GPU, reserved", before.gpu_reserved_mib, after.gpu_reserved_mib))
        self._console.print(table)

    def _reset(self, _: str) -> None:
        self._session.reset()
        self._console.print("the LSTM state is reset")

    def _instruction(self, rest: str) -> None:
        if rest:
            text = check_instruction(rest)
            if not text:
                raise InstructionError(
                    "the instruction is empty, expected a sentence such as 'go to the cup'; give one"
                )
            self._session.set_instruction(text)
        self._console.print(f"instruction: {escape(self._session.instruction)}")

    def _frame(self, rest: str) -> None:
        if rest == "next":
            self._session.next_frame()
        elif rest.isascii() and rest.isdigit():
            self._session.show_frame(int(rest))
        elif rest:
            self._session.show_file(Path(rest).expanduser())
        width, height = self._session.frame_size_px
        self._console.print(f"image: {escape(self._session.frame_name)}, {width} x {height} px")

    def _info(self, _: str) -> None:
        table = Table("fact", box=None)
        table.add_column("value", overflow="fold")
        facts = {
            **self._session.policy.describe().to_json(),
            "images": self._session.frames.title,
            "image": self._session.frame_name,
            "instruction": self._session.instruction,
            "steps since the last reset": self._session.steps,
        }
        for name, value in facts.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(name.replace("_", " "), escape(shown or "-"))
        self._console.print(table)

    def _help(self, _: str) -> None:
        table = Table("command", "what it does", box=None)
        for name, command in self.table.items():
            table.add_row(escape(f"{name} {command.arguments}".strip()), command.summary)
        self._console.print(table)

    def _quit(self, _: str) -> None:
        raise QuitRequest


def _count(text: str, default: int) -> int:
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1_000_000):
        raise MobileVlaError(f"{text} is not a number of steps, expected 1 to 1000000; correct it")
    return int(text)


def _memory_rows(figures: MemoryFigures) -> list[tuple[str, float]]:
    rows = [
        ("process, resident", figures.process_mib),
        ("system, available", figures.system_available_mib),
        ("system, total", figures.system_total_mib),
    ]
    if figures.gpu_allocated_mib is not None:
        rows += [
            ("GPU, allocated by torch", figures.gpu_allocated_mib),
            ("GPU, reserved by torch", figures.gpu_reserved_mib),
            ("GPU, free", figures.gpu_free_mib),
            ("GPU, total", figures.gpu_total_mib),
        ]
    return rows


def _freed_row(name: str, before_mib: float, after_mib: float) -> tuple[str, ...]:
    return name, *(f"{value:,.1f}" for value in (before_mib, after_mib, before_mib - after_mib))


# ---- where the lines come from ---------------------------------------------------------------------------------------


def _read_all(commands: Commands, lines: Iterable[str]) -> int:
    """Run the commands of a pipe, line by line."""
    done = True
    try:
        for line in lines:
            done = commands.answer(line) and done
    except QuitRequest:
        pass
    return 0 if done else _FAILED


def _converse(commands: Commands) -> None:
    """Prompt on the terminal until the user exits."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter

    nested = NestedCompleter.from_nested_dict(dict.fromkeys(commands.table))
    nested.options["frame"] = PathCompleter(expanduser=True)
    session: PromptSession[str] = PromptSession(history=_history(), completer=nested)
    while True:
        try:
            line = session.prompt(_PROMPT)
        except KeyboardInterrupt:
            continue  # as in a shell: the line is dropped
        except EOFError:
            return
        try:
            commands.answer(line)
        except KeyboardInterrupt:
            commands.interrupted()
        except QuitRequest:
            return


def _history():
    """Return the history, kept in a file of the user's state folder; in memory only if that can't be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    file = base / "mobile_vla" / "console_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a", encoding="utf-8").close()
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))
