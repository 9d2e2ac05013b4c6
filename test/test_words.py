"""Plain English: words that were retired stand in no help text of any subcommand."""

from __future__ import annotations

import re

import pytest
from all_parsers import arguments_of, help_of, parsers_of

from mobile_vla_inference.tools import cli

#: Retired word (a regular expression that spares honest uses) -> what to write instead.
RETIRED = {
    r"tells?|told": "give, contain, report, show, state; of a robot: instruct",
    r"beside": "next to; besides",
    r"by lot": "random",
    r"lessons?": "episode, training episode",
    r"expert's word": "expert action, label",
    r"sight": "auxiliary targets",
    r"family|members?": "architecture variant, checkpoint",
    r"(?<!of )courses?": "curriculum",
    r"cell's state|policy's state|the cell": "LSTM state",
    r"(?<!policy,)misled": "wrong instruction",  # spared: a value of `drive --driver`
    r"let_in|let_out": "input_gate, output_gate",
    r"farewell": "the final zero",
    r"rooms?": "package",
    r"border": "boundary",
    r"com(e|es|ing) along": "bundled, included",
    r"from nothing": "from scratch",
    r"units? of the policy": "normalised",
    r"for machines": "JSON",
    r"(is|are) no": "is not a",
    r"round(?= (a|an|the|it|its)\b)|round about": "around, for",  # spared: a round of training
    r"the same again": "the same",
    r"hears?|heard|deaf": "receive, received",
    r"leaves?(?! out)": "exit",
    r"for whom|by whom": "for which, by which",
    r"beyond doubt": "unambiguous",
    r"gradients go back": "backpropagation window",
    r"has(n't| not) seen": "validation",
    r"nobody trained": "untrained",
    r"what was done by a person|what a person did": "recorded commands",
}


def findings(text: str) -> list[str]:
    """Return the retired words of a text, each with what to write instead."""
    found = []
    for pattern, use in RETIRED.items():
        match = re.search(rf"(?<![\w-])(?:{pattern})(?![\w-])", text, re.IGNORECASE)
        if match is not None:
            found.append(f"{match[0]!r} in {text!r}: write {use}")
    return found


@pytest.mark.parametrize("name", cli.TOOLS)
def test_no_help_has_a_retired_word(name):
    found = findings(cli.TOOLS[name].help)
    for command, parser in parsers_of(name).items():
        for text in (parser.description, *(help_of(parser, argument) for argument in arguments_of(parser))):
            found += [f"{command}: {finding}" for finding in findings(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "retired"),
    [
        ("what the robot was told", True),
        ("the side by lot", True),
        ("write everything to a file for machines", True),
        ("leave the process", True),
        ("leave out the first seconds", False),
        ("of course", False),
        ("of a course", True),
        ("rounds of the curriculum", False),
        ("tools round a policy", True),
        ("this is no number", True),
        ("there is nothing to do", False),
        ("{policy,misled,random,expert}", False),
        ("a cancelled wheel", False),
    ],
)
def test_honest_uses_are_spared(text, retired):
    assert bool(findings(text)) == retired
