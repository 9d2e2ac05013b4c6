"""Plain English: retired words (the glossary in docs/contributing.md) are in no help text and on no page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from all_parsers import arguments_of, help_of, parsers_of

from mobile_vla_inference.tools import cli

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
GLOSSARY = "## Glossary"

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
    r"(?<![,'])misled": "wrong instruction",  # spared: a value of `drive --driver`
    r"let_in|let_out": "input_gate, output_gate",
    r"farewell": "the final zero",
    r"rooms?(?! from above|, the doorway)": "package",
    r"border": "boundary",
    r"com(e|es|ing) along": "bundled, included",
    r"from nothing": "from scratch",
    r"units? of the policy": "normalised",
    r"for machines": "JSON",
    r"(?<!there )(is|are) no": "is not a",
    r"round(?= (a|an|the|it|its)\b)|round about": "around, for",  # spared: a round of training
    r"the same again": "the same",
    r"hears?|heard|deaf": "receive, received",
    r"(node|process|worker|publisher|launch)s? leaves?(?! out)|leave the process": "exit",
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


def prose_of(page: Path) -> list[str]:
    """Return the lines of a page without code, link targets, images' paths, and the glossary itself."""
    text = page.read_text().partition(GLOSSARY)[0]
    text = re.sub(r"```.*?```|`[^`]*`|<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text).splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_a_retired_word(page):
    found = [finding for line in prose_of(page) for finding in findings(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name.endswith(".ko.md")], ids=lambda page: page.name)
def test_no_korean_page_has_a_retired_word(page):
    assert "적재" not in page.read_text()


def test_the_glossary_is_there():
    assert GLOSSARY in (REPOSITORY / "docs/contributing.md").read_text()


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
