"""The argument parsers of every subcommand, such as `drive` and `bench node`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mobile_vla_inference.tools import cli


def parsers_of(name: str) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of a subcommand by what a user types after `mobile_vla`."""
    top = cli.make_parser(name)
    (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return {parser.prog.partition(" ")[2]: parser for parser in _with_children(commands.choices[name])}


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the options and positional arguments of a parser."""
    return [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]


def help_of(parser: argparse.ArgumentParser, argument: argparse.Action) -> str:
    """Return the help text of an argument as a user sees it."""
    return parser._get_formatter()._expand_help(argument)


def _with_children(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _with_children(child)
