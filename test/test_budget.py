"""`mobile_vla budget`: sums, verdicts and bad input."""

from __future__ import annotations

import json

import pytest

from mobile_vla_inference.tools.budget import make_budget
from mobile_vla_inference.tools.cli import main

NEEDS = {"fp32": {"load_mib": 8000.0, "run_mib": 7500.0}, "fp16": {"load_mib": 4200.0, "run_mib": 3900.0}}


def test_the_sum_decides_what_fits():
    budget = make_budget(NEEDS, {"system": 1000.0, "desktop": 2000.0}, board_gb=8.0)
    assert budget["board_mib"] == pytest.approx(7629.4, abs=0.1)
    assert not budget["dtypes"]["fp32"]["fits"]
    assert budget["dtypes"]["fp16"]["fits"]
    assert budget["dtypes"]["fp16"]["total_mib"] == 7200.0
    assert budget["dtypes"]["fp16"]["left_mib"] == pytest.approx(429.4, abs=0.1)


def test_it_prints_a_table_and_writes_json(tiny_checkpoint, tmp_path, capsys):
    report = tmp_path / "budget.json"
    assert main(["budget", str(tiny_checkpoint), "--desktop-mib", "0", "--json", str(report)]) == 0
    assert "CUDA context" in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert written["surroundings_mib"]["desktop"] == 0.0
    assert set(written["dtypes"]) == {"fp32", "fp16", "int8"}


def test_a_board_that_is_too_small_is_status_1(tiny_checkpoint):
    assert main(["budget", str(tiny_checkpoint), "--board-gb", "1"]) == 1


def test_a_bad_figure_is_named(tiny_checkpoint, capsys):
    with pytest.raises(SystemExit) as ending:
        main(["budget", str(tiny_checkpoint), "--system-mib", "-5"])
    assert ending.value.code == 2
    assert "--system" in capsys.readouterr().err
