"""`mobile_vla drive --ros`: the same episodes through the real vla_node and sim_robot, over topics, in real time.

Both run as processes on a graph of their own, so no robot can hear them. The robot's limits are the node's, too, so
that the gate changes no command that the base could follow.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness import domain as ros_environment
from mobile_vla_inference.harness.domain import require_rclpy
from mobile_vla_inference.harness.processes import NodeProcess
from mobile_vla_inference.sim.closed_loop import EpisodeResult, EpisodeTask
from mobile_vla_inference.sim.world import (
    ANGULAR_ACCELERATION_RADPS2,
    LINEAR_ACCELERATION_MPS2,
    MAX_ANGULAR_RADPS,
    MAX_LINEAR_MPS,
)

_NODE_NAME = "vla_node"
_ROBOT_NAME = "sim_robot"
_BASE_LIMITS = {
    "max_linear_x_mps": MAX_LINEAR_MPS,
    "max_linear_y_mps": MAX_LINEAR_MPS,
    "max_angular_z_radps": MAX_ANGULAR_RADPS,
    "max_linear_acceleration_mps2": LINEAR_ACCELERATION_MPS2,
    "max_angular_acceleration_radps2": ANGULAR_ACCELERATION_RADPS2,
}
_START_LIMIT_S = 120.0
_ANSWER_LIMIT_S = 10.0
_EPISODE_LIMIT_S = 120.0
_STOP_LIMIT_S = 10.0
_SPIN_S = 0.02
#: Pictures after a reset until none of the world before can be on its way.
_FRESH_PICTURES = 3


class NodeDriver:
    """A vla_node that drives a sim_robot."""

    def __init__(self, graph: Any, processes: list[NodeProcess]) -> None:
        self._graph = graph
        self._processes = processes
        self._wait("vla_node's policy and sim_robot", self._is_ready, _START_LIMIT_S)

    @property
    def facts(self) -> dict[str, str]:
        """What vla_node says of its policy."""
        return self._graph.facts

    def drive(self, task: EpisodeTask) -> EpisodeResult:
        """Drive one episode to its end.

        Raises:
            MobileVlaError: a node ended, or did not do in time what was asked for.
        """
        graph = self._graph
        graph.instruct("")
        self._wait("vla_node to wait for an instruction", self._stands_by, _ANSWER_LIMIT_S)
        self._answer("sim_robot's parameters", graph.choose_world(task.scenario, task.seed))
        before = graph.episode["number"]
        self._answer("sim_robot's reset", graph.reset_robot())
        self._wait("the next world", lambda: graph.episode["number"] > before, _ANSWER_LIMIT_S)
        fresh = graph.pictures + _FRESH_PICTURES
        self._wait("pictures of the next world", lambda: graph.pictures >= fresh, _ANSWER_LIMIT_S)
        first_step = len(graph.steps)
        graph.instruct(task.instruction)
        self._wait("the episode's end", lambda: graph.episode["outcome"] is not None, _EPISODE_LIMIT_S)
        episode = graph.episode
        return EpisodeResult(
            task.scenario,
            task.seed,
            task.instruction,
            outcome=episode["outcome"],
            steps=len(graph.steps) - first_step,
            time_s=episode["time_s"],
            path_m=episode["path_m"],
            expert_path_m=episode["expert_path_m"],
        )

    def _is_ready(self) -> bool:
        return self._graph.is_ready() and bool(self._graph.episode) and "dtype" in self._graph.facts

    def _stands_by(self) -> bool:
        return self._graph.reason == "no_instruction"

    def _answer(self, what: str, future: Any) -> None:
        self._wait(what, future.done, _ANSWER_LIMIT_S)
        future.result()

    def _wait(self, what: str, condition: Callable[[], bool], limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while not condition():
            for process in self._processes:
                if (fault := process.fault()) is not None:
                    raise MobileVlaError(fault)
            if time.monotonic() > deadline_s:
                raise MobileVlaError(
                    f"{what} did not come within {limit_s:g} s, expected it on a machine with time for both nodes; "
                    f"vla_node says: {self._graph.advice}"
                )
            self._graph.spin(_SPIN_S)


@contextlib.contextmanager
def node_driver(checkpoint: Path, base: str, first: EpisodeTask) -> Iterator[NodeDriver]:
    """Start both nodes on a graph of their own, and end them at the end.

    Raises:
        MobileVlaError: ROS is missing, or a node can't be started.
    """
    require_rclpy()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(ros_environment.isolate().close)
        logs = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mobile_vla_drive.")))
        world = {"scenario": first.scenario, "seed": first.seed, "base": base}
        parameters = {"checkpoint": str(checkpoint.resolve()), **_BASE_LIMITS}
        processes = []
        for name, module, values in ((_ROBOT_NAME, "sim_robot", world), (_NODE_NAME, "node", parameters)):
            process = NodeProcess(name, f"mobile_vla_inference.ros.{module}", values, logs / f"{name}.log")
            cleanup.callback(process.stop, _STOP_LIMIT_S)
            processes.append(process)

        from mobile_vla_inference.harness.world_client import DriveGraph

        graph = DriveGraph(_NODE_NAME, _ROBOT_NAME)
        cleanup.callback(graph.close)
        yield NodeDriver(graph, processes)
