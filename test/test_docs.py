"""The documentation holds: links, named paths and subcommands exist, and the laptop guide works as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
MARK = "not run by a test:"

#: What follows `mobile_vla` in code.
_SUBCOMMAND = re.compile(r"mobile_vla ([a-z-]+)")


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_the_repository_that_is_named_exists(page):
    named = re.findall(
        r"`((?:config|docker|docs|launch|scripts|test|requirements|mobile_vla_inference)/[\w./-]*)", page.read_text()
    )
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_subcommand_that_is_named_exists(page):
    from mobile_vla_inference.tools.cli import TOOLS

    inline = " ".join(re.findall(r"`([^`\n]+)`", page.read_text()))
    blocks = " ".join(re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL))
    assert set(_SUBCOMMAND.findall(f"{inline} {blocks}")) <= set(TOOLS)


def commands(page: Path) -> list[str]:
    """Return the command lines of a page's bash blocks that are not marked, continued lines joined."""
    blocks = re.findall(r"(<!-- [^>]*-->\n)?```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    text = "".join(block for mark, block in blocks if MARK not in mark)
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_tools_has_arguments_that_exist(page):
    from mobile_vla_inference.tools import cli

    for line in commands(page):
        words = shlex.split(line, comments=True)
        if "mobile_vla" in words:
            arguments = words[words.index("mobile_vla") + 1 :]
            cli._parser(arguments[0]).parse_args(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_other_command_is_one_that_a_robot_has_or_that_is_here(page):
    of_a_robot = {"ros2", "docker", "sudo", "colcon", "rosdep", "rqt", "rviz2", "apt"}
    of_a_shell = {"cd", "source", "export", "pip", "uv", "python", "kill", "rm", "echo"}
    for line in commands(page):
        first = shlex.split(line, comments=True)[0]
        is_here = "/" in first and (REPOSITORY / first).exists()
        assert is_here or "=" in first or first in {"mobile_vla", *of_a_robot, *of_a_shell}, line


def test_the_korean_pages_have_the_commands_of_the_english_ones():
    for korean in (REPOSITORY / "docs").glob("*.ko.md"):
        english = korean.with_name(korean.name.replace(".ko.md", ".md"))
        wanted, found = (
            re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL) for page in (english, korean)
        )
        words = re.compile(r"\{data: '[^']*'\}")
        assert [words.sub("", block) for block in found] == [words.sub("", block) for block in wanted]


def test_the_laptop_guide_works_as_written(tmp_path):
    """Run its blocks in one shell, in an empty folder, with this test's environment in the place of .venv."""
    page = (REPOSITORY / "docs/quickstart_laptop.md").read_text()
    blocks = re.findall(r"(<!-- [^>]*-->\n)?```bash\n(.*?)```", page, flags=re.DOTALL)
    commands = "".join(block for mark, block in blocks if MARK not in mark)
    assert "scripts/demo" in commands
    # The demo has tests of its own and takes its time; the environment is there already.
    commands = commands.replace("scripts/demo\n", "").replace("source .venv/bin/activate\n", "")
    done = subprocess.run(
        [
            "bash",
            "-euo",
            "pipefail",
            "-c",
            f'mobile_vla() {{ "{sys.executable}" -m mobile_vla_inference "$@"; }}\n{commands}',
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
