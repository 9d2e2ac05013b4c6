"""The argument parser of all subcommands: help with defaults, and one sentence with the nearest match for a typo."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

EXIT_USAGE = 2

#: More choices than this are listed in the help text, not in the usage line.
_SHORT_LIST = 6
#: How argparse words an error about one argument, and a choice that doesn't exist (the quotes depend on its version).
_ABOUT_ARGUMENT = re.compile(r"argument (?P<name>[^:]+): (?P<fault>.*)", re.DOTALL)
_INVALID_CHOICE = re.compile(
    r"invalid choice: (?P<found>.*?)(?:, maybe .*)? \(choose from (?P<choices>.*)\)", re.DOTALL
)
_INVALID_VALUE = re.compile(r"invalid (?P<type>\w+) value: (?P<found>.*)", re.DOTALL)
_UNKNOWN = "unrecognized arguments: "
_MISSING = "the following arguments are required: "
_ONE_REQUIRED = re.compile(r"one of the arguments (?P<names>.*) is required")
_EXCLUSIVE = "not allowed with argument "
_NO_VALUE = "expected one argument"
_TYPES = {"int": "a whole number", "float": "a number"}


class HelpFormatter(argparse.HelpFormatter):
    """Adds to each help text the default and long lists of choices, unless the text names the default itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.choices is not None and action.metavar is None and len(tuple(action.choices)) > _SHORT_LIST:
            text += f"; one of {', '.join(map(str, action.choices))}"
        if _is_plain(action.default) and action.option_strings and "default" not in text:
            text += f" (default: {'%(default)g' if isinstance(action.default, float) else '%(default)s'})"
        return text

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if action.choices is not None and action.metavar is None and len(tuple(action.choices)) > _SHORT_LIST:
            return lambda count: (default_metavar,) * count
        return super()._metavar_formatter(action, default_metavar)


def _is_plain(default: Any) -> bool:
    """Return whether a default is a number or a text; True and False need no words, other values need their own."""
    return isinstance(default, (str, int, float)) and not isinstance(default, bool) and default != argparse.SUPPRESS


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and whose paths can begin with `~`, which no shell expands in `--x=~`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)
        self.register("type", Path, _path)
        self._words: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse as argparse does; words that no subcommand takes are an error of the subcommand that got them."""
        self._words = list(args or ())
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(_UNKNOWN + " ".join(unknown))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print one sentence about wrong usage, with the nearest match of a typo, and exit with status 2."""
        sentence = self._sentence(message)
        see = " See" if sentence.endswith("?") else "; see"
        self.exit(EXIT_USAGE, f"{self.prog.split()[0]}: error: {sentence}{see} {self.prog} --help\n")

    def _sentence(self, message: str) -> str:
        """Word an error of argparse as the errors of this package."""
        misspelt = next(filter(self._is_unknown_option, self._own_words()), None)
        if misspelt is not None:
            option = misspelt.partition("=")[0]
            return f"unknown option {option}{suggestion(option, self._option_string_actions)}"
        if message.startswith(_UNKNOWN):
            return f"unexpected argument {message.removeprefix(_UNKNOWN)}"
        if message.startswith(_MISSING):
            return f"missing {message.removeprefix(_MISSING)}"
        if (group := _ONE_REQUIRED.fullmatch(message)) is not None:
            return f"missing one of {', '.join(group['names'].split())}"
        about = _ABOUT_ARGUMENT.fullmatch(message)
        if about is None:
            return message
        name, fault = about["name"].split("/")[-1], about["fault"]
        if (choice := _INVALID_CHOICE.fullmatch(fault)) is not None:
            choices = re.sub("['\"]", "", choice["choices"]).split(", ")
            found = choice["found"].strip("'\"")
            return f"{name} is {found}, expected one of {', '.join(choices)}{suggestion(found, choices)}"
        if fault.startswith(_EXCLUSIVE):
            return f"{fault.removeprefix(_EXCLUSIVE)} and {name} are both given, expected one of them"
        if (value := _INVALID_VALUE.fullmatch(fault)) is not None:
            return f"{name} is {value['found']}, expected {_TYPES.get(value['type'], value['type'])}"
        if fault == _NO_VALUE and name.startswith("-") and self._is_followed_by_an_option(name):
            return f"{name} has no value, expected one; write {name}=VALUE if it begins with -"
        return f"{name}: {fault}"

    def _is_followed_by_an_option(self, option: str) -> bool:
        """Return whether the word after an option begins with `-`, which argparse takes for another option."""
        return any(word == option and after.startswith("-") for word, after in zip(self._words, self._words[1:]))

    def _own_words(self) -> Iterator[str]:
        """Return the words that can be options of this parser: none after `--`, none of a subcommand."""
        words = takewhile(lambda word: word != "--", self._words)
        return takewhile(lambda word: word.startswith("-"), words) if self._subparsers is not None else words

    def _is_unknown_option(self, word: str) -> bool:
        """Return whether argparse takes a word for an option that doesn't exist; a beginning of one's name does."""
        name = word.partition("=")[0]
        is_option = name.startswith("--") and len(name) > 2 and " " not in word
        return is_option and not any(option.startswith(name) for option in self._option_string_actions)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the nearest of the known words; empty if none is near."""
    nearest = get_close_matches(word, [*known], n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody, who has no home folder here
        raise argparse.ArgumentTypeError(f"{text} begins with a home folder that does not exist: {error}") from error
