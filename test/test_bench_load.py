"""`mobile_vla bench load`: what is measured, what is refused, and the page cache and cgroup underneath."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mobile_vla_inference.errors import CheckpointError, MobileVlaError
from mobile_vla_inference.policy.convert import convert
from mobile_vla_inference.policy.loading import load_model
from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
from mobile_vla_inference.tools.bench import command, load, page_cache
from mobile_vla_inference.tools.bench.load import LoadFigures, Sample
from mobile_vla_inference.tools.bench.load_child import load_as_usual
from mobile_vla_inference.tools.bench.machine import read_memory_mib
from mobile_vla_inference.tools.bench.memory_cgroup import memory_cgroup
from mobile_vla_inference.units import MIB


@pytest.fixture(scope="module")
def group_allowed() -> None:
    """Skip where this process may make no memory cgroup."""
    try:
        with memory_cgroup(64 * MIB):
            pass
    except MobileVlaError as error:
        pytest.skip(str(error))


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["load", *map(str, arguments)]))


def test_both_ways_are_measured_and_compared(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    assert run(tiny_checkpoint, "--naive", "--json", tmp_path / "out.json") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    ours, naive = report["ways"]["ours"], report["ways"]["naive"]
    parameters = sum(p.numel() for p in load_model(tiny_checkpoint).parameters())
    assert report["weights_mib"] == pytest.approx(2 * parameters / MIB)
    for figures in (ours, naive):
        assert figures["outcome"] == "lived" and figures["message"] == ""
        assert min(figures["import_s"], figures["load_s"], figures["load_cpu_s"], figures["megabytes_per_s"]) > 0.0
        assert 0.0 < figures["import_anonymous_mib"] <= figures["load_anonymous_mib"] <= figures["anonymous_mib"]
        assert 0.0 < figures["load_file_mib"] <= figures["file_mib"]
        # The kernel's own high-water mark is of the sum, which the two peaks together can't be below.
        assert figures["resident_mib"] <= figures["anonymous_mib"] + figures["file_mib"] + 16.0
    assert ours["start_to_action_s"] > ours["import_s"] + ours["load_s"] and naive["first_action_s"] is None
    assert report["ratios"]["load_s"] == pytest.approx(naive["load_s"] / ours["load_s"])
    assert "ratio" in capsys.readouterr().out


def test_the_naive_way_loads_the_same_weights(tiny_checkpoint: Path) -> None:
    ours = load_model(tiny_checkpoint, dtype=torch.float16).state_dict()
    naive = load_as_usual(tiny_checkpoint, "cpu", "float16").state_dict()
    assert ours.keys() == naive.keys()
    assert all(torch.equal(ours[name], naive[name]) for name in ours)


def test_a_converted_folder_is_measured_but_not_naively(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "folder", dtype="float16")
    figures = load.measure_load(open_checkpoint(tmp_path / "folder"), "ours", "cpu", "float16", "flat")
    assert figures.outcome == "lived" and figures.first_action_s > 0.0
    with pytest.raises(MobileVlaError, match=r"is not a \.pth"):
        run(tmp_path / "folder", "--naive")


def test_what_the_loader_refuses_is_told(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    lonely = tmp_path / "lonely.pth"  # without its processors
    lonely.write_bytes(tiny_checkpoint.read_bytes())
    assert run(lonely) == 1
    output = capsys.readouterr().out
    assert "refused" in output and "processors" in output


def test_bad_arguments_are_refused_before_anything_is_started(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        run(tmp_path / "missing.pth")
    with pytest.raises(MobileVlaError, match="is not a folder"):
        run(tiny_checkpoint, "--json", tmp_path / "missing" / "out.json")
    with pytest.raises(SystemExit):
        run(tiny_checkpoint, "--memory-limit-mib", 0)


def test_memory_is_told_apart_by_stage() -> None:
    samples = [Sample(1.0, 10.0, 1.0), Sample(2.0, 70.0, 2.0), Sample(4.0, 20.0, 90.0)]
    memory = {"anonymous": 0.0, "file": 0.0, "shared": 0.0, "peak": 5.0}
    answers = [
        {"stage": stage, "time_s": time_s, "cpu_s": time_s, "memory": memory}
        for stage, time_s in (("imported", 1.5), ("loaded", 3.0), ("acted", 5.0))
    ]
    checkpoint = argparse.Namespace(index=argparse.Namespace(stored={}))
    figures = LoadFigures("lived", "", **load.stage_figures(checkpoint, 0.5, answers, samples, 95.0))
    assert (figures.import_s, figures.load_s, figures.first_action_s, figures.start_to_action_s) == (1.0, 1.5, 2.0, 4.5)
    assert (figures.import_anonymous_mib, figures.load_anonymous_mib, figures.anonymous_mib) == (10.0, 70.0, 70.0)
    assert (figures.load_file_mib, figures.file_mib, figures.resident_mib) == (2.0, 90.0, 95.0)


def test_the_page_cache_is_dropped_and_seen_to_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3 * MIB + 123))
    assert page_cache.cached_bytes(file) == 3 * MIB + 123
    page_cache.drop_from_cache(file)
    if page_cache.cached_bytes(file) == 3 * MIB + 123:
        pytest.skip("this file system lies in memory")
    assert page_cache.cached_bytes(file) == 0
    with file.open("rb") as reader:
        reader.read(1)
    assert 0 < page_cache.cached_bytes(file) <= 3 * MIB + 123


def test_a_group_kills_what_exceeds_it_and_is_removed(group_allowed) -> None:
    with memory_cgroup(64 * MIB) as group:
        hog = subprocess.Popen(
            [sys.executable, "-c", "b'x' * (200 << 20)"], preexec_fn=group.join, stderr=subprocess.DEVNULL
        )
        hog.wait()
        assert hog.returncode != 0 and group.oom_kills > 0
        folder = group.folder
        assert folder.is_dir()
    assert not folder.exists()


def test_a_load_in_too_small_a_group_is_killed_and_told(tiny_checkpoint: Path, group_allowed, capsys) -> None:
    assert run(tiny_checkpoint, "--memory-limit-mib", 64) == 1
    assert "oom_killed" in capsys.readouterr().out


def test_memory_of_a_process_that_has_ended_is_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert read_memory_mib(process.pid) == {}
    assert read_memory_mib()["peak"] >= read_memory_mib()["anonymous"] > 0.0
