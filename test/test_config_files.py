"""The files in config/ and the page that explains them, against the node's own declarations and what it publishes.

The names of other packages' plugins, parameters and settings were looked up in those packages' sources, of Humble and
of Jazzy; the sets below hold what was found there and is used here.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from mobile_vla_inference.control.gate import ADVICE, GateLimits, Reason
from mobile_vla_inference.control.worker_options import WorkerOptions

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / "config"
MONITORING = (REPOSITORY / "docs/monitoring.md").read_text()
SAFETY = (REPOSITORY / "docs/safety.md").read_text()
#: Files that say on what vla_node runs; each line differs from the default, or it would say nothing.
PLATFORMS = ("orin_nx.yaml", "desktop.yaml", "sim.yaml")
NODE_FILES = sorted(path.name for path in CONFIG.glob("*.yaml") if "/**/vla_node:" in path.read_text())
SUBJECTS = ("gate", "policy", "image", "memory")

ANALYZERS = {"diagnostic_aggregator/GenericAnalyzer", "diagnostic_aggregator/AnalyzerGroup"}
RVIZ_CLASSES = {
    *("rviz_common/Displays", "rviz_common/Time", "rviz_common/Views"),
    *(f"rviz_default_plugins/{name}" for name in ("Grid", "Image", "Odometry", "TF", "TopDownOrtho")),
    *(f"rviz_default_plugins/{name}" for name in ("FocusCamera", "Interact", "Measure", "MoveCamera", "Select")),
}
RVIZ_QOS = {
    "History Policy": {"Keep Last", "Keep All", "System Default"},
    "Reliability Policy": {"Best Effort", "Reliable", "System Default"},
    "Durability Policy": {"Volatile", "Transient Local", "System Default"},
}
RQT_SETTINGS = {
    "rqt_image_view/ImageView": {"topic"},
    "rqt_plot/Plot": {"autoscroll", "topics"},
    "rqt_reconfigure/Param": {"selected_nodes"},
    "rqt_robot_monitor/RobotMonitor": set(),
    "rqt_service_caller/ServiceCaller": {"current_service_name"},
}
PLOTJUGGLER_STREAMER = "ROS2 Topic Subscriber"


def load(name: str) -> dict:
    return yaml.safe_load((CONFIG / name).read_text())


def parameters(name: str, node: str = "/**/vla_node") -> dict:
    """Return what a parameter file says for its one node."""
    content = load(name)
    assert list(content) == [node]
    assert list(content[node]) == ["ros__parameters"]
    return content[node]["ros__parameters"]


# ---- vla_node's parameters -------------------------------------------------------------------------------------------


def test_the_platform_files_are_there():
    assert set(PLATFORMS) < set(NODE_FILES)


@pytest.mark.parametrize("name", NODE_FILES)
def test_every_parameter_is_declared_has_the_type_and_is_in_range(name):
    pytest.importorskip("rclpy")
    from mobile_vla_inference.ros.parameters import NodeParameters

    kinds = get_type_hints(NodeParameters)
    values = parameters(name)
    assert set(values) <= set(kinds)
    for key, value in values.items():
        expected = {tuple[str, ...]: list, tuple[float, ...]: list}.get(kinds[key], kinds[key])
        assert type(value) is expected, f"{key}: ROS refuses another type, even a whole number for a double"
    NodeParameters().changed(values)


def test_the_file_of_defaults_states_the_defaults_of_the_code():
    pytest.importorskip("rclpy")
    from mobile_vla_inference.ros.parameters import NodeParameters

    defaults = NodeParameters()
    values = parameters("mobile_vla.yaml")
    assert values == {name: getattr(defaults, name) for name in values}


def test_a_parameter_has_the_default_of_the_part_that_uses_it():
    pytest.importorskip("rclpy")
    from mobile_vla_inference.ros.parameters import NodeParameters

    defaults, worker = NodeParameters(), WorkerOptions(policy={})
    assert defaults.gate_limits() == GateLimits()
    shared = {field.name for field in fields(WorkerOptions)} & {field.name for field in fields(NodeParameters)}
    assert shared == {"load_timeout_s", "step_timeout_s", "state_gap_s", "max_restarts"}
    assert {name: getattr(worker, name) for name in shared} == {name: getattr(defaults, name) for name in shared}


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_platform_file_says_only_what_differs_and_why(name):
    pytest.importorskip("rclpy")
    from mobile_vla_inference.ros.parameters import NodeParameters

    defaults = {declared.name: declared.default for declared in fields(NodeParameters)}
    for key, value in parameters(name).items():
        assert value != defaults[key], key
    lines = (CONFIG / name).read_text().split("ros__parameters:\n")[1].splitlines()
    for before, line in zip(["", *lines], lines):
        assert "#" in line or before.lstrip().startswith("#"), f"no reason is given for {line.strip()}"


@pytest.mark.parametrize("name", PLATFORMS)
def test_the_node_takes_the_file(name, probe, start_node):
    pytest.importorskip("rclpy")
    node = start_node("--params-file", str(CONFIG / name), "-p", "autostart:=false", "-p", "device:=cpu")
    probe.wait_for(
        "diagnostics", lambda: probe.value("gate", "reason") == "inactive" or node.process.poll() is not None
    )
    assert node.process.poll() is None, node.output()


# ---- other packages' files -------------------------------------------------------------------------------------------


def test_twist_mux_puts_the_policy_below_the_joystick_and_the_lock_above_both():
    values = parameters("twist_mux.yaml", "/**/twist_mux")
    assert set(values) == {"use_stamped", "topics", "locks"}
    assert values["use_stamped"] is False
    for entry in (*values["topics"].values(), *values["locks"].values()):
        assert set(entry) == {"topic", "timeout", "priority"}
        assert (type(entry["timeout"]), type(entry["priority"])) == (float, int)
        assert not entry["topic"].startswith("/"), "a relative name moves with the namespace"
    assert all(entry["timeout"] > 0.0 for entry in values["topics"].values()), (
        "an input that never expires drives forever"
    )
    priorities = [
        values["topics"]["policy"]["priority"],
        values["topics"]["joystick"]["priority"],
        values["locks"]["everything"]["priority"],
    ]
    assert 0 < priorities[0] < priorities[1] < priorities[2] <= 255


def analyzers() -> dict[str, dict]:
    """Return the generic analyzers by name; they are in one group."""
    (group,) = (
        entry for entry in parameters("diagnostic_aggregator.yaml", "/**/analyzers").values() if isinstance(entry, dict)
    )
    assert group["type"] == "diagnostic_aggregator/AnalyzerGroup"
    return group["analyzers"]


def test_the_aggregator_knows_each_status_by_one_analyzer():
    for entry in analyzers().values():
        assert entry["type"] in ANALYZERS
        assert set(entry) == {"type", "path", "contains", "timeout"}
        assert type(entry["timeout"]) is float
    for subject in SUBJECTS:
        for node in ("vla_node", "lab/vla_node"):
            name = f"{node}: {subject}"
            assert [key for key, entry in analyzers().items() if any(part in name for part in entry["contains"])] == [
                subject
            ]


def rviz_classes(value: object) -> set[str]:
    """Return every `Class` in a part of an RViz configuration."""
    if isinstance(value, list):
        return set().union(*map(rviz_classes, value))
    if isinstance(value, dict):
        own = {value["Class"]} if value.get("Class") else set()
        return own.union(*map(rviz_classes, value.values()))
    return set()


def test_rviz_loads_plugins_that_exist_and_shows_our_topics():
    content = load("mobile_vla.rviz")
    assert rviz_classes(content) == RVIZ_CLASSES
    displays = {display["Name"]: display for display in content["Visualization Manager"]["Displays"]}
    topics = {name: display["Topic"] for name, display in displays.items() if "Topic" in display}
    assert {name: topic["Value"] for name, topic in topics.items()} == {
        "Odometry": "odom",
        "Debug image": "vla_node/debug_image",
        "Camera": "image_raw",
    }
    for topic in topics.values():
        for policy, allowed in RVIZ_QOS.items():
            assert topic[policy] in allowed
        assert topic["Reliability Policy"] == "Best Effort", "a reliable subscriber can't match a best effort camera"


def test_rqt_starts_plugins_that_exist_with_settings_that_they_read():
    manager = load("mobile_vla.perspective")["groups"]["pluginmanager"]
    running = ast.literal_eval(manager["keys"]["running-plugins"]["repr"])
    assert running == {name: [1] for name in RQT_SETTINGS}
    groups = {name: f"plugin__{name.replace('/', '__')}__1" for name in running}
    assert set(manager["groups"]) == {groups[name] for name, settings in RQT_SETTINGS.items() if settings}
    found = {}
    for name, settings in RQT_SETTINGS.items():
        if settings:
            keys = manager["groups"][groups[name]]["groups"]["plugin"]["keys"]
            assert set(keys) == settings
            assert {entry["type"] for entry in keys.values()} == {"repr"}
            found.update({key: ast.literal_eval(entry["repr"]) for key, entry in keys.items()})
    assert found == {
        "topic": "/vla_node/debug_image",
        "autoscroll": True,
        "topics": ["/cmd_vel/linear/x", "/cmd_vel/linear/y", "/cmd_vel/angular/z"],
        "selected_nodes": ["/vla_node"],
        "current_service_name": "/vla_node/enable",
    }


def test_the_perspective_is_json():
    json.loads((CONFIG / "mobile_vla.perspective").read_text())


def plotted_series() -> list[str]:
    """Return the series of the PlotJuggler layout."""
    return [curve.get("name") for curve in ElementTree.parse(CONFIG / "mobile_vla_plotjuggler.xml").iter("curve")]


def test_plotjuggler_reads_the_layout_and_subscribes_to_what_it_plots():
    root = ElementTree.parse(CONFIG / "mobile_vla_plotjuggler.xml").getroot()
    assert root.tag == "root"
    assert root.find("tabbed_widget").attrib == {"name": "Main Window", "parent": "main_window"}
    for splitter in root.iter("DockSplitter"):
        assert int(splitter.get("count")) == len(splitter) == len(splitter.get("sizes").split(";"))
        assert splitter.get("orientation") in ("|", "-")
    for plot in root.iter("plot"):
        assert (plot.get("mode"), plot.get("style")) in {("TimeSeries", "Lines"), ("TimeSeries", "Steps")}
    plugin = root.find("Plugins/plugin")
    assert plugin.get("ID") == root.find("previouslyLoaded_Streamer").get("name") == PLOTJUGGLER_STREAMER
    subscribed = plugin.find("selected_topics").get("value").split(";")
    assert {
        name for name in plotted_series() if not name.startswith(tuple(f"{topic}/" for topic in subscribed))
    } == set()


# ---- the page --------------------------------------------------------------------------------------------------------


def rows(table_head: str, page: str) -> list[list[str]]:
    """Return the cells of the rows of the table of a page that begins with `table_head`."""
    lines = page[page.index(table_head) :].splitlines()[2:]
    table = lines[: next((index for index, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_the_reasons_are_those_of_the_gate():
    assert rows("| reason | what to do |", MONITORING) == [[f"`{reason.value}`", ADVICE[reason]] for reason in Reason]


def test_the_safety_page_explains_every_reason_to_stand():
    named = [cells[0].strip("`") for cells in rows("| reason | the robot stands still because |", SAFETY)]
    assert named == [reason.value for reason in Reason if reason is not Reason.MOVING]
    assert list(ADVICE) == list(Reason)


def test_the_advice_on_the_clock_names_commands_that_publish_it():
    for text in (ADVICE[Reason.NO_CLOCK], (REPOSITORY / "mobile_vla_inference/ros/clock.py").read_text()):
        assert "`ros2 bag play BAG --clock`" in text
        assert "`mobile_vla play BAG`" in text


def test_the_low_limits_of_the_safety_page_are_set_as_it_says(tmp_path):
    rclpy = pytest.importorskip("rclpy")
    from rclpy.context import Context
    from rclpy.node import Node

    from mobile_vla_inference.ros.parameters import NodeParameters

    content = re.search(r"`(/\*\*/vla_node: \{.*\})`", SAFETY)[1]
    file = tmp_path / "slow.yaml"
    file.write_text(content)
    context = Context()
    rclpy.init(context=context, args=["--ros-args", "--params-file", str(file)])
    node = Node("vla_node", context=context, automatically_declare_parameters_from_overrides=True)
    try:
        limits = yaml.safe_load(content)["/**/vla_node"]["ros__parameters"]
        assert {name: node.get_parameter(name).value for name in limits} == limits  # rcl reads it the same
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)
    NodeParameters().changed(limits)
    commands = re.findall(r"ros2 param set /vla_node (\w+) ([\d.]+)", SAFETY)
    assert {name: float(value) for name, value in commands} == limits
    assert "max_linear_x_mps:=" not in SAFETY  # no argument of the launch file


def documented_keys() -> dict[str, list[str]]:
    """Return the keys that the page explains, by subject; `dropped_*` stands for every cause."""
    keys = {}
    for subject in SUBJECTS:
        section = MONITORING.split(f"### `vla_node: {subject}`")[1]
        cells = [row[0] for row in rows("| key | meaning |", section)]
        keys[subject] = [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    return keys


def test_the_page_the_layout_and_the_aggregator_know_what_the_node_publishes(probe, start_node):
    pytest.importorskip("rclpy")
    from mobile_vla_inference.ros.diagnostics import POLICY_FACTS

    start_node()
    probe.drive()
    probe.wait_for("a drop", lambda: any(key.startswith("dropped_") for key in probe.diagnostics["image"]))
    published = {subject: set(values) - {"message"} for subject, values in probe.diagnostics.items()}
    assert set(published) == set(SUBJECTS) == set(analyzers())
    for subject, documented in documented_keys().items():
        unknown = {key for key in published[subject] if not any(fnmatch.fnmatch(key, each) for each in documented)}
        assert not unknown, f"docs/monitoring.md does not explain {unknown}"
        gone = {each for each in documented if not fnmatch.filter(published[subject], each)} - set(POLICY_FACTS)
        assert not gone, f"docs/monitoring.md explains {gone}, which the node does not publish"
    assert set(POLICY_FACTS) <= set(documented_keys()["policy"])
    series = {f"/diagnostics/vla_node/vla_node: {subject}/{key}" for subject in published for key in published[subject]}
    assert {name for name in plotted_series() if name.startswith("/diagnostics/")} <= series


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"\$CONFIG/([\w.]+)|config/([\w.]+)", MONITORING))
    assert all((CONFIG / (first or second)).is_file() for first, second in named)
    assert {"mobile_vla.rviz", "diagnostic_aggregator.yaml"} <= {first or second for first, second in named}


# ---- nav2's lifecycle manager ----------------------------------------------------------------------------------------

#: What the manager declares in Humble and in Kilted, where `service_timeout` was added.
MANAGER = {
    *("node_names", "autostart", "bond_timeout", "bond_respawn_max_duration", "attempt_respawn_reconnection"),
    "service_timeout",
}


def test_the_example_for_the_lifecycle_manager_has_parameters_that_exist():
    pytest.importorskip("rclpy")
    from mobile_vla_inference.ros.parameters import NodeParameters
    from mobile_vla_inference.ros.startup import END_WITH

    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/bases.md").read_text(), flags=re.DOTALL)
    calls = [call for call in ast.walk(ast.parse(example)) if getattr(getattr(call, "func", None), "id", "") == "Node"]
    nodes = {}
    for call in calls:
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        nodes[ast.literal_eval(keywords["executable"])] = ast.literal_eval(keywords["parameters"])[0]
    assert set(nodes) == {"vla_node", "lifecycle_manager"}
    NodeParameters().changed(nodes["vla_node"])
    assert nodes["vla_node"]["autostart"] is False
    assert set(nodes["lifecycle_manager"]) <= MANAGER
    assert nodes["lifecycle_manager"]["bond_timeout"] == 0.0
    assert nodes["lifecycle_manager"]["node_names"] == ["vla_node"]
    assert nodes["lifecycle_manager"]["service_timeout"] >= NodeParameters().load_timeout_s
    assert END_WITH in example
