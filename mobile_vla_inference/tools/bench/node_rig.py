"""What `bench node` and `bench stop` share: the real node with a stand-in for its policy, a camera and a base.

The node, its worker, the camera, the base and this benchmark are processes of their own on a private ROS 2 graph.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from mobile_vla_inference.harness.session import NodeSession
from mobile_vla_inference.tools.arguments import positive_number, time_s
from mobile_vla_inference.tools.bench import node_worker
from mobile_vla_inference.tools.bench.images_profile import images_profile

if TYPE_CHECKING:
    from mobile_vla_inference.tools.bench.node_graph import BenchGraph

_INSTRUCTION = "go to the cup"
_PACKAGE = __name__.rpartition(".")[0]
_START_LIMIT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser, step_time_ms: float) -> None:
    """Declare the options of the camera, of the service calls and of the policy step."""
    parser.add_argument(
        "--width", type=int, default=1280, metavar="PX", help="width of the images (default: %(default)s)"
    )
    parser.add_argument(
        "--height", type=int, default=720, metavar="PX", help="height of the images (default: %(default)s)"
    )
    parser.add_argument(
        "--encoding",
        choices=("bgr8", "rgb8", "bgra8", "mono8"),
        default="bgr8",
        help="encoding of the images (default: %(default)s)",
    )
    parser.add_argument(
        "--rate-hz", type=positive_number, default=30.0, metavar="HZ", help="rate of the images (default: %(default)g)"
    )
    parser.add_argument(
        "--service-rate-hz",
        type=time_s,
        default=50.0,
        metavar="HZ",
        help="rate of service calls, 0 for none (default: %(default)g)",
    )
    parser.add_argument(
        "--step-time-ms",
        type=positive_number,
        default=step_time_ms,
        metavar="MS",
        help="duration of a policy step (default: %(default)g)",
    )


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a benchmark for its report."""
    return {name: value for name, value in vars(args).items() if name not in ("bench", "json", "run")}


class NodeRig:
    """The node under load, in a session.

    Attributes:
        graph: the benchmark's own node.
        node: the process of vla_node.
        camera: the process of the camera.
    """

    def __init__(
        self,
        session: NodeSession,
        args: argparse.Namespace,
        graph_type: type[BenchGraph],
        node_module: str,
        *,
        computes: bool = False,
    ) -> None:
        """Start everything and wait until the node drives.

        Args:
            session: an entered session.
            args: the options of `add_arguments`.
            graph_type: of the benchmark's own node.
            node_module: the module in this package that runs vla_node.
            computes: the policy step computes on a core; else it waits, as for a GPU.

        Raises:
            MobileVlaError: a process ended, or the node does not drive.
        """
        step_s = args.step_time_ms / 1e3
        os.environ |= {
            node_worker.STEP_VARIABLE: str(step_s),
            node_worker.BUSY_VARIABLE: str(int(computes)),
            node_worker.RECORD_VARIABLE: str(session.folder / "commands"),
        }
        self._session = session
        self.graph = session.join(lambda: graph_type("vla_node"))
        self.node = session.start(
            "vla_node",
            f"{_PACKAGE}.{node_module}",
            {
                # With these limits the stand-in's commands reach the base as they are.
                "checkpoint": "stand-in",
                "device": "cpu",
                "step_timeout_s": max(2.0, 3.0 * step_s),
                "max_linear_acceleration_mps2": 50.0,
            },
        )
        session.start("base", f"{_PACKAGE}.node_base", {"record": str(session.folder / "arrivals")})
        image = {name: getattr(args, name) for name in ("width", "height", "encoding", "rate_hz")}
        with images_profile(session.folder):
            self.camera = session.start(
                "camera", f"{_PACKAGE}.node_camera", {**image, "record": str(session.folder / "images")}
            )
        session.wait_for("vla_node to subscribe", self.graph.can_instruct, _START_LIMIT_S)
        self.graph.instruct(_INSTRUCTION)
        session.wait_for("the robot to move", self.graph.is_moving, _START_LIMIT_S)

    def record(self, name: str) -> list[dict[str, float]]:
        """Return the entries that a process has written down: `images`, `commands` or `arrivals`."""
        text = (self._session.folder / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]
