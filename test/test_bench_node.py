"""`mobile_vla bench node`: the arithmetic of its figures, and a short run on the real graph."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.tools.bench import command
from mobile_vla_inference.tools.bench.node import FLAT_LIMIT_MIB, find_misses
from mobile_vla_inference.tools.bench.node_figures import (
    STAGES,
    account,
    drift,
    gaps_ms,
    is_flat,
    reactions_ms,
    summarize,
)

SAMPLES = 100


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["node", *map(str, arguments)]))


@given(st.lists(st.floats(0.0, 10.0)))
def test_gaps_fill_the_window_whatever_arrives(times: list[float]) -> None:
    gaps = gaps_ms(sorted(times), 2.0, 5.0)
    assert sum(gaps) == pytest.approx(3000.0)
    assert min(gaps) >= 0.0


def test_silence_is_a_gap() -> None:
    assert gaps_ms([], 2.0, 5.0) == [3000.0]
    assert gaps_ms([1.9, 2.1, 2.2], 2.0, 5.0) == pytest.approx([100.0, 100.0, 2800.0])


def test_a_reaction_is_the_sum_of_its_stages_less_the_step() -> None:
    images = [{"stamp_s": 100.0, "published_s": 1.0}, {"stamp_s": 100.1, "published_s": 1.1}]
    step = {
        "stamp_s": 100.1,
        "received_s": 1.102,
        "started_s": 1.112,
        "loaded_s": 1.115,
        "finished_s": 1.419,
        "step_s": 0.3,
        "published_s": 1.424,
        "linear_x_mps": 0.2,
    }
    commands = [{"published_s": 1.05, "linear_x_mps": 0.2}, step]
    arrivals = [(1.06, 0.2), (1.43, 0.1), (1.44, 0.2), (1.49, 0.2)]
    arrivals = [{"arrived_s": time_s, "linear_x_mps": x} for time_s, x in arrivals]
    (reaction,) = reactions_ms(images, commands, arrivals, since_s=1.0)
    expected = dict(zip(STAGES, (2.0, 10.0, 3.0, 4.0, 5.0, 16.0)))
    assert reaction == pytest.approx({**expected, "total": 40.0})
    assert reactions_ms(images, commands, arrivals, since_s=1.2) == []
    assert reactions_ms(images, commands, arrivals[:2], since_s=1.0) == []
    late = [{**arrival, "arrived_s": arrival["arrived_s"] + 300.0} for arrival in arrivals]  # of another command
    assert reactions_ms(images, commands, late, since_s=1.0) == []


def test_accounting_names_what_is_missing() -> None:
    facts = {"frames_received": "10", "steps": "4", "frames_dropped": "5", "dropped_superseded": "3"}
    assert account(facts) == {"received": 10, "stepped": 4, "dropped": {"superseded": 3}, "missing": 3}
    assert account({**facts, "dropped_unreadable": "3"})["missing"] == 0


@given(st.floats(50.0, 500.0), st.floats(0.0, 1.0), st.integers(0, 2**32 - 1))
def test_noise_is_flat_and_a_leak_is_not(base_mib: float, noise_mib: float, seed: int) -> None:
    times_s = np.arange(SAMPLES, dtype=float)
    noise = np.random.default_rng(seed).normal(0.0, noise_mib, SAMPLES)
    assert is_flat(drift(times_s, base_mib + noise, 0.0), 5.0)
    leak = np.linspace(0.0, 12.0, SAMPLES)
    assert not is_flat(drift(times_s, base_mib + leak + noise, 0.0), 5.0)


@given(st.floats(-1e3, 1e3), st.floats(0.0, 1e3))
def test_a_soak_reports_the_deviation_by_which_it_judges(growth: float, range_: float) -> None:
    series = {"range": range_, "growth": growth, "slope_per_hour": 0.0, "last": 0.0}
    figures = {"drift": dict.fromkeys(("resident_mib", "shared_mib", "threads", "descriptors"), series)}
    report = {"frames": {"missing": 0}, "processes": {"node": figures}, "left_behind": []}
    off = max(range_, abs(growth))
    expected = [f"resident_mib of the node is not flat (off by {off:.1f})"] if off > FLAT_LIMIT_MIB else []
    assert [miss for miss in find_misses(report, soak=True) if "resident" in miss] == expected


def test_what_happens_while_it_warms_up_does_not_count() -> None:
    times_s = np.arange(SAMPLES, dtype=float)
    values = np.where(times_s < 20.0, times_s, 20.0)
    assert is_flat(drift(times_s, values, 20.0), 0.1)
    assert not is_flat(drift(times_s, values, 0.0), 5.0)


def test_too_few_samples_are_not_flat() -> None:
    assert drift([0.0, 1.0], [5.0, 5.0], 0.0) is None
    assert not is_flat(None, math.inf)
    assert summarize([]) is None


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    for bad in (["--seconds", 0], ["--rate-hz", "nan"], ["--service-rate-hz", -1], ["--encoding", "jpeg"]):
        with pytest.raises(SystemExit):
            run(*bad)
    with pytest.raises(MobileVlaError, match="is not a folder"):
        run("--json", tmp_path / "missing" / "out.json")


def test_a_short_soak_is_flat_and_accounts_for_every_frame(tmp_path: Path, capsys) -> None:
    pytest.importorskip("rclpy")
    options = ("--width", 320, "--height", 240, "--rate-hz", 20, "--step-time-ms", 60, "--service-rate-hz", 20)
    status = run("--soak", "--seconds", 15, *options, "--json", tmp_path / "out.json")
    assert status == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    frames = report["frames"]
    assert frames["received"] == frames["stepped"] + sum(frames["dropped"].values())
    assert 0 < frames["stepped"] <= frames["received"] <= report["images_published"]
    assert report["misses"] == report["left_behind"] == []
    assert report["reactions"] > 0 and report["service_ms"]["max"] > 0.0
    # Nothing can come before what causes it.
    assert all(report["reaction_ms"][stage]["p50"] >= 0.0 for stage in STAGES)
    assert set(report["processes"]) == {"node", "worker"}
    assert all(figures["resident_mib_max"] > 0.0 for figures in report["processes"].values())
