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
            cli.make_parser(arguments[0]).parse_args(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_other_command_is_one_that_a_robot_has_or_that_is_here(page):
    of_a_robot = {"ros2", "docker", "sudo", "colcon", "rosdep", "rqt", "rviz2", "apt"}
    of_a_shell = {"cd", "source", "export", "pip", "uv", "python", "kill", "rm", "echo", "eval"}
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


#: Commands that no test runs as written -> why, or which test runs the like.
REASONS = {
    r"(CONFIG=.*)?(ros2|colcon|rqt|rviz2) ": "needs a sourced ROS 2; the interfaces have tests of their own",
    r"CONFIG=|sudo apt |docker |pip install|uv pip|cd requirements": "needs a system, or a network, to install from",
    r"scripts/test|source \.venv": "is how this test is run",
    r"scripts/demo": "test_demo.py",
    r"scripts/pictures": "writes into docs/images, needs Chromium",
    r"eval ": "asks the shell; test_cli.py",
    r"mobile_vla replay .*--rerun": "needs an extra; test_rerun_recording.py",
    r"scripts/jetson_check": "test_jetson_check.py",
    r"mobile_vla bench (load|step) .*full": "needs the published size; test_bench_load.py, test_bench_step.py",
    r"mobile_vla bench (step|node)": "takes minutes; test_bench_step.py, test_bench_node.py",
    r"mobile_vla drill( |$)(?!--only|--list)": "takes minutes, or needs a robot; test_drill.py",
    r"mobile_vla record ": "runs until Ctrl-C; test_play_record.py",
    r"mobile_vla replay .*(--node|--steps node)": "takes as long as the drive; test_replay.py",
    r"mobile_vla drive ": "takes minutes; test_drive.py",
    r"mobile_vla (train|convert small\.pth|make-episodes) ?": "trains for minutes; test_train.py",
    r"mobile_vla console": "waits for a person; test_console.py",
    r"mobile_vla (play|health)": "needs a graph; test_play_record.py, test_health.py",
}


def is_run(command: str) -> bool:
    return not any(re.match(reason, command) for reason in REASONS)


def run_in_shell(commands: list[str], folder: Path) -> None:
    """Run commands in one shell, with this test's environment in the place of .venv."""
    shell = f'mobile_vla() {{ "{sys.executable}" -m mobile_vla_inference "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shell + "\n".join(commands)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def workplace(tiny_checkpoint, tmp_path_factory) -> Path:
    """Return a folder with what the pages take for granted: policy.pth, CK, CK2, images, and drive, a bag."""
    import cv2
    import numpy as np

    from mobile_vla_inference.policy.storage.settings_file import settings_path

    folder = tmp_path_factory.mktemp("workplace")
    for end in (".pth", ".processors"):
        (folder / f"policy{end}").symlink_to(tiny_checkpoint.with_suffix(end))
    (folder / "policy.pth.policy.json").write_text(settings_path(tiny_checkpoint).read_text())
    images = folder / "frames" / "images"
    images.mkdir(parents=True)
    rows = ["frame,stamp_s,image,steering,throttle"]
    for index in range(12):
        picture = np.random.default_rng(index).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(images / f"{index:04d}.png"), picture)
        rows.append(f"{index},{index / 10},images/{index:04d}.png,{index / 20 - 0.3},0.5")
    (folder / "frames" / "actions.csv").write_text("\n".join(rows) + "\n")
    (folder / "images").symlink_to(images)
    run_in_shell(
        [
            "mobile_vla convert policy.pth CK",
            "mobile_vla convert policy.pth CK2 --dtype float32",
            "mobile_vla make-bag frames drive",
        ],
        folder,
    )
    return folder


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if not page.name.startswith("quickstart") and any(map(is_run, commands(page)))],
    ids=lambda page: page.name,
)
def test_the_commands_of_a_page_work_as_written(page, workplace, tmp_path):
    for path in workplace.iterdir():
        (tmp_path / path.name).symlink_to(path)
    run_in_shell(list(filter(is_run, commands(page))), tmp_path)


def test_the_laptop_guide_works_as_written(tmp_path):
    """The guide starts in an empty folder."""
    run_in_shell(list(filter(is_run, commands(REPOSITORY / "docs/quickstart_laptop.md"))), tmp_path)
