"""`mobile_vla inspect` for people: speeds and period before a confirmation, plain names, rounded figures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from mobile_vla_inference.policy.storage.formats.recognition import read_index
from mobile_vla_inference.policy.storage.layout import parameter_counts
from mobile_vla_inference.tools import cli
from mobile_vla_inference.tools.arguments import SMALL_POLICY


@pytest.fixture
def unconfirmed(tiny_checkpoint, tmp_path) -> Path:
    """Return a checkpoint without settings, with a validation error of many digits."""
    content = torch.load(tiny_checkpoint, weights_only=False)
    content["val_mae"] = 0.11372207850217819
    path = tmp_path / "alone.pth"
    torch.save(content, path)
    shutil.copytree(tiny_checkpoint.with_suffix(".processors"), path.with_suffix(".processors"))
    return path


def inspected(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert cli.main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def test_speeds_axes_and_step_period_are_shown_as_assumed_before_a_confirmation(unconfirmed, capsys):
    lines = inspected(capsys, str(unconfirmed)).splitlines()
    assert (
        "an action of 1 drives: linear.x 2 m/s, angular.z 2 rad/s "
        "(assumed: action_axes, action_scale, action_offset)" in lines
    )
    assert "step period: 0.3 s (assumed)" in lines


def test_speeds_axes_and_step_period_are_shown_as_confirmed(capsys):
    lines = inspected(capsys, str(SMALL_POLICY)).splitlines()
    assert "an action of 1 drives: linear.x 0.5 m/s, angular.z 1.2 rad/s (confirmed)" in lines
    assert "step period: 0.3 s (confirmed)" in lines


def test_parts_have_plain_names_and_json_has_those_of_the_tensors(unconfirmed, tmp_path, capsys):
    report = tmp_path / "report.json"
    shown = inspected(capsys, str(unconfirmed), "--json", str(report))
    counts = parameter_counts(read_index(unconfirmed).shapes)
    assert set(json.loads(report.read_text())["parts"]) == set(counts)
    assert not [name for name in counts if re.search(rf"^ {re.escape(name)} ", shown, re.MULTILINE)]
    assert " CLIP vision tower " in shown


def test_figures_are_rounded_for_people_and_exact_in_json(unconfirmed, tmp_path, capsys):
    report = tmp_path / "report.json"
    shown = inspected(capsys, str(unconfirmed), "--json", str(report))
    assert re.search(r"validation MAE +0\.1137 \(normalised\)", shown)
    assert json.loads(report.read_text())["val_mae"] == 0.11372207850217819
    assert " MB (zip)" in shown
    assert " 0 bytes" not in shown
