"""`mobile_vla health` on the graph: a healthy node, a node whose policy failed, and no node."""

from __future__ import annotations

import json
import subprocess
import sys

from std_srvs.srv import Trigger


def health(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mobile_vla_inference", "health", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_ready_node_is_healthy(probe, start_node, tmp_path):
    start_node()
    probe.wait_for("the policy", lambda: probe.value("policy", "state") == "ready", timeout_s=60.0)
    done = health("--json", str(tmp_path / "health.json"))
    assert done.returncode == 0, done.stderr
    assert "policy ready" in done.stdout
    assert "no_instruction" in done.stdout
    assert json.loads((tmp_path / "health.json").read_text())["gate"]["reason"] == "no_instruction"


def test_a_node_without_a_policy_is_not_healthy(probe, start_node):
    start_node("-p", "autostart:=false")
    probe.call(Trigger, "vla_node/reset", Trigger.Request())
    done = health()
    assert done.returncode == 2
    assert "policy of /vla_node is stopped" in done.stderr


def test_a_missing_node_is_named():
    done = health("--node", "/robot1/vla_node", "--timeout", "0.5")
    assert done.returncode == 2
    assert "/robot1/vla_node sent no diagnostics" in done.stderr
    assert "Traceback" not in done.stderr
