"""The node of `mobile_vla drive --ros`: it changes sim_robot's world and hears what becomes of each episode."""

from __future__ import annotations

import json
from typing import Any

from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import String
from std_srvs.srv import Trigger

from mobile_vla_inference.harness.node_listener import LATCHED, ReplayGraph


class DriveGraph(ReplayGraph):
    """Listen to a vla_node and to a sim_robot.

    Attributes:
        episode: what sim_robot said last of its episode, with its `number` and `outcome`; empty before.
        pictures: how many pictures sim_robot has published.
    """

    def __init__(self, node_name: str, robot_name: str) -> None:
        """Join the graph that the environment names."""
        super().__init__(node_name)
        self.episode: dict[str, Any] = {}
        self.pictures = 0
        self._parameters = self.node.create_client(SetParameters, f"{robot_name}/set_parameters")
        self._reset = self.node.create_client(Trigger, f"{robot_name}/reset")
        self.node.create_subscription(String, f"{robot_name}/episode", self._on_episode, LATCHED)
        self.node.create_subscription(CameraInfo, "camera_info", self._on_picture, qos_profile_sensor_data)

    def is_ready(self) -> bool:
        """Whether both nodes can be spoken to."""
        return self._parameters.service_is_ready() and self._reset.service_is_ready() and self.reason != ""

    def choose_world(self, scenario: str, seed: int) -> Any:
        """Ask for another world at the next reset; the result tells when that is answered."""
        chosen = [Parameter("scenario", value=scenario), Parameter("seed", value=seed)]
        return self._parameters.call_async(
            SetParameters.Request(parameters=[each.to_parameter_msg() for each in chosen])
        )

    def reset_robot(self) -> Any:
        """Ask for the chosen world; the result tells when that is answered."""
        return self._reset.call_async(Trigger.Request())

    def _on_episode(self, message: String) -> None:
        self.episode = json.loads(message.data)

    def _on_picture(self, message: CameraInfo) -> None:
        self.pictures += 1
