"""Shared fixtures: a ROS graph of our own, a tiny checkpoint, and real camera frames where they are at hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mobile_vla_inference.harness.domain import isolate

if TYPE_CHECKING:
    from ros_graph import NodeProcess, Probe

# Before anything imports rclpy: the tests and the processes that they start never meet another graph. The reservation
# is held as long as this module, which is as long as pytest runs.
_GRAPH = isolate()
# A shell that starts the tests in the background makes them ignore Ctrl-C, and what they start along with them.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A process that is killed by a signal of its own making tells where.
os.environ.setdefault("PYTHONFAULTHANDLER", "1")
# Two cores serve several processes at a time here; threads that wait for each other make the tests slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def track_drive_dir() -> Path:
    """Return the folder of real camera frames with steering; skip where it is missing.

    It is data, not part of the repository: `MOBILE_VLA_TRACK_DRIVE` names it, or it is in shared/ beside the checkout.
    """
    folder = Path(os.environ.get("MOBILE_VLA_TRACK_DRIVE", REPOSITORY.parent / "shared/data/track_drive"))
    if not (folder / "images").is_dir():
        pytest.skip("the track_drive frames are not on this machine; set MOBILE_VLA_TRACK_DRIVE to their folder")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Return a tiny hybrid checkpoint with its settings and processors, made once."""
    from mobile_vla_inference.policy.storage.config import standard_config
    from mobile_vla_inference.policy.synthetic.checkpoint import make_checkpoint

    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    make_checkpoint(path, standard_config("tiny", "hybrid"), seed=0)
    return path


@pytest.fixture
def probe() -> Iterator[Probe]:
    """Return a node on the tests' graph that sends images and instructions and records what comes back."""
    from ros_graph import Probe

    probe = Probe()
    yield probe
    probe.close()


@pytest.fixture
def start_node(tmp_path, tiny_checkpoint) -> Iterator[Callable[..., NodeProcess]]:
    """Return what starts vla_node with ROS arguments, in a process that ends with the test."""
    from ros_graph import NodeProcess

    processes: list[NodeProcess] = []

    def start(*arguments: str, checkpoint: Path | str = tiny_checkpoint) -> NodeProcess:
        log = tmp_path / f"node{len(processes)}.log"
        module = "mobile_vla_inference.ros.node"
        processes.append(NodeProcess(module, "-p", f"checkpoint:={checkpoint}", *arguments, log=log))
        return processes[-1]

    yield start
    for process in processes:
        process.close()
