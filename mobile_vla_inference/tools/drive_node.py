"""`mobile_vla drive --ros`: the same episodes through the real vla_node and sim_robot, over topics, in real time.

Both run as processes on a private graph, so no robot can receive their commands. The node has the limits of the
simulated base, so that the gate changes no command that the base could follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_vla_inference.harness.session import NodeSession
from mobile_vla_inference.sim.closed_loop import EpisodeResult, EpisodeTask
from mobile_vla_inference.sim.world import (
    ANGULAR_ACCELERATION_RADPS2,
    LINEAR_ACCELERATION_MPS2,
    MAX_ANGULAR_RADPS,
    MAX_LINEAR_MPS,
)

if TYPE_CHECKING:
    from rclpy.task import Future

    from mobile_vla_inference.harness.node_listener import StepListener
    from mobile_vla_inference.harness.world_client import WorldClient

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
#: Images after a reset until none of the former world can be on its way.
_FRESH_IMAGES = 3


class NodeDriver:
    """A vla_node that drives a sim_robot."""

    def __init__(self, session: NodeSession, graph: StepListener, world: WorldClient) -> None:
        """Wait for both nodes; raise MobileVlaError if one ends or is not ready in time."""
        self._session = session
        self._graph = graph
        self._world = world
        session.wait_for("vla_node's policy and sim_robot", self._is_ready, _START_LIMIT_S)

    @property
    def facts(self) -> dict[str, str]:
        """The values of vla_node's diagnostics by key, the facts on its policy among them."""
        return self._graph.facts

    def drive(self, task: EpisodeTask) -> EpisodeResult:
        """Drive one episode to its end.

        Raises:
            MobileVlaError: a node ended, or did not answer in time.
        """
        graph, world, wait_for = self._graph, self._world, self._session.wait_for
        graph.instruct("")
        wait_for("vla_node to be without an instruction", self._is_uninstructed, _ANSWER_LIMIT_S)
        self._await_answer("sim_robot's parameters", world.choose(task.scenario, task.seed))
        before = world.episode["number"]
        self._await_answer("sim_robot's reset", world.reset())
        wait_for("the next world", lambda: world.episode["number"] > before, _ANSWER_LIMIT_S)
        fresh = world.images + _FRESH_IMAGES
        wait_for("images of the next world", lambda: world.images >= fresh, _ANSWER_LIMIT_S)
        first_step = len(graph.steps)
        graph.instruct(task.instruction)
        wait_for("the episode's end", lambda: world.episode["outcome"] is not None, _EPISODE_LIMIT_S)
        episode = world.episode
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
        return self._world.is_available() and self._graph.reason != "" and "dtype" in self._graph.facts

    def _is_uninstructed(self) -> bool:
        return self._graph.reason == "no_instruction"

    def _await_answer(self, what: str, future: Future) -> None:
        self._session.wait_for(what, future.done, _ANSWER_LIMIT_S)
        future.result()


@contextlib.contextmanager
def node_driver(
    checkpoint: Path, base: str, first: EpisodeTask, loading: Mapping[str, str | bool]
) -> Iterator[NodeDriver]:
    """Start both nodes on a private graph, and end them at the end.

    Args:
        checkpoint: file or folder.
        base: of the simulated robot.
        first: the first episode.
        loading: parameters of vla_node on how the policy is loaded.

    Raises:
        MobileVlaError: ROS 2 is missing, or a node can't be started.
    """
    with NodeSession("drive") as session, session.interruptible():
        world = {"scenario": first.scenario, "seed": first.seed, "base": base}
        session.start(_ROBOT_NAME, "mobile_vla_inference.ros.sim_robot", world)
        parameters = {"checkpoint": str(checkpoint.resolve()), **loading, **_BASE_LIMITS}
        session.start(_NODE_NAME, "mobile_vla_inference.ros.node", parameters)

        from mobile_vla_inference.harness.node_listener import StepListener
        from mobile_vla_inference.harness.world_client import WorldClient

        graph = session.join(lambda: StepListener("drive", _NODE_NAME))
        yield NodeDriver(session, graph, WorldClient(graph.node, _ROBOT_NAME))
