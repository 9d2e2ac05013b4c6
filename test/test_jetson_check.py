"""scripts/jetson_check: a board's files in, findings out; each fault makes its own line fail."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/jetson_check"

GOOD_FILES = {
    "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "1984000",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1984000",
    "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 14000000 kB\nSwapTotal: 0 kB\n",
    "proc/swaps": "Filename Type Size Used Priority\n",
    "usr/local/cuda-12.6/version.json": "{}",
    "dev/video0": "",
}
GOOD_COMMANDS = {
    "nvpmodel": "NV Power Mode: MAXN\n0",
    "systemctl": "inactive",
    "python": "2.7.0 True",
    "docker": '{"nvidia":{},"runc":{}}',
    "df": "Avail\n90000",
}


@pytest.fixture(scope="module")
def jetson_check():
    loader = importlib.machinery.SourceFileLoader("jetson_check", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("jetson_check", loader))
    sys.modules["jetson_check"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.fixture
def findings(jetson_check, tmp_path):
    """Return what looks over a machine with these files and answers of commands changed; None: missing."""

    def look(files: dict | None = None, commands: dict | None = None) -> dict:
        for name, text in {**GOOD_FILES, **(files or {})}.items():
            if text is not None:
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        answers = {**GOOD_COMMANDS, **(commands or {})}

        def run(command: list[str]) -> str | None:
            return answers["python" if command[0] == sys.executable else command[0]]

        return {found.subject: found for found in jetson_check.check(jetson_check.Machine(tmp_path, run))}

    return look


def test_a_board_that_is_set_up_has_nothing_to_change(findings):
    found = findings()
    assert [finding.subject for finding in found.values() if not finding.fine] == []
    assert all(finding.change == "" for finding in found.values())
    assert found["L4T"].found == "r36.4.3"


@pytest.mark.parametrize(
    ("subject", "files", "commands"),
    [
        ("board", {"proc/device-tree/model": "Raspberry Pi 5"}, {}),
        ("board", {"proc/device-tree/model": None}, {}),
        ("L4T", {"etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, x"}, {}),
        ("L4T", {"etc/nv_tegra_release": None}, {}),
        ("power mode", {}, {"nvpmodel": "NV Power Mode: 10W\n3"}),
        ("power mode", {}, {"nvpmodel": None}),
        ("clocks", {"sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "729600"}, {}),
        ("unified memory", {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 2000000 kB\n"}, {}),
        ("swap", {"proc/swaps": "Filename\n/dev/zram0 partition 1 0 5\n"}, {}),
        ("desktop", {}, {"systemctl": "active"}),
        ("CUDA", {"usr/local/cuda-12.6/version.json": None}, {}),
        ("torch", {}, {"python": "2.3.0 True"}),
        ("torch", {}, {"python": "2.7.0 False"}),
        ("container runtime", {}, {"docker": '{"runc":{}}'}),
        ("container runtime", {}, {"docker": None}),
        ("camera", {"dev/video0": None}, {}),
        ("disk", {}, {"df": "Avail\n900"}),
    ],
)
def test_each_fault_fails_its_own_line_and_says_what_to_change(findings, subject, files, commands):
    found = findings(files, commands)
    assert [finding.subject for finding in found.values() if not finding.fine] == [subject]
    assert found[subject].change


def test_it_overwrites_nothing_but_json(jetson_check, tmp_path):
    other, old = tmp_path / "other.pth", tmp_path / "old.json"
    other.write_bytes(b"PK\x03\x04 a checkpoint")
    old.write_text("[]\n")
    settings = tmp_path / "a.pth.policy.json"
    settings.write_text("{}")
    assert jetson_check.output_fault(old) is None
    assert jetson_check.output_fault(tmp_path / "new.json") is None
    for path, fault in (
        (other, "is not a JSON file"),
        (tmp_path, "is a folder"),
        (tmp_path / "missing" / "x.json", "is not a folder"),
        (settings, "contains the settings of a checkpoint"),
        (Path("/dev/null"), "is not a regular file"),
    ):
        assert fault in jetson_check.output_fault(path)
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "--json", str(other)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{other} exists and is not a JSON file" in done.stderr
    assert other.read_bytes() == b"PK\x03\x04 a checkpoint"


def test_it_runs_anywhere_without_a_package(tmp_path):
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "--json", str(report)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 1), done.stderr
    assert "unified memory" in done.stdout
    assert report.read_text().startswith("[")
