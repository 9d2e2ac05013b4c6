"""The command line: help without torch, one line for errors, quiet at Ctrl-C and closed pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from mobile_vla_inference import __version__
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.tools import cli

REPOSITORY = Path(__file__).resolve().parent.parent


def run_python(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60, **options
    )


@pytest.fixture
def tool(monkeypatch):
    """A subcommand of the test's own, `try`, whose `run` can be set."""
    module = Namespace(HELP="try something", run=lambda args: 0)
    module.add_arguments = lambda parser: parser.add_argument("--level", type=int, default=0)
    monkeypatch.setattr(cli, "TOOLS", {"try": ("try_tool", "try something")})
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
    for name in cli.TOOLS:
        assert f"\n    {name}" in result.stdout
    assert result.stdout.endswith("[]\n")


@pytest.mark.parametrize("name", cli.TOOLS)
def test_every_subcommand_has_help(name, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main([name, "--help"])
    assert ending.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mobile_vla {name} ")


def test_the_module_runs_as_the_command_does():
    result = run_python("-m", "mobile_vla_inference", "--version")
    assert (result.returncode, result.stdout) == (0, f"mobile_vla {__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["fly"], ["try", "--level", "high"]])
def test_wrong_usage_ends_with_2(tool, arguments, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(arguments)
    assert ending.value.code == 2
    assert "mobile_vla" in capsys.readouterr().err


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


def test_ctrl_c_ends_with_130_and_without_a_traceback(tool, capsys):
    def interrupted(args):
        signal.raise_signal(signal.SIGINT)

    tool.run = interrupted
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_is_no_error_to_tell():
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
