"""The package as a whole: which room may import what, and the files that name versions, dependencies and programs."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from mobile_vla_inference import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "mobile_vla_inference"
MANIFEST = ElementTree.parse(REPOSITORY / "package.xml").getroot()
SETUP = (REPOSITORY / "setup.py").read_text()

TORCH = ("torch", "transformers", "tokenizers", "safetensors")
ROS = (
    "cv_bridge",
    "diagnostic_msgs",
    "geometry_msgs",
    "lifecycle_msgs",
    "nav_msgs",
    "rcl_interfaces",
    "rclpy",
    "rosgraph_msgs",
    "sensor_msgs",
    "std_msgs",
    "std_srvs",
)

#: Modules that need Triton, an optional dependency; policy/engines/choice.py imports them only if it is installed.
TRITON_MODULES = [f"{PACKAGE}.policy.engines.{name}" for name in ("triton_kernels", "triton_operations")]

IMPORT_ROOMS = """
import importlib, importlib.util, json, pkgutil, sys

rooms, blocked, triton_modules = json.loads(sys.argv[1])
left_out = () if importlib.util.find_spec("triton") else triton_modules


class Guard:
    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(each + ".") for each in blocked):
            raise ImportError(f"{name} is out of bounds")


sys.meta_path.insert(0, Guard())
for room in rooms:
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), room + "."):
        if module.name not in left_out:
            importlib.import_module(module.name)
"""


def import_rooms(rooms: list[str], blocked: tuple[str, ...]) -> subprocess.CompletedProcess:
    """Import every module of some rooms in a process where some packages can't be imported."""
    import json

    names = [f"{PACKAGE}.{room}" for room in rooms]
    return subprocess.run(
        [sys.executable, "-c", IMPORT_ROOMS, json.dumps([names, blocked, TRITON_MODULES])],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def room(name: str) -> str:
    return f"{PACKAGE}.{name}"


#: Modules of the package itself, which every room may import, and the packages, which may import only what is named.
COMMON = [
    "action",
    "atomic",
    "decoding",
    "errors",
    "frames",
    "instructions",
    "lettering",
    "outside_files",
    "policy_facts",
    "process_lifetime",
    "units",
]
ROOMS = ("bags", "control", "episodes", "harness", "policy", "replay", "ros", "sim", "tools", "training")


def rooms_but(*allowed: str) -> list[str]:
    return [room(name) for name in ROOMS if name not in allowed]


@pytest.mark.parametrize(
    ("rooms", "blocked"),
    [
        (COMMON, (*TORCH, *ROS, *map(room, ROOMS))),
        (["control"], (*TORCH, *ROS, *rooms_but("control"))),
        (["sim"], (*TORCH, *ROS, *rooms_but("sim"))),
        (["policy"], (*ROS, *rooms_but("policy"))),
        (["policy.storage"], (*TORCH, room("policy.engines"), room("policy.synthetic"))),
        (["training"], (*ROS, *rooms_but("training", "policy", "sim", "episodes", "bags", "control", "ros"))),
        (["bags"], (*TORCH, *ROS, *rooms_but("bags", "ros", "control"))),
        (["episodes"], (*TORCH, *ROS, *rooms_but("episodes", "bags", "ros", "control", "policy"))),
        (["replay"], (*TORCH, *ROS, *rooms_but("replay", "harness", "episodes", "bags", "ros", "control", "policy"))),
        (["harness"], (*TORCH, *rooms_but("harness", "bags", "ros", "control"))),
        (["ros"], (*TORCH, *rooms_but("ros", "control", "sim"))),
        (["tools.cli", "tools.demo"], (*TORCH, *ROS)),
    ],
    ids=[
        "common",
        "control",
        "sim",
        "policy",
        "storage",
        "training",
        "bags",
        "episodes",
        "replay",
        "harness",
        "ros",
        "command-line",
    ],
)
def test_a_room_imports_only_what_it_may(rooms, blocked):
    if rooms == ["ros"]:
        pytest.importorskip("rclpy")
    result = import_rooms(rooms, blocked)
    assert result.returncode == 0, result.stderr


def test_the_guard_notices_what_is_out_of_bounds():
    result = import_rooms(["policy.architecture"], TORCH)
    assert result.returncode != 0
    assert "is out of bounds" in result.stderr


def test_the_versions_agree():
    assert MANIFEST.findtext("version") == __version__
    assert re.findall(r'version="([^"]+)"', SETUP) == [__version__]


def test_the_licence_is_the_one_that_is_named():
    assert MANIFEST.findtext("license") == "Apache-2.0"
    assert "Apache License" in (REPOSITORY / MANIFEST.find("license").get("file")).read_text()


def test_every_executable_can_be_imported():
    pytest.importorskip("rclpy")
    entries = re.findall(r'"(\w+) = ([\w.]+):(\w+)"', SETUP)
    assert {name for name, _, _ in entries} == {"mobile_vla", "sim_robot", "vla_node"}
    for _, module, function in entries:
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("folder", ["config", "launch"])
def test_every_shared_file_is_installed(folder):
    patterns = re.findall(rf'files_in\("{folder}", "([^"]+)"\)', SETUP)
    installed = {path for pattern in patterns for path in (REPOSITORY / folder).glob(pattern)}
    assert installed == {path for path in (REPOSITORY / folder).iterdir() if path.name != "__pycache__"}


def test_what_the_launch_files_start_is_declared_or_noted_as_optional():
    started = {
        keyword.value.value
        for path in (REPOSITORY / "launch").glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Node"
        for keyword in call.keywords
        if keyword.arg == "package" and isinstance(keyword.value, ast.Constant)
    }
    declared = {element.text for element in MANIFEST.findall("exec_depend")}
    assert started == {"rviz2", "twist_mux"}
    assert started - declared == {"rviz2"}
    assert "rviz2 (rviz:=true)" in (REPOSITORY / "package.xml").read_text()


@pytest.mark.parametrize("path", ["scripts/demo", "scripts/test", ".ci/run"])
def test_scripts_are_executable(path):
    assert os.access(REPOSITORY / path, os.X_OK)
    assert (REPOSITORY / path).read_text().startswith("#!/usr/bin/env bash\n")


FIND_PYTHON = """
eval "$(sed -n '/^python_fits()/,/^}/p; /^imports_rclpy()/,/^}/p; /^find_python()/,/^}/p' "$1")"
find_python
"""


@pytest.mark.parametrize(
    ("versions", "sourced", "expected"),
    [
        ({"python3": "3, 14", "python3.12": "3, 12"}, "python3", "python3"),  # Lyrical on Ubuntu 26.04
        ({"python3": "3, 14", "python3.12": "3, 12"}, "", "python3.12"),
        ({"python3": "3, 10"}, "python3", "python3"),
        ({"python3": "3, 12", "python3.11": "3, 11"}, "python3.11", "python3.11"),
        ({"python3": "3, 14"}, "", ""),  # Ubuntu 26.04 without ROS: the wheels' numpy has none for it
        ({"python3": "3, 13"}, "", "python3"),
        ({"python3": "3, 15", "python3.11": "3, 11"}, "python3", "python3.11"),
        ({"python3": "3, 9"}, "python3", ""),
    ],
)
def test_the_scripts_take_the_python_that_ros_is_sourced_for(tmp_path, versions, sourced, expected):
    for name in ("python3", "python3.12", "python3.11", "python3.10", "python3.13"):
        program = tmp_path / name
        code = f"import sys; sys.version_info = ({versions.get(name, '2, 7')}); sys.modules['rclpy'] = None; "
        if name == sourced:
            code = code.replace("= None", "= sys")
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}$2"\n')
        program.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", FIND_PYTHON, "bash", REPOSITORY / "scripts/environment.sh"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "ROS_DISTRO": "lyrical" if sourced else ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == expected, done.stderr


def third_party_imports() -> set[str]:
    """Return the top-level names that the package and its launch files import, without the standard library's."""
    names = set()
    for path in [*(REPOSITORY / PACKAGE).rglob("*.py"), *(REPOSITORY / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {PACKAGE}


def test_every_import_is_declared():
    keys = {"cv2": "python3-opencv", **{name: f"python3-{name}" for name in ("numpy", "psutil", "rich", "tqdm")}}
    declared = {element.text for element in MANIFEST.findall("exec_depend")}
    keys["yaml"] = "python3-yaml"
    keys["ruamel"] = "ruamel-yaml"
    keys["prompt_toolkit"] = "prompt-toolkit"
    keys["rerun"] = "rerun-sdk"
    keys["triton"] = "torch"  # comes along with its CUDA builds, and is optional
    files = ("runtime.txt", "workbench.txt", "world.txt", "rerun.txt")
    pins = "".join((REPOSITORY / "requirements" / name).read_text() for name in files)
    pinned = set(re.findall(r"^([\w-]+)==", pins, re.MULTILINE))
    missing = {name for name in third_party_imports() if keys.get(name, name) not in declared | pinned}
    assert not missing


def test_the_requirements_are_all_locked():
    def pins(name: str) -> set[str]:
        lines = (REPOSITORY / "requirements" / name).read_text().splitlines()
        return {line.partition(" ;")[0] for line in lines if "==" in line}

    direct = pins("runtime.txt") | pins("workbench.txt") | pins("world.txt") | pins("ros.txt") | pins("test.txt")
    follow_ros = {pin for pin in direct if pin.startswith(("numpy==", "opencv-python-headless=="))}
    assert len(follow_ros) == 2
    assert direct - follow_ros <= pins("lock.txt")
