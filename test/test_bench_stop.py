"""`mobile_vla bench stop`: its arithmetic, and a few stops on the real graph."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.tools.bench import command
from mobile_vla_inference.tools.bench.stop import reactions


def arrivals(*entries: tuple[float, float]) -> list[dict[str, float]]:
    return [{"arrived_s": time_s, "linear_x_mps": x_mps} for time_s, x_mps in entries]


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["stop", *map(str, arguments)]))


def test_a_stop_lasts_until_the_first_zero_that_arrives_after_it():
    came = arrivals((0.9, 0.1), (1.01, 0.1), (1.02, 0.0), (1.07, 0.0), (1.9, 0.1), (2.03, 0.0))
    taken, standing = reactions([1.0, 2.0], came)
    assert taken == pytest.approx([0.02, 0.03])
    assert standing == 0


def test_a_stop_without_a_zero_and_a_stop_of_a_standing_robot_are_distinguished():
    assert reactions([1.0, 2.0], arrivals((0.9, 0.1), (1.1, 0.1), (2.1, 0.0))) == ([None, pytest.approx(0.1)], 0)
    assert reactions([1.0], arrivals((0.9, 0.0), (1.1, 0.0))) == ([], 1)
    assert reactions([1.0], arrivals((1.1, 0.0))) == ([], 1)
    assert reactions([1.0], arrivals((0.9, 0.1), (9.0, 0.0))) == ([None], 0)


@given(
    st.lists(st.tuples(st.floats(0.0, 20.0), st.sampled_from([0.0, 0.1])), max_size=30), st.sets(st.floats(0.0, 20.0))
)
def test_every_stop_is_accounted_for_once(came, stops):
    taken, standing = reactions(sorted(stops), arrivals(*sorted(came)))
    assert len(taken) + standing == len(stops)
    assert all(reaction_s is None or 0.0 <= reaction_s <= 5.0 for reaction_s in taken)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    for bad in (["--stops", 0], ["--busy", -1], ["--busy", "many"], ["--step-time-ms", "nan"]):
        with pytest.raises(SystemExit):
            run(*bad)
    with pytest.raises(MobileVlaError, match="is not a folder"):
        run("--json", tmp_path / "missing" / "out.json")


def test_a_few_stops_are_timed_with_the_delays_of_the_machine(tmp_path: Path, capsys) -> None:
    pytest.importorskip("rclpy")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    options = ("--width", 320, "--height", 240, "--rate-hz", 20, "--service-rate-hz", 10)
    status = run("--stops", 5, "--busy", 1, *options, "--json", tmp_path / "out.json")
    assert status == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["stops"] + report["already_standing"] == 5
    assert report["stops"] > 0 == report["without_zero"]
    assert 0.0 < report["stop_ms"]["p50"] <= report["stop_ms"]["max"] < 5000.0
    assert report["wakeups"] > 0 and report["wakeup_ms"]["p50"] >= 0.0
    assert report["images_hz"] > 0.0 and report["service_hz"] > 0.0
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
