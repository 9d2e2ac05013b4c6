"""What a command writes never replaces what it reads, nor a file of another kind: one check for all commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from all_parsers import arguments_of, parsers_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.policy.storage.settings_file import settings_path
from mobile_vla_inference.tools import cli
from mobile_vla_inference.tools.arguments import (
    HTML_OUTPUT,
    JSON_OUTPUT,
    RERUN_OUTPUT,
    VIDEO_OUTPUT,
    check_output,
)

REPOSITORY = Path(__file__).resolve().parent.parent

KINDS = {
    b'{"a": 1}': JSON_OUTPUT,
    b"[1]": JSON_OUTPUT,
    b"<!doctype html>": HTML_OUTPUT,
    b"RRF2....": RERUN_OUTPUT,
    b"\0\0\0\x20ftypisom": VIDEO_OUTPUT,
}


@pytest.mark.parametrize("content", KINDS)
@pytest.mark.parametrize("kind", (JSON_OUTPUT, HTML_OUTPUT, RERUN_OUTPUT, VIDEO_OUTPUT), ids=lambda kind: kind.name)
def test_a_report_replaces_reports_of_its_kind_only(tmp_path, content, kind) -> None:
    path = tmp_path / "out"
    check_output(path, kind=kind)  # new
    path.write_bytes(b"")
    check_output(path, kind=kind)  # an empty file is replaced
    path.write_bytes(content)
    if KINDS[content] is kind:
        check_output(path, kind=kind)
    else:
        with pytest.raises(MobileVlaError, match=f"is not a {kind.name}"):
            check_output(path, kind=kind)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=80))
def test_no_report_replaces_what_begins_otherwise(tmp_path, content) -> None:
    path = tmp_path / "out.json"
    path.write_bytes(content)
    begins = content.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\n\r\f\v")[:1]
    if begins in (b"{", b"["):
        check_output(path)
    else:
        with pytest.raises(MobileVlaError):
            check_output(path)
    assert path.read_bytes() == content


def test_no_report_replaces_settings_a_device_or_an_input(tiny_checkpoint, tmp_path) -> None:
    checkpoint = Path(shutil.copy(tiny_checkpoint, tmp_path / "a.pth"))
    shutil.copy(settings_path(tiny_checkpoint), settings_path(checkpoint))
    shutil.copytree(tiny_checkpoint.with_suffix(".processors"), checkpoint.with_suffix(".processors"))
    link = tmp_path / "link.json"
    link.symlink_to(checkpoint)
    tokenizer = next(checkpoint.with_suffix(".processors").rglob("*.json"))
    for path in (checkpoint, settings_path(checkpoint), link, tokenizer):
        with pytest.raises(MobileVlaError, match="would overwrite"):
            check_output(path, checkpoint)
        with pytest.raises(MobileVlaError, match="would overwrite"):
            check_output(path, checkpoint, force=True)
    with pytest.raises(MobileVlaError, match="settings of a checkpoint"):
        check_output(settings_path(checkpoint), None)
    with pytest.raises(MobileVlaError, match="not a regular file"):
        check_output(Path("/dev/null"))


#: Every command that writes a report, as it is called; {x} is an input: a checkpoint, a folder of images, ...
REPORTS = (
    "bench load {checkpoint} --json",
    "bench node --json",
    "bench step --checkpoint {checkpoint} --json",
    "bench stop --json",
    "budget {checkpoint} --json",
    "demo --json",
    "drill --json",
    "drive --checkpoint {checkpoint} --json",
    "drive --checkpoint {checkpoint} --video",
    "evaluate {frames} --checkpoint {checkpoint} --json",
    "health --json",
    "infer --checkpoint {checkpoint} --frames {frames} --instruction go --json",
    "inspect {checkpoint} --json",
    "replay {frames} --checkpoint {checkpoint} --json",
    "replay {frames} --checkpoint {checkpoint} --report",
    "replay {frames} --checkpoint {checkpoint} --rerun",
    "verify {frames} --json",
)
_OPTION = re.compile(r"--(json|report|rerun|video)")


@pytest.fixture
def read(tiny_checkpoint, tmp_path) -> dict[str, Path]:
    """Return a checkpoint and a folder with an image."""
    checkpoint = Path(shutil.copy(tiny_checkpoint, tmp_path / "a.pth"))
    frames = tmp_path / "frames"
    frames.mkdir()
    (frames / "1.jpg").write_bytes(b"\xff\xd8\xff\xe0 an image")
    return {"checkpoint": checkpoint, "frames": frames}


@pytest.mark.parametrize("command", REPORTS)
def test_every_report_is_refused_in_place_of_another_file(read, tmp_path, capsys, command) -> None:
    words = [word.format(**read) for word in command.split()]
    other = tmp_path / "other.pth"
    other.write_bytes(b"PK\x03\x04 a checkpoint")
    for path in (other, *(read[name] for name in ("checkpoint",) if f"{{{name}}}" in command)):
        before = path.read_bytes()
        assert cli.main([*words, str(path)]) == 2
        error = capsys.readouterr().err
        assert re.search("exists and is no|would overwrite", error) and str(path) in error
        assert path.read_bytes() == before
    if "{frames}" in command:
        assert cli.main([*words, str(read["frames"] / "1.jpg")]) == 2
        assert "would overwrite" in capsys.readouterr().err


def test_no_command_with_a_report_is_left_out() -> None:
    """Every option of every subcommand that writes a report is in the list above."""
    declared = {
        (command, option)
        for name in cli.TOOLS
        for command, parser in parsers_of(name).items()
        for argument in arguments_of(parser)
        if argument.type is Path
        for option in argument.option_strings
        if _OPTION.fullmatch(option)
    }
    assert declared == {(re.split(" [{-]", report)[0], report.split()[-1]) for report in REPORTS}


@pytest.mark.parametrize(
    "command",
    [
        "replay bag --checkpoint ck --json x.out --report {folder}/x.out",
        "replay bag --checkpoint ck --out-bag x.out --report ./x.out",
        "drive --json x.out --video x.out",
    ],
)
def test_two_outputs_in_one_file_are_refused(tmp_path, monkeypatch, capsys, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.format(folder=tmp_path).split()) == 2
    assert "is given for two outputs, expected a file for each" in capsys.readouterr().err


# --- data: replaced only with --force ---


@pytest.mark.parametrize("name", ("a.pth", "a.pth.policy.json", "a.processors", "a.loss.svg", "a.training"))
def test_train_replaces_nothing_without_force(tmp_path, capsys, name) -> None:
    path = tmp_path / name
    path.write_bytes(b"kept")
    assert cli.main(["train", "nowhere.h5", "--out", str(tmp_path / "a.pth")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and "--force" in error and ("--resume" in error) is (name == "a.training")
    assert path.read_bytes() == b"kept"
    assert cli.main(["train", "nowhere.h5", "--out", str(tmp_path / "a.pth"), "--force"]) == 2
    assert "nowhere.h5" in capsys.readouterr().err  # the episodes are read next


def test_a_curriculum_removes_no_folder_that_it_did_not_make(tmp_path, capsys) -> None:
    folder = tmp_path / "a.episodes"
    folder.mkdir()
    (folder / "mine.h5").write_bytes(b"kept")
    assert cli.main(["train", "world", "--out", str(tmp_path / "a.pth")]) == 2
    assert f"{folder} already exists" in capsys.readouterr().err
    inside = ["train", "world", "--init", str(folder / "mine.h5"), "--out", str(tmp_path / "a.pth"), "--force"]
    assert cli.main(inside) == 2
    assert f"would overwrite {folder}" in capsys.readouterr().err
    assert (folder / "mine.h5").read_bytes() == b"kept"


@pytest.mark.parametrize("more", ([], ["--force"]))
def test_train_never_overwrites_what_it_reads(tmp_path, capsys, more) -> None:
    keep, start = tmp_path / "keep.h5", tmp_path / "other.pth"
    keep.write_bytes(b"episodes")
    start.write_bytes(b"a checkpoint")
    for arguments in ([str(keep), "--out", str(keep)], [str(keep), "--init", str(start), "--out", str(start)]):
        assert cli.main(["train", *arguments, *more]) == 2
        assert "would overwrite" in capsys.readouterr().err
    assert (keep.read_bytes(), start.read_bytes()) == (b"episodes", b"a checkpoint")


def test_make_episodes_replaces_nothing_without_force(tmp_path, capsys) -> None:
    pytest.importorskip("h5py")
    out, policy = tmp_path / "shown.h5", tmp_path / "a.pth"
    out.write_bytes(b"kept")
    policy.write_bytes(b"a policy")
    assert cli.main(["make-episodes", str(out), "--episodes", "1"]) == 2
    assert "already exists" in capsys.readouterr().err and out.read_bytes() == b"kept"
    assert cli.main(["make-episodes", str(policy), "--policy", str(policy), "--force"]) == 2
    assert "would overwrite" in capsys.readouterr().err and policy.read_bytes() == b"a policy"
    assert cli.main(["make-episodes", str(out), "--force", "--seed", "1000000"]) == 2
    assert "for evaluation" in capsys.readouterr().err  # --force passes the check of the output


# --- names and disks ---


@pytest.mark.parametrize(("length", "status"), [(246, 0), (255, 0), (256, 2)])
def test_a_long_name_is_written_or_refused_before_the_work(length, status, tmp_path, tiny_checkpoint, capsys):
    path = tmp_path / ("a" * length)
    assert cli.main(["inspect", str(tiny_checkpoint), "--json", str(path)]) == status
    assert ("File name too long" in capsys.readouterr().err) is (status != 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ([path.name] if status == 0 else [])


def test_the_results_are_written_although_nobody_reads_the_tables(tmp_path, tiny_checkpoint):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "mobile_vla_inference", "inspect", str(tiny_checkpoint), "--json", str(path)]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        subprocess.run(command, stdout=output, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=60)
    assert json.loads(path.read_text())["checkpoint_id"]
