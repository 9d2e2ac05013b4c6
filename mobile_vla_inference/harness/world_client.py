"""A client of sim_robot: it chooses the next world, starts it, and receives how each episode goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rcl_interfaces.srv import SetParameters
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from rclpy.task import Future
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import String
from std_srvs.srv import Trigger

from mobile_vla_inference.harness.node_listener import LATCHED


class WorldClient:
    """A client of one sim_robot.

    Attributes:
        episode: the newest message of `~/episode`, with its `number` and `outcome`; empty before the first one.
        images: how many images sim_robot has published.
    """

    def __init__(
        self, node: Node, robot_name: str, on_episode: Callable[[dict[str, Any]], None] = lambda episode: None
    ) -> None:
        """Subscribe and create the clients.

        Args:
            node: the node that they belong to.
            robot_name: of sim_robot.
            on_episode: called with each message of `~/episode`.
        """
        self.episode: dict[str, Any] = {}
        self.images = 0
        self._on_episode = on_episode
        self._parameters = node.create_client(SetParameters, f"{robot_name}/set_parameters")
        self._reset = node.create_client(Trigger, f"{robot_name}/reset")
        node.create_subscription(String, f"{robot_name}/episode", self._receive_episode, LATCHED)
        node.create_subscription(CameraInfo, "camera_info", self._count_image, qos_profile_sensor_data)

    def is_available(self) -> bool:
        """Whether the services can be called, and an episode has begun."""
        return self._parameters.service_is_ready() and self._reset.service_is_ready() and bool(self.episode)

    def choose(self, scenario: str, seed: int) -> Future:
        """Choose the world of the next reset; the future ends with the answer."""
        chosen = [Parameter("scenario", value=scenario), Parameter("seed", value=seed)]
        return self._parameters.call_async(
            SetParameters.Request(parameters=[each.to_parameter_msg() for each in chosen])
        )

    def reset(self) -> Future:
        """Start the chosen world; the future ends with the answer."""
        return self._reset.call_async(Trigger.Request())

    def _receive_episode(self, message: String) -> None:
        self.episode = json.loads(message.data)
        self._on_episode(self.episode)

    def _count_image(self, message: CameraInfo) -> None:
        self.images += 1
