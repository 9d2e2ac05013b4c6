"""Errors, baselines, signs and lag against values that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_vla_inference.episodes.comparison import SIGN_DEADBAND, compare, lag, sign_agreement

AXES = ("linear.x", "angular.z")
numbers = st.floats(-3.0, 3.0, allow_nan=False)
rows = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=30)


def compared(predicted, recorded, scale=(2.0, 2.0), offset=(0.0, 0.0)):
    stamps_s = [0.1 * index for index in range(len(predicted))]
    return compare(stamps_s, np.array(predicted, float), np.array(recorded, float), AXES, scale, offset)


def test_the_errors_are_those_of_the_definition():
    result = compared([[1.0, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, -0.5]])
    policy = result["command_units"]["policy"]
    assert policy["linear.x"] == {"mae": 0.5, "rmse": math.sqrt(0.5)}
    assert policy["angular.z"] == {"mae": 0.5, "rmse": math.sqrt(0.5)}
    assert policy["all"] == {"mae": 0.5, "rmse": math.sqrt(0.5)}


def test_the_baselines_are_zero_mean_and_the_record_one_frame_late():
    table = compared([[0.0, 0.0]] * 3, [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])["command_units"]
    assert table["zero"]["linear.x"]["mae"] == 2.0
    assert table["mean"]["linear.x"]["mae"] == pytest.approx(2.0 / 3.0)
    assert table["previous"]["linear.x"]["mae"] == 1.0


@given(rows)
def test_normalised_errors_are_command_errors_over_the_scale(values):
    array = np.array(values)
    result = compared(array[:, :2], array[:, 2:], scale=(2.0, 0.5), offset=(0.1, -0.3))
    for name, table in result["command_units"].items():
        for axis, scale in zip(AXES, (2.0, 0.5)):
            for error in ("mae", "rmse"):
                normalised = result["normalised_units"][name][axis][error]
                assert normalised * scale == pytest.approx(table[axis][error], abs=1e-9)


@given(rows)
def test_a_perfect_policy_has_no_error_and_agrees_in_every_sign(values):
    recorded = np.array(values)[:, :2]
    result = compared(recorded, recorded)
    assert result["command_units"]["policy"]["all"] == {"mae": 0.0, "rmse": 0.0}
    assert all(axis["sign_agreement"] in (None, 1.0) for axis in result["axes"].values())


def test_pairs_that_are_not_finite_are_left_out_and_counted():
    result = compared([[math.nan, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
    assert (result["frames"], result["not_finite"]) == (1, 1)
    assert result["command_units"]["policy"]["linear.x"]["mae"] == 1.0


def test_nothing_to_compare_is_none_not_zero():
    result = compared([[math.nan, 0.0]], [[0.0, 0.0]])
    assert result["command_units"]["policy"]["all"] == {"mae": None, "rmse": None}


def test_signs_count_only_beyond_the_deadband():
    goal = np.array([SIGN_DEADBAND / 2, 1.0, -1.0, -1.0])
    assert sign_agreement(np.array([-1.0, 0.5, -0.5, 0.5]), goal) == {
        "sign_agreement": pytest.approx(2 / 3),
        "sign_frames": 3,
    }


@pytest.mark.parametrize("shift", [-9, -1, 0, 1, 7])
def test_the_lag_of_a_shifted_series_is_found(shift):
    noise = np.random.default_rng(3).normal(size=300)
    smooth = np.convolve(noise, np.ones(5) / 5, mode="same")
    found = lag(0.1 * np.arange(200), smooth[50 - shift : 250 - shift], smooth[50:250])
    assert found["lag_s"] == pytest.approx(0.1 * shift)
    assert found["lag_correlation"] > 0.99


@pytest.mark.parametrize(
    ("times_s", "predicted"),
    [
        (np.arange(5.0), np.arange(5.0)),
        (np.zeros(40), np.arange(40.0)),
        (np.arange(40.0), np.ones(40)),
    ],
    ids=["short", "no time passes", "never changes"],
)
def test_an_unknown_lag_is_none(times_s, predicted):
    assert lag(times_s, predicted, np.sin(np.arange(len(times_s)))) == {"lag_s": None, "lag_correlation": None}


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected 2 each"):
        compared([[0.0, 0.0]], [[0.0, 0.0]], scale=(1.0,))
