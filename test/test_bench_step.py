"""`mobile_vla bench step`: what is counted, measured and compared, and what fails."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.policy.storage.config import standard_config
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.tools.bench import command, step_parity
from mobile_vla_inference.tools.bench.step_cost import ORIN_NX_16GB, project, step_cost
from mobile_vla_inference.tools.bench.step_parity import Trace, compare, soak
from mobile_vla_inference.tools.bench.step_timing import synthetic_frames

FULL_FEATURES = ("kosmos_text", "clip_text")


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["step", *map(str, arguments)]))


def test_everything_is_measured_and_compared(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    options = ("--device", "cpu", "--steps", 8, "--vs", "stock", "--parity", 12, "--soak", 120, "--json", out)
    assert run("--checkpoint", tiny_checkpoint, *options) == 0
    report = json.loads(out.read_text())
    for times in (report["step_ms"], *(report["stock"][way] for way in ("own", "cached", "uncached"))):
        assert 0.0 < times["p50"] <= times["p95"] <= times["p99"] <= times["max"]
    assert list(report["part_ms"]) == ["Kosmos vision", "Kosmos text", "cell and head"]
    assert list(report["instruction_ms"]) == ["same length", "another length", "a known length"]
    stock = report["stock"]
    assert stock["ratio_cached"] == pytest.approx(stock["cached"]["p50"] / stock["own"]["p50"])
    assert report["ratio_to_floor"] == pytest.approx(report["step_ms"]["p50"] / report["floor_ms"])
    assert report["floor_ms"] == pytest.approx(1e3 * report["weight_gb"] / report["bandwidth_gbps"])
    assert report["parity"]["passed"] and report["parity"]["frames"] == 12
    assert min(report["parity"]["shuffled_error"]) > report["parity"]["error_limit"]
    assert report["soak"]["steps"] == 120 and report["soak"]["largest_change"] == 0.0
    printed = capsys.readouterr().out
    assert "projection, not a measurement" in printed and "passed" in printed and "FAILED" not in printed


def test_a_size_is_made_for_the_run_and_removed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("--size", "tiny", "--device", "cpu", "--steps", 2) == 0
    assert not list(tmp_path.iterdir())


def test_another_checkpoints_actions_fail(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    from mobile_vla_inference.policy.synthetic.checkpoint import make_checkpoint

    make_checkpoint(tmp_path / "other.pth", standard_config("tiny", "hybrid"), seed=1)
    options = ("--device", "cpu", "--steps", 2, "--parity", 6, "--reference", tmp_path / "other.pth")
    assert run("--checkpoint", tiny_checkpoint, *options) == 1
    assert "FAILED" in capsys.readouterr().out


def test_an_output_without_a_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(MobileVlaError, match="is not a folder"):
        run("--size", "tiny", "--json", tmp_path / "missing" / "out.json")


# ---- what a step costs -----------------------------------------------------------------------------------------------


def test_the_published_size_costs_what_the_design_counts() -> None:
    cost = step_cost(standard_config("full", "hybrid"), FULL_FEATURES, tokens=90)
    assert cost.flops == pytest.approx(389e9, rel=0.01)
    assert cost.weights == pytest.approx(1.57e9, rel=0.01)
    projection = project(cost, ORIN_NX_16GB)
    assert projection["float16"]["step_ms"] == pytest.approx(31.0, rel=0.02)
    assert projection["float16"]["limited_by"] == "memory"
    assert projection["int8 weights"]["step_ms"] == pytest.approx(26.0, rel=0.02)
    assert projection["int8 weights"]["limited_by"] == "arithmetic"
    assert projection["int8 weights and activations"]["step_ms"] == pytest.approx(16.0, rel=0.02)


@pytest.mark.parametrize("engine", ["flat", "eager"])
def test_the_weights_counted_are_those_of_the_engine(tiny_checkpoint: Path, engine: str) -> None:
    policy = VlaPolicy.load(tiny_checkpoint, device="cpu", engine=engine)
    cost = step_cost(policy.config, policy.describe().fusion_features, tokens=20)
    model = policy.engine._model if engine == "eager" else policy.engine.flat._model
    read = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not name.startswith("clip_model.")
    }
    for left_out in ("embed_tokens", "position_embedding", "latent_query", "q_proj.weight"):
        read = {
            name: size
            for name, size in read.items()
            if left_out not in name or (left_out == "q_proj.weight" and "x_attn" not in name)
        }
    assert cost.weights == sum(read.values())


# ---- what is compared ------------------------------------------------------------------------------------------------


def traces(error: float, turn: float) -> tuple[Trace, Trace]:
    generator = np.random.default_rng(0)
    actions, features = generator.normal(size=(50, 2)), generator.normal(size=(50, 64))
    wrong = actions.copy()
    wrong[7, 1] += error * actions[:, 1].std()
    turned = features + turn * np.roll(features, 1, axis=1)
    return Trace(wrong, turned), Trace(actions, features)


@pytest.mark.parametrize(
    ("precision", "error", "turn", "passes"),
    [
        ("float16", 0.019, 0.0, True),
        ("float16", 0.021, 0.0, False),
        ("bfloat16", 0.021, 0.0, False),
        ("float32", 0.002, 0.0, False),
        ("int8", 0.09, 0.01, True),
        ("int8", 0.11, 0.01, False),
        ("int8", 0.0, 0.2, False),
    ],
)
def test_one_wrong_action_or_turned_features_fail(precision: str, error: float, turn: float, passes: bool) -> None:
    result = compare(*traces(error, turn), precision)
    assert result["passed"] is passes
    assert result["largest_error"] == pytest.approx([0.0, error], abs=1e-9)
    assert max(result["rms_error"]) <= max(result["largest_error"])


def test_an_axis_that_never_moves_allows_no_error() -> None:
    still = Trace(np.zeros((3, 1)), np.ones((3, 2)))
    assert compare(still, still, "float16")["passed"]
    assert not compare(Trace(np.full((3, 1), 1e-6), np.ones((3, 2))), still, "float16")["passed"]


def test_not_a_number_fails() -> None:
    own, reference = traces(float("nan"), 0.0)
    assert not compare(own, reference, "float16")["passed"]


def test_a_state_that_survives_a_reset_shows_as_drift(tiny_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(step_parity, "_SOAK_EPISODE_STEPS", 4)
    policy = VlaPolicy.load(tiny_checkpoint, device="cpu")
    frames = synthetic_frames(policy.config.image_size, 4)
    assert soak(policy, frames, ["go", "stop there"], 14) == {"steps": 14, "episodes": 4, "largest_change": 0.0}
    monkeypatch.setattr(policy.engine, "reset", lambda: None)
    assert soak(policy, frames, ["go", "stop there"], 14)["largest_change"] > 0.0


def test_synthetic_frames_look_like_a_drive() -> None:
    frames = synthetic_frames(56, 10)
    assert {(frame.shape, frame.dtype.name) for frame in frames} == {((56, 56, 3), "uint8")}
    assert len({frame.tobytes() for frame in frames}) == 10
    assert all(frame.std() > 30 for frame in frames)
    shift = np.abs(frames[0][:, 2:].astype(int) - frames[1][:, :-2]).max()
    assert shift == 0  # the next view is the same scene, moved
