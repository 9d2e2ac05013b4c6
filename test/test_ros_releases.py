"""What the package takes from ROS 2, looked up in the sources of releases that are not installed.

MOBILE_VLA_ROS_SOURCES names a folder with one folder for each release (docs/contributing.md); without it, only the
reading of sources is tested.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ros_sources import RosSources
from test_compatibility import (
    RCLPY_ATTRIBUTES,
    RCLPY_CLASSES,
    RCLPY_KEYWORDS,
    RCLPY_NAMES,
    REPOSITORY,
    ROS_TREES,
    dotted,
    imported_names,
    keyword_owner,
)

#: The oldest release comes first: what an object has there, it has to have in every later one.
RELEASES = ("humble", "jazzy", "kilted", "lyrical", "rolling")

LAUNCH_PACKAGES = {"ament_index_python", "launch", "launch_ros"}

#: The classes that derive from rclpy's, by file and name; and what they mean to define anew.
SUBCLASSES = {
    ("mobile_vla_inference/ros/executor.py", "NodeExecutor"): [("rclpy.executors", "SingleThreadedExecutor")],
    ("mobile_vla_inference/ros/vla_node.py", "VlaNode"): [
        ("rclpy.lifecycle", "LifecycleNodeMixin"),
        ("rclpy.node", "Node"),
    ],
    ("mobile_vla_inference/ros/sim_robot.py", "SimRobot"): [("rclpy.node", "Node")],
}
DEFINED_ANEW = {
    *("__init__", "destroy_node", "spin", "spin_once"),
    *("on_activate", "on_cleanup", "on_configure", "on_deactivate", "on_error", "on_shutdown"),
}


def releases() -> list[RosSources]:
    folder = os.environ.get("MOBILE_VLA_ROS_SOURCES")
    return [RosSources(Path(folder) / name) for name in RELEASES if (Path(folder) / name).is_dir()] if folder else []


SOURCES = releases()
in_each_release = pytest.mark.parametrize(
    "sources",
    SOURCES or [pytest.param(None, marks=pytest.mark.skip("MOBILE_VLA_ROS_SOURCES names no sources"))],
    ids=lambda sources: sources.release if sources else "none",
)


def missing_names(sources: RosSources) -> set[str]:
    """Return what RCLPY_NAMES lists and the release lacks; packages whose sources are not there don't count."""
    return {
        f"{module}.{name}"
        for module, names in RCLPY_NAMES.items()
        if sources.has_package(module.partition(".")[0])
        for name in names.split()
        if not sources.has_name(module, name)
    }


def missing_keywords(sources: RosSources) -> set[str]:
    return {
        f"{name}({keyword}=)"
        for name, keywords in RCLPY_KEYWORDS.items()
        for keyword in keywords.split()
        if not sources.takes(*keyword_owner(name), keyword)
    }


def listed_members(sources: RosSources) -> dict[str, set[str]]:
    """Return what RCLPY_ATTRIBUTES lists of each class; a class that has moved is known by its name."""
    found: dict[str, set[str]] = {}
    for module, classes in RCLPY_CLASSES.items():
        for name in classes:
            members = sources.members(module, name) & set(RCLPY_ATTRIBUTES.split())
            found[name] = found.get(name, set()) | members
    return found


def launch_calls() -> Iterator[tuple[str, str, str]]:
    """Yield (module, name, keyword) of what the launch files call; an empty keyword for what they import."""
    for path in (REPOSITORY / "launch").glob("*.launch.py"):
        tree = ast.parse(path.read_text())
        imports = {
            name: full.rpartition(".")[::2]
            for name, full in imported_names(tree).items()
            if full.partition(".")[0] in LAUNCH_PACKAGES
        }
        yield from ((*found, "") for found in imports.values())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in imports:
                yield from ((*imports[call.func.id], keyword.arg) for keyword in call.keywords if keyword.arg)


def own_names(path: str, name: str) -> set[str]:
    """Return what a class of the package gives its objects."""
    return RosSources(REPOSITORY / "mobile_vla_inference").members(".".join(Path(path).with_suffix("").parts), name)


def test_every_class_that_derives_from_one_of_rclpy_is_looked_at():
    derived = {
        (str(path.relative_to(REPOSITORY)), node.name)
        for path, tree in ROS_TREES
        if path.is_relative_to(REPOSITORY / "mobile_vla_inference")
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        if any(dotted(base, imported_names(tree)).startswith("rclpy.") for base in node.bases)
    }
    assert derived == set(SUBCLASSES)


@in_each_release
def test_the_release_is_whole(sources):
    assert sources.has_package("rclpy")


@in_each_release
def test_the_release_has_every_name_that_is_listed(sources):
    assert not missing_names(sources)


@in_each_release
def test_the_release_takes_every_argument_that_is_listed(sources):
    assert not missing_keywords(sources)


@in_each_release
def test_the_release_has_every_method_that_is_listed(sources):
    found = listed_members(sources)
    assert set(RCLPY_ATTRIBUTES.split()) <= set().union(*found.values())
    oldest = listed_members(SOURCES[0])
    taken_away = {name: oldest[name] - found[name] for name in oldest if oldest[name] - found[name]}
    assert not taken_away


@in_each_release
def test_messages_can_be_taken_ahead_of_the_executor(sources):
    # EveryPublisher.take_pending: a method of the part of rclpy that is written in C++.
    source = next(sources.folder.rglob("src/rclpy/subscription.cpp")).read_text()
    assert "take_message(py::object pymsg_type, bool raw)" in source
    assert '"source_timestamp"_a' in source


@in_each_release
def test_no_name_of_ours_is_taken_by_a_base_class(sources):
    clashes = {
        (name, member)
        for (path, name), bases in SUBCLASSES.items()
        for base in bases
        for member in own_names(path, name) & sources.members(*base) - DEFINED_ANEW
    }
    assert not clashes


@in_each_release
def test_what_we_define_anew_is_there(sources):
    found = {member for bases in SUBCLASSES.values() for base in bases for member in sources.members(*base)}
    assert found >= DEFINED_ANEW


@in_each_release
def test_the_release_has_what_the_launch_files_use(sources):
    if not sources.has_package("launch_ros"):
        pytest.skip("launch_ros is not among the sources")
    missing = {
        (module, name, keyword)
        for module, name, keyword in launch_calls()
        if sources.has_package(module.partition(".")[0])
        and not (sources.takes(module, name, keyword) if keyword else sources.has_name(module, name))
    }
    assert not missing


# ---- the reading of sources ------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    """Made up: a package with a base class, a class that has moved, an open-ended constructor and a message."""
    files = {
        "a/rclpy/__init__.py": "from .node import Node\ndef init(*, args=None): ...\nfrom .nowhere import Lost",
        "a/rclpy/node.py": "from rclpy.base import Base as _Base\n"
        "class Node(_Base['T']):\n"
        "    def create_timer(self, period, *, clock=None): ...\n"
        "    def own(self):\n        self._mine: int = 1\n        other.not_mine = 2\n",
        "a/rclpy/base.py": "try:\n    class Base:\n        def get_name(self): ...\nexcept ImportError:\n    pass\n",
        "a/rclpy/qos.py": "class Profile:\n"
        "    def __init__(self, **kwargs): ...\n"
        "    @property\n    def depth(self): ...\n",
        "b/std_msgs/msg/String.msg": "string data",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return RosSources(tmp_path)


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("rclpy", "Node", True),
        ("rclpy", "init", True),
        ("rclpy", "node", True),
        ("rclpy", "spin", False),
        ("rclpy.node", "Node", True),
        ("rclpy.gone", "Node", False),
        ("std_msgs.msg", "String", True),
        ("std_msgs.msg", "Gone", False),
        ("launch", "LaunchDescription", False),
    ],
)
def test_a_name_is_found_or_missed(sources, module, name, expected):
    assert sources.has_name(module, name) is expected


@pytest.mark.parametrize(
    ("module", "path", "keyword", "expected"),
    [
        ("rclpy", "init", "args", True),
        ("rclpy", "init", "context", False),
        ("rclpy", "Node.create_timer", "clock", True),
        ("rclpy", "Node.create_timer", "autostart", False),
        ("rclpy", "Node.gone", "clock", False),
        ("rclpy", "Lost", "clock", False),
        ("rclpy.qos", "Profile", "depth", True),
        ("rclpy.qos", "Profile", "gone", False),
    ],
)
def test_a_keyword_is_found_or_missed(sources, module, path, keyword, expected):
    assert sources.takes(module, path, keyword) is expected


def test_members_come_from_the_bases_too(sources):
    assert sources.members("rclpy", "Node") == {"create_timer", "own", "_mine", "get_name"}
    assert sources.members("rclpy", "Lost") == set()


def test_what_a_release_has_taken_away_is_missed(sources):
    missing = missing_names(sources)
    assert {"rclpy.qos.QoSProfile", "rclpy.shutdown", "std_msgs.msg.Bool"} <= missing
    assert not {"rclpy.init", "rclpy.node.Node", "std_msgs.msg.String", "std_srvs.srv.Trigger"} & missing
    assert "create_timer(callback_group=)" in missing_keywords(sources)
    assert "create_timer(clock=)" not in missing_keywords(sources)
