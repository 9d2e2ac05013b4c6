"""The package as a whole: which package imports what, sizes, and the files with versions, dependencies and programs."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
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

IMPORT_MODULES = """
import importlib, importlib.util, json, pkgutil, sys

modules, blocked, triton_modules = json.loads(sys.argv[1])
left_out = () if importlib.util.find_spec("triton") else triton_modules


class Guard:
    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(each + ".") for each in blocked):
            raise ImportError(f"{name} is out of bounds")


sys.meta_path.insert(0, Guard())
for name in modules:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        if module.name not in left_out:
            importlib.import_module(module.name)
"""


def import_modules(modules: Sequence[str], blocked: tuple[str, ...]) -> subprocess.CompletedProcess:
    """Import modules, with all modules of a package, in a process where some libraries can't be imported."""
    import json

    names = [f"{PACKAGE}.{module}" for module in modules]
    return subprocess.run(
        [sys.executable, "-c", IMPORT_MODULES, json.dumps([names, blocked, TRITON_MODULES])],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def own(*packages: str) -> list[str]:
    return [f"{PACKAGE}.{package}" for package in packages]


#: Modules of the package itself, which every package may import.
COMMON = (
    "action",
    "atomic",
    "decoding",
    "errors",
    "frames",
    "gpu_memory",
    "instructions",
    "lettering",
    "outside_files",
    "policy_facts",
    "process_lifetime",
    "units",
)
#: Package -> the others that it imports, also inside functions; docs/architecture.md has the same table.
PACKAGES = {
    "control": (),
    "policy": (),
    "sim": (),
    "ros": ("control", "sim"),
    "bags": ("control", "ros"),
    "episodes": ("bags", "control", "policy", "ros"),
    "training": ("bags", "episodes", "policy", "sim"),
    "harness": ("bags", "control", "ros"),
    "replay": ("bags", "control", "episodes", "harness", "policy", "ros"),
    "tools": ("bags", "control", "episodes", "harness", "policy", "replay", "ros", "sim", "training"),
}
#: Package (or modules) -> libraries, and packages of this one, that can't be imported with it, not even through others.
BLOCKED = {
    COMMON: (*TORCH, *ROS, *own("policy", "ros", "sim", "tools")),
    ("control",): (*TORCH, *ROS, *own("policy", "ros", "sim", "tools")),
    ("sim",): (*TORCH, *ROS, *own("policy", "ros", "tools")),
    ("policy",): (*ROS, *own("control", "ros", "sim", "tools")),
    ("policy.storage",): TORCH,
    ("training",): (*ROS, *own("ros", "tools")),
    ("bags",): (*TORCH, *ROS, *own("policy", "sim", "tools")),
    ("episodes",): (*TORCH, *ROS, *own("sim", "tools")),
    ("replay",): (*TORCH, *ROS, *own("tools")),
    ("harness",): (*TORCH, *own("policy", "tools")),
    ("ros",): (*TORCH, *own("policy", "tools")),
    ("tools.cli", "tools.demo"): (*TORCH, *ROS),
}
MAX_FILE_LINES = 600
MAX_CLASS_LINES = 300


@pytest.mark.parametrize("modules", BLOCKED, ids=lambda modules: modules[0])
def test_a_package_is_imported_without_what_others_need(modules):
    if modules in (("ros",), ("harness",)):
        pytest.importorskip("rclpy")
    result = import_modules(modules, BLOCKED[modules])
    assert result.returncode == 0, result.stderr


def imported_modules(path: Path) -> set[str]:
    """Return the modules of this package that a file imports anywhere but for type checking."""
    tree = ast.parse(path.read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typing_only = {
        id(node)
        for block in blocks
        if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(PACKAGE) and id(node) not in typing_only:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & MODULES.keys()


MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (REPOSITORY / PACKAGE).rglob("*.py")
}


def package_of(module: str) -> str:
    """Return the package below this package, or the module in it."""
    return module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]


def test_every_module_and_package_has_a_row():
    assert {package_of(module) for module in MODULES} - {"", "__main__"} == {*COMMON, *PACKAGES}


def test_no_package_imports_one_above_it():
    above = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imported_modules(path)
        if package_of(module) not in ("", "__main__")
        and package_of(other) not in ("", package_of(module), *COMMON, *PACKAGES.get(package_of(module), ()))
    ]
    assert not above


def test_no_files_import_each_other_in_a_circle():
    imports = {module: imported_modules(path) for module, path in MODULES.items()}
    checked: set[str] = set()

    def visit(module: str, chain: tuple[str, ...]) -> None:
        assert module not in chain, " -> ".join((*chain[chain.index(module) :], module))
        if module not in checked:
            for other in imports[module] - {module}:
                visit(other, (*chain, module))
            checked.add(module)

    for module in MODULES:
        visit(module, ())


def test_files_and_classes_are_small():
    large = []
    for folder in (PACKAGE, "test", "launch"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            text = path.read_text()
            if text.count("\n") >= MAX_FILE_LINES:
                large.append(f"{path.name}: {text.count(chr(10))} lines")
            large += [
                f"{path.name}: class {node.name} has {node.end_lineno - node.lineno + 1} lines"
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno + 1 >= MAX_CLASS_LINES
            ]
    assert not large


def test_a_blocked_library_is_noticed():
    result = import_modules(["policy.architecture"], TORCH)
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
