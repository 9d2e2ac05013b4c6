"""The command line: help without torch, one sentence for errors and typos, quiet after Ctrl-C or a closed pipe."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from all_parsers import arguments_of, help_of, parsers_of

from mobile_vla_inference import __version__
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.tools import cli
from mobile_vla_inference.tools.arguments import SMALL_POLICY
from mobile_vla_inference.tools.progress import progress, progress_bar, stages

REPOSITORY = Path(__file__).resolve().parent.parent


def run_python(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60, **options
    )


@pytest.fixture
def tool(monkeypatch):
    """A subcommand of this test, `try`, whose `run` can be set."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--level", type=int, default=0, help="level")
        parser.add_argument("--mode", choices=("slow", "fast"), help="mode")
        parser.add_argument("--note", help="text")

    module = Namespace(run=lambda args: 0, add_arguments=add_arguments)
    monkeypatch.setattr(cli, "TOOLS", {"try": cli.Tool("try_tool", "try something", "tests")})
    monkeypatch.setitem(sys.modules, "mobile_vla_inference.tools.try_tool", module)
    return module


def test_the_overview_names_every_subcommand_without_loading_torch_or_rclpy():
    code = (
        "import sys\n"
        "from mobile_vla_inference.tools.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "finally:\n"
        "    print(sorted({'torch', 'rclpy'} & set(sys.modules)))\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("[]\n")
    groups = re.findall(r"^(\S.*):\n((?:  .*\n)+)", result.stdout, re.MULTILINE)
    shown = {title: re.findall(r"^  (\S+)  +\S", lines, re.MULTILINE) for title, lines in groups}
    for group in cli.GROUPS:
        assert shown[group] == [name for name, tool in cli.TOOLS.items() if tool.group == group]
    assert {tool.group for tool in cli.TOOLS.values()} == set(cli.GROUPS)
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", cli.TOOLS)
def test_every_subcommand_has_help(name, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main([name, "--help"])
    assert ending.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mobile_vla {name} ")


def test_the_module_runs_as_the_command_does():
    result = run_python("-m", "mobile_vla_inference", "--version")
    assert (result.returncode, result.stdout) == (0, f"mobile_vla {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "missing COMMAND; see mobile_vla --help"),
        (["xyz"], "unknown command xyz; see mobile_vla --help"),
        (["tyr"], "unknown command tyr; did you mean try? See mobile_vla --help"),
        (["--verson"], "unknown option --verson; did you mean --version? See mobile_vla --help"),
        (["try", "--levle", "3"], "unknown option --levle; did you mean --level? See mobile_vla try --help"),
        (["try", "--levle=3"], "unknown option --levle; did you mean --level? See mobile_vla try --help"),
        (["try", "--xyz"], "unknown option --xyz; see mobile_vla try --help"),
        (["try", "more"], "unexpected argument more; see mobile_vla try --help"),
        (["try", "--level", "high"], "--level is 'high', expected a whole number; see mobile_vla try --help"),
        (["try", "--level"], "--level: expected one argument; see mobile_vla try --help"),
        (
            ["try", "--note", "-go"],
            "--note has no value, expected one; write --note=VALUE if it begins with -; see mobile_vla try --help",
        ),
        ([""], "unknown command ''; see mobile_vla --help"),
        (
            ["try", "--mode", "fsat"],
            "--mode is fsat, expected one of slow, fast; did you mean fast? See mobile_vla try --help",
        ),
    ],
)
def test_wrong_usage_is_one_sentence_with_the_nearest_match(tool, arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(arguments)
    assert ending.value.code == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", f"mobile_vla: error: {sentence}\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bench", "step"], "missing one of --checkpoint, --size; see mobile_vla bench step --help"),
        (
            ["play", "drive", "--topics", "/a", "--all-topics"],
            "--topics and --all-topics are both given, expected one of them; see mobile_vla play --help",
        ),
    ],
)
def test_options_that_exclude_each_other_are_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(arguments)
    assert ending.value.code == 2
    assert capsys.readouterr().err == f"mobile_vla: error: {sentence}\n"


def test_a_typo_is_named_before_the_options_that_are_missing(capsys):
    with pytest.raises(SystemExit):
        cli.main(["infer", "--chekpoint", "a.pth"])
    assert "unknown option --chekpoint; did you mean --checkpoint?" in capsys.readouterr().err


def test_values_that_look_like_options_are_no_typos(tool):
    seen = []
    tool.run = lambda args: seen.append(args.note) or 0
    assert cli.main(["try", "--note", "--not an option"]) == 0
    assert cli.main(["try", "--note=--levle"]) == 0
    assert seen == ["--not an option", "--levle"]


@pytest.mark.parametrize("name", cli.TOOLS)
def test_every_argument_has_help_and_every_default_is_shown(name):
    for command, parser in parsers_of(name).items():
        assert parser.description[0].isupper() or command.startswith("bench "), command
        for argument in arguments_of(parser):
            assert argument.help, (command, argument.dest)
            shown, default = help_of(parser, argument), argument.default
            assert "%" not in re.sub(r"\d ?%", "", shown), (command, argument.dest)
            is_plain = isinstance(default, (str, int, float)) and not isinstance(default, bool)
            if is_plain and default != argparse.SUPPRESS:
                assert "default" in shown, (command, argument.dest)


def test_the_help_of_train_gives_the_rounds_of_the_curriculum():
    from mobile_vla_inference.training.curriculum import Curriculum

    parser = parsers_of("train")["train"]
    (rounds,) = (argument for argument in arguments_of(parser) if argument.dest == "rounds")
    assert f"(default: {Curriculum().rounds})" in help_of(parser, rounds)


def test_the_status_is_the_tools_own(tool):
    tool.run = lambda args: args.level
    assert cli.main(["try", "--level", "7"]) == 7


def test_an_error_is_one_line_and_2(tool, capsys):
    def fail(args):
        raise MobileVlaError("found this, expected that; do so")

    tool.run = fail
    assert cli.main(["try"]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "mobile_vla: error: found this, expected that; do so\n")


def test_a_bug_is_not_hidden(tool):
    def fail(args):
        raise ZeroDivisionError

    tool.run = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_sentence(tool, capfd, number):
    def fail(args):
        raise OSError(number, os.strerror(number), "results.json")

    tool.run = fail
    assert cli.main(["try"]) == 2
    error = capfd.readouterr().err
    assert error == "mobile_vla: error: the disk has no space left for results.json; free some and run again\n"


def test_tables_on_a_full_disk_are_one_sentence():
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "mobile_vla_inference", "verify", str(SMALL_POLICY)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            timeout=60,
        )
    assert result.stderr == "mobile_vla: error: the disk has no space left; free some and run again\n"
    assert result.returncode == 2


def test_other_errors_of_the_system_are_not_hidden(tool):
    def fail(args):
        raise PermissionError

    tool.run = fail
    with pytest.raises(PermissionError):
        cli.main(["try"])


def test_ctrl_c_ends_with_130_and_without_a_traceback(tool, capsys):
    def interrupted(args):
        signal.raise_signal(signal.SIGINT)

    tool.run = interrupted
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == ""


def test_progress_is_shown_on_a_terminal_only(capsys):
    with progress("converting", "B") as show:
        show(1, 2)
    with progress_bar("training", "update", 3, done=1) as bar:
        bar.update()
    with stages() as stage:
        stage("reading")
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")


def test_a_reader_that_exits_is_not_an_error():
    command = f"{sys.executable} -m mobile_vla_inference --help | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stderr == ""
    assert result.stdout.strip() in ("0", "2")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mobile_vla rep", {"replay"}),
        ("mobile_vla replay --against-e", {"--against-engine"}),
        ("mobile_vla zzz", set()),
    ],
)
def test_a_shell_gets_completions(tmp_path, line: str, expected: set[str]) -> None:
    answer = tmp_path / "answer"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-m", "mobile_vla_inference"], env=environment, check=True, timeout=60)
    assert {word.strip() for word in answer.read_text().splitlines()} - {""} == expected
