"""The drill's faults of other nodes on the graph: who else publishes velocities, and who publishes stop."""

from __future__ import annotations

import time
from collections.abc import Callable

from mobile_vla_inference.control.gate import Reason
from mobile_vla_inference.tools.drill.judge import Onset
from mobile_vla_inference.tools.drill.rig import EVENT_LIMIT_S, DrillError, Fault, Recovery, Rig

#: The middleware can take so long to find another participant: it announces one every 3 s, and some announcements get
#: lost. What is judged is that the robot stops then, and stands.
_DISCOVERY_S = 12.0
_OTHER_COMMANDER = "joystick"


def _share_cmd_vel(rig: Rig) -> Onset:
    """Add another publisher, which the node has to report; then set exclusive_cmd_vel."""
    rig.graph.add_commander(_OTHER_COMMANDER)
    if not rig.graph.wait_until(lambda: rig.graph.warns_of(_OTHER_COMMANDER), EVENT_LIMIT_S):
        raise DrillError(
            f"{_OTHER_COMMANDER} publishes on the velocity topic, expected a warning in the diagnostics that names it"
        )
    set_s = time.monotonic()
    rig.set_parameters(exclusive_cmd_vel=True)
    return Onset(set_s)


def _start_second_node(rig: Rig) -> Onset:
    rig.set_parameters(exclusive_cmd_vel=True)
    began_s = time.monotonic()
    rig.graph.add_commander("vla_node")
    return Onset(began_s, _DISCOVERY_S)


def _end_sharing(rig: Rig) -> None:
    rig.graph.remove_other_node()
    rig.set_parameters(exclusive_cmd_vel=False)


# ---- other publishers of stop ----------------------------------------------------------------------------------------


def _stop_by_best_effort(rig: Rig) -> Onset:
    return Onset(rig.graph.add_stop_button()(True))


def _release_by_others(rig: Rig) -> None:
    rig.graph.remove_other_node()
    rig.graph.stop(False)


def _stop_unheard(rig: Rig) -> Onset:
    began_s = time.monotonic()
    rig.graph.add_stop_of_other_type()
    return Onset(began_s, _DISCOVERY_S)


def _sharing_fault(name: str, injection: str, inject: Callable[[Rig], Onset]) -> Fault:
    return Fault(name, injection, inject, _end_sharing, (Reason.CMD_VEL_SHARED,), Recovery.AS_REPORTED)


FAULTS = (
    _sharing_fault(
        "second_commander", "another publisher on the velocity topic; then exclusive_cmd_vel is set", _share_cmd_vel
    ),
    _sharing_fault("second_node", "exclusive_cmd_vel set; then a second node of the same name", _start_second_node),
    Fault(
        "stop_best_effort",
        "true on the stop topic, from a publisher with best-effort QoS",
        _stop_by_best_effort,
        _release_by_others,
        (Reason.STOP_REQUESTED,),
        Recovery.AFTER_ENABLE,
    ),
    Fault(
        "stop_unheard",
        "a publisher of another message type on the stop topic",
        _stop_unheard,
        lambda rig: rig.graph.remove_other_node(),
        (Reason.STOP_UNHEARD,),
        Recovery.AS_REPORTED,
    ),
)
