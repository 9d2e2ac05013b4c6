"""Whether the ROS clock runs: with use_sim_time it stays at zero until /clock is published."""

from __future__ import annotations

from typing import Any

_ADVICE = (
    "use_sim_time is true, but no node publishes /clock; start the simulator, `ros2 bag play BAG --clock` or "
    "`mobile_vla play BAG`, or set it false"
)


def missing_clock(clock: Any) -> str:
    """Return a sentence if the ROS clock has not started, else "".

    Args:
        clock: the node's clock (`Node.get_clock()`).
    """
    return _ADVICE if clock.ros_time_is_active and clock.now().nanoseconds == 0 else ""
