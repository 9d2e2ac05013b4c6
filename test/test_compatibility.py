"""Source compatibility: the syntax and standard library of Python 3.10, and the rclpy of every supported release.

test_ros_releases.py looks what is listed here up in the sources of those releases.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
PYTHON_FILES = [
    *(REPOSITORY / "mobile_vla_inference").rglob("*.py"),
    *(path for folder in ("launch", "test") for path in (REPOSITORY / folder).glob("*.py")),
    REPOSITORY / "setup.py",
]

#: Modules, names and builtins that the standard library of Python 3.10 lacks, by "What's New" of 3.11, 3.12 and 3.13.
NEWER_MODULES = {"tomllib", "wsgiref.types", "importlib.resources.abc", "dbm.sqlite3", "pathlib.types"}
NEWER_NAMES = {
    *("asyncio.Barrier", "asyncio.Runner", "asyncio.TaskGroup", "asyncio.timeout", "asyncio.timeout_at"),
    *("calendar.Day", "calendar.Month", "collections.abc.Buffer", "contextlib.chdir", "copy.replace", "datetime.UTC"),
    *("enum.EnumCheck", "enum.FlagBoundary", "enum.ReprEnum", "enum.StrEnum", "enum.global_enum", "enum.member"),
    *("enum.nonmember", "enum.property", "enum.verify", "functools.Placeholder", "hashlib.file_digest"),
    *("inspect.BufferFlags", "inspect.getmembers_static", "inspect.markcoroutinefunction", "itertools.batched"),
    *("logging.getHandlerByName", "logging.getHandlerNames", "logging.getLevelNamesMapping"),
    *("math.cbrt", "math.exp2", "math.fma", "math.sumprod", "mimetypes.guess_file_type", "operator.call"),
    *("os.EFD_CLOEXEC_DEFAULT", "os.PIDFD_NONBLOCK", "os.listdrives", "os.process_cpu_count", "os.setns"),
    *("os.timerfd_create", "os.unshare", "pathlib.UnsupportedOperation", "queue.ShutDown", "random.binomialvariate"),
    *("re.NOFLAG", "re.PatternError", "sqlite3.Blob", "statistics.kde", "sys.activate_stack_trampoline"),
    *("sys.exception", "sys.monitoring", "threading.setprofile_all_threads", "threading.settrace_all_threads"),
    *("types.CapsuleType", "types.get_original_bases", "typing.LiteralString", "typing.Never", "typing.NoDefault"),
    *("typing.NotRequired", "typing.ReadOnly", "typing.Required", "typing.Self", "typing.TypeAliasType"),
    *("typing.TypeIs", "typing.TypeVarTuple", "typing.Unpack", "typing.assert_never", "typing.assert_type"),
    *("typing.clear_overloads", "typing.dataclass_transform", "typing.get_overloads", "typing.get_protocol_members"),
    *("typing.is_protocol", "typing.override", "typing.reveal_type", "warnings.deprecated"),
}
NEWER_BUILTINS = {"BaseExceptionGroup", "ExceptionGroup", "PythonFinalizationError"}
NEWER_METHODS = {"add_note", "with_segments", "full_match"}


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Return what each name that a file imports stands for, dotted: `{"Path": "pathlib.Path"}`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def dotted(node: ast.AST, imports: dict[str, str]) -> str:
    """Return an expression such as `rclpy.qos.QoSProfile` in full; empty where it does not begin with an import."""
    if isinstance(node, ast.Name):
        return imports.get(node.id, "")
    if isinstance(node, ast.Attribute):
        start = dotted(node.value, imports)
        return f"{start}.{node.attr}" if start else ""
    return ""


def modules_imported(tree: ast.AST) -> set[str]:
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def newer_than_python_3_10(source: str) -> set[str]:
    """Return what a file uses that Python 3.10 lacks; raise SyntaxError where it can't even be read by it."""
    tree = ast.parse(source, feature_version=OLDEST_PYTHON)
    imports = imported_names(tree)
    used = {dotted(node, imports) for node in ast.walk(tree)} | set(imports.values())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    methods = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return (
        (used & NEWER_NAMES)
        | (modules_imported(tree) & NEWER_MODULES)
        | (names & NEWER_BUILTINS)
        | (methods & NEWER_METHODS)
    )


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_file_is_for_python_3_10(path):
    assert not newer_than_python_3_10(path.read_text())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import tomllib", "tomllib"),
        ("from datetime import UTC", "datetime.UTC"),
        ("import datetime as dt\nnow = dt.datetime.now(dt.UTC)", "datetime.UTC"),
        ("import enum\nclass Mode(enum.StrEnum): ...", "enum.StrEnum"),
        ("raise ExceptionGroup('two', [])", "ExceptionGroup"),
        ("error.add_note('more')", "add_note"),
    ],
)
def test_the_check_notices_a_newer_library(source, expected):
    assert newer_than_python_3_10(source) == {expected}


@pytest.mark.parametrize("source", ["try: f()\nexcept* OSError: g()", "type Frame = bytes", "def f[T](x: T): ..."])
def test_the_check_notices_newer_syntax(source):
    with pytest.raises(SyntaxError):
        newer_than_python_3_10(source)


# ---- rclpy -----------------------------------------------------------------------------------------------------------
# Everything below is in rclpy 3.3.21 (Humble), 7.1.11 (Jazzy), 9.1.5 (Kilted), 10.0.10 (Lyrical) and 11.0.0 (Rolling);
# test_ros_releases.py finds that out where their sources are at hand. What is not in all has no place in the package:
#
#   not in every release                                   instead
#   rclpy.qos_event (gone in Lyrical)                      none
#   rclpy.event_handler (not in Humble)                    none
#   rclpy.topic_endpoint_info (gone in Lyrical)            Node.get_publishers_info_by_topic gives such objects
#   rclpy.endpoint_info (new in Lyrical)                   likewise
#   Node.add_post_set_parameters_callback, add_pre_...     Node.add_on_set_parameters_callback
#   Node.create_timer(autostart=...)                       Timer.cancel() and Timer.reset()
#   Subscription.get_publisher_count()                     Node.count_publishers(subscription.topic_name)
#   rclpy.parameter_client                                 the services of rcl_interfaces
#   Node.wait_for_node, rclpy.parameter_event_handler      none
#
# What is there in all and behaves differently:
#
#   a transition that does not exist in the present state: up to Jazzy it raises RCLError out of the change_state
#   service, and so out of Executor.spin(); later, success=False
#   Executor.spin(): from 7.1.9, 9.1.5 and 10.0.1 on it does not call spin_once(): see ros/executor.py
#   what a subscription's callback is given: the message; from Jazzy on, also when it was sent, where the callback has
#   two arguments (Subscription.CallbackType): see ros/inputs.py
#   the constructors of Service, Client and Subscription: other arguments in Lyrical, behind the same methods of Node

#: Where each name is imported from.
RCLPY_NAMES = {
    "rclpy": "Context create_node duration init node ok shutdown spin_once try_shutdown",
    "rclpy.callback_groups": "CallbackGroup MutuallyExclusiveCallbackGroup ReentrantCallbackGroup",
    "rclpy.clock": "Clock ClockType",
    "rclpy.context": "Context",
    "rclpy.duration": "Duration",
    "rclpy.exceptions": "InvalidTopicNameException NameValidationException ParameterException",
    "rclpy.expand_topic_name": "expand_topic_name",
    "rclpy.executors": "Executor ExternalShutdownException ShutdownException SingleThreadedExecutor TimeoutException",
    "rclpy.logging": "get_logging_directory",
    "rclpy.lifecycle": "LifecycleNodeMixin LifecycleState TransitionCallbackReturn",
    "rclpy.node": "Node",
    "rclpy.parameter": "Parameter parameter_value_to_python",
    "rclpy.qos": "DurabilityPolicy HistoryPolicy QoSProfile ReliabilityPolicy qos_profile_sensor_data",
    "rclpy.service": "Service",
    "rclpy.signals": "SignalHandlerOptions",
    "rclpy.subscription": "Subscription",
    "rclpy.task": "Future",
    "rclpy.time": "Time",
    "rclpy.utilities": "remove_ros_args",
    "rclpy.validate_full_topic_name": "validate_full_topic_name",
    "rclpy.validate_namespace": "validate_namespace",
    "diagnostic_msgs.msg": "DiagnosticArray DiagnosticStatus KeyValue",
    "geometry_msgs.msg": "TransformStamped Twist TwistStamped",
    "lifecycle_msgs.msg": "Transition",
    "lifecycle_msgs.srv": "ChangeState GetState",
    "nav_msgs.msg": "Odometry",
    "rcl_interfaces.msg": "FloatingPointRange IntegerRange Parameter ParameterDescriptor ParameterType ParameterValue "
    "SetParametersResult",
    "rcl_interfaces.srv": "GetParameterTypes GetParameters ListParameters SetParameters",
    "rosgraph_msgs.msg": "Clock",
    "sensor_msgs.msg": "CameraInfo CompressedImage Image",
    "std_msgs.msg": "Bool Float64 String",
    "std_srvs.srv": "SetBool Trigger",
}

#: Keyword arguments by the name of what is called, functions, methods and classes alike.
RCLPY_KEYWORDS = {
    "Clock": "clock_type",
    "Duration": "seconds",
    "LifecycleNodeMixin.__init__": "callback_group enable_communication_interface",
    "QoSProfile": "depth durability history reliability",
    "SingleThreadedExecutor": "context",
    "create_client": "callback_group",
    "create_guard_condition": "callback_group",
    "create_node": "context namespace",
    "create_publisher": "callback_group",
    "create_service": "callback_group",
    "create_subscription": "callback_group raw",
    "create_timer": "callback_group clock",
    "init": "args context domain_id signal_handler_options",
    "remove_ros_args": "args",
    "spin_once": "timeout_sec",
    "try_shutdown": "context",
    "wait_for_all_acked": "timeout",
    "wait_for_service": "timeout_sec",
}

#: Where those are that neither are methods of Node nor begin with create_: module, and path inside it.
KEYWORD_OWNERS = {
    "Clock": ("rclpy.clock", "Clock"),
    "Duration": ("rclpy.duration", "Duration"),
    "LifecycleNodeMixin.__init__": ("rclpy.lifecycle", "LifecycleNodeMixin"),
    "QoSProfile": ("rclpy.qos", "QoSProfile"),
    "SingleThreadedExecutor": ("rclpy.executors", "SingleThreadedExecutor"),
    "create_node": ("rclpy", "create_node"),
    "init": ("rclpy", "init"),
    "remove_ros_args": ("rclpy.utilities", "remove_ros_args"),
    "spin_once": ("rclpy", "spin_once"),
    "try_shutdown": ("rclpy", "try_shutdown"),
    "wait_for_all_acked": ("rclpy.publisher", "Publisher.wait_for_all_acked"),
    "wait_for_service": ("rclpy.client", "Client.wait_for_service"),
}

#: Methods and properties of rclpy's objects.
RCLPY_ATTRIBUTES = """
    Type add_done_callback add_node add_on_set_parameters_callback call call_async callback clock context
    count_publishers count_subscribers create_client create_guard_condition create_publisher create_service
    create_subscription
    create_timer declare_parameter destroy destroy_node destroy_publisher destroy_timer done durability error exception
    executor from_msg
    get_clock get_fully_qualified_name get_logger get_name get_namespace get_node_names get_node_names_and_namespaces
    get_parameter get_parameters
    get_parameters_by_prefix
    get_publishers_info_by_topic get_subscription_count get_subscriptions_info_by_topic get_topic_names_and_types handle
    has_parameter info init label
    log msg_type name nanoseconds node_name node_namespace now ok publish qos_profile raw reliability reset result
    service_is_ready set_parameters shutdown spin spin_once srv_name
    to_msg to_parameter_msg topic_name topic_type trigger trigger_activate trigger_configure
    type_
    try_shutdown value wait_for_all_acked wait_for_ready_callbacks wait_for_service wake warning
"""

#: Classes whose methods and properties are rclpy's, by module: what else an attribute is called is not our concern.
RCLPY_CLASSES = {
    "rclpy.client": ["Client"],
    "rclpy.clock": ["Clock"],
    "rclpy.context": ["Context"],
    "rclpy.duration": ["Duration"],
    "rclpy.endpoint_info": ["TopicEndpointInfo"],  # from Lyrical on
    "rclpy.executors": ["Executor", "SingleThreadedExecutor"],
    "rclpy.guard_condition": ["GuardCondition"],
    "rclpy.impl.rcutils_logger": ["RcutilsLogger"],
    "rclpy.lifecycle": ["LifecycleNodeMixin", "LifecycleState"],
    "rclpy.node": ["Node"],
    "rclpy.parameter": ["Parameter"],
    "rclpy.publisher": ["Publisher"],
    "rclpy.qos": ["QoSProfile"],
    "rclpy.service": ["Service"],
    "rclpy.subscription": ["Subscription"],
    "rclpy.task": ["Future"],
    "rclpy.time": ["Time"],
    "rclpy.timer": ["Timer"],
    "rclpy.topic_endpoint_info": ["TopicEndpointInfo"],  # up to Kilted
}

LOOK_IT_UP = "list it, and run test_ros_releases.py with the sources of every release (docs/contributing.md)"

#: What plain tuples, strings and mappings have as well: no sign of rclpy.
PYTHONS_OWN = {name for kind in (tuple, str, dict, int, float) for name in dir(kind)}


def ros_trees() -> Iterable[tuple[Path, ast.AST]]:
    """Return the files that import rclpy or a message package, parsed."""
    packages = {name.partition(".")[0] for name in RCLPY_NAMES}
    for path in PYTHON_FILES:
        tree = ast.parse(path.read_text())
        if {module.partition(".")[0] for module in modules_imported(tree)} & packages:
            yield path, tree


ROS_TREES = list(ros_trees())
ROS_IDS = [str(path.relative_to(REPOSITORY)) for path, _ in ROS_TREES]
for_each_ros_file = pytest.mark.parametrize(("path", "tree"), ROS_TREES, ids=ROS_IDS)


def ros_names(tree: ast.AST) -> set[tuple[str, str]]:
    """Return every (module, name) that a file takes from rclpy and the message packages."""
    imports = imported_names(tree)
    packages = {name.partition(".")[0] for name in RCLPY_NAMES}
    found = {tuple(name.rsplit(".", 1)) for name in imports.values() if "." in name}
    for node in ast.walk(tree):
        module, _, name = dotted(node, imports).rpartition(".")
        if module in RCLPY_NAMES:
            found.add((module, name))
    return {(module, name) for module, name in found if module.partition(".")[0] in packages}


def ros_keywords(tree: ast.AST) -> set[tuple[str, str]]:
    """Return every (callable, keyword argument) where the callable is one of rclpy's, by its name."""
    found = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if name == "__init__":
            name = ast.unparse(call.func)
        if name == "partial" and call.args:
            name = getattr(call.args[0], "attr", "")
        found.update((name, keyword.arg) for keyword in call.keywords if name in RCLPY_KEYWORDS and keyword.arg)
    return found


def attributes_of_rclpy() -> set[str]:
    """Return the public names that objects of the installed rclpy have."""
    return {
        name
        for module, classes in RCLPY_CLASSES.items()
        if importlib.util.find_spec(module)
        for each in classes
        for name in dir(getattr(importlib.import_module(module), each))
        if not name.startswith("_")
    } - PYTHONS_OWN


def test_there_are_files_that_use_rclpy():
    assert "mobile_vla_inference/ros/node.py" in ROS_IDS


@for_each_ros_file
def test_the_file_imports_only_what_every_rclpy_has(path, tree):
    verified = {(module, name) for module, names in RCLPY_NAMES.items() for name in names.split()}
    unverified = {
        (module, name) for module, name in ros_names(tree) - verified if f"{module}.{name}" not in RCLPY_NAMES
    }
    assert not unverified, LOOK_IT_UP


@for_each_ros_file
def test_the_file_passes_only_arguments_that_every_rclpy_takes(path, tree):
    unverified = {
        (name, keyword) for name, keyword in ros_keywords(tree) if keyword not in RCLPY_KEYWORDS[name].split()
    }
    assert not unverified, LOOK_IT_UP


@for_each_ros_file
def test_the_file_uses_only_methods_that_every_rclpy_has(path, tree):
    pytest.importorskip("rclpy")
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    unverified = (used & attributes_of_rclpy()) - set(RCLPY_ATTRIBUTES.split())
    assert not unverified, LOOK_IT_UP


@pytest.mark.parametrize(
    ("find", "source", "expected"),
    [
        (ros_names, "from rclpy.event_handler import PublisherEventCallbacks", "PublisherEventCallbacks"),
        (ros_names, "import rclpy\nrclpy.spin_until_future_complete(node, future)", "spin_until_future_complete"),
        (ros_keywords, "self.create_timer(0.1, tick, autostart=False)", "autostart"),
        (ros_keywords, "partial(self.create_subscription, event_callbacks=events)", "event_callbacks"),
    ],
)
def test_the_check_notices_what_is_not_listed(find, source, expected):
    assert expected in {name for _, name in find(ast.parse(source))}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in RCLPY_NAMES.items() for name in names.split()]
)
def test_the_installed_ros_has_what_is_listed(module, name):
    if module.partition(".")[0] == "nav_msgs":
        pytest.importorskip("nav_msgs", reason="the wheels of ROS 2 hold no nav_msgs")
    pytest.importorskip("rclpy")
    assert hasattr(importlib.import_module(module), name)


def keyword_owner(name: str) -> tuple[str, str]:
    """Return where a key of RCLPY_KEYWORDS is defined: module, and path inside it."""
    return KEYWORD_OWNERS.get(name, ("rclpy.node", f"Node.{name}"))


@pytest.mark.parametrize("name", RCLPY_KEYWORDS)
def test_the_installed_rclpy_takes_the_arguments_that_are_listed(name):
    pytest.importorskip("rclpy")
    module, path = keyword_owner(name)
    owner = importlib.import_module(module)
    for part in path.split("."):
        owner = getattr(owner, part)
    taken = inspect.signature(owner).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values()):
        taken = dir(owner)  # of QoSProfile: each of its keywords is a property
    assert set(RCLPY_KEYWORDS[name].split()) <= set(taken)
