"""The drill's faults of the instruction: none, unusable ones, and too many."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mobile_vla_inference.control.gate import Reason
from mobile_vla_inference.tools.drill.judge import Onset
from mobile_vla_inference.tools.drill.rig import EVENT_LIMIT_S, INSTRUCTION, DrillError, Fault, Rig


def _instruct(rig: Rig) -> None:
    rig.graph.instruct(INSTRUCTION)


def _send_instruction(text: str, rig: Rig) -> Onset:
    return Onset(rig.graph.instruct(text))


def _no_instruction(rig: Rig) -> Onset:
    graph = rig.graph
    if not graph.wait_until(lambda: graph.reason == Reason.NO_INSTRUCTION.value, EVENT_LIMIT_S):
        raise DrillError(f"the node's reason is {graph.reason}, expected it to wait for an instruction")
    return Onset(time.monotonic())


def _end_flood(rig: Rig) -> None:
    rig.graph.end_flood()
    rig.graph.instruct(INSTRUCTION)


def _instruction_fault(name: str, injection: str, inject: Callable[[Rig], Onset], **others: Any) -> Fault:
    return Fault(name, injection, inject, _instruct, (Reason.NO_INSTRUCTION,), **others)


#: The first one needs a node that has had no instruction.
FAULTS = (
    Fault(
        "instruction_absent",
        "images, but no instruction yet",
        _no_instruction,
        _instruct,
        (Reason.NO_INSTRUCTION,),
        hold_s=1.0,
        from_rest=True,
    ),
    _instruction_fault(
        "instruction_empty", "an instruction that contains only spaces", partial(_send_instruction, "  ")
    ),
    _instruction_fault("instruction_1mb", "an instruction of 1 MB", partial(_send_instruction, "go " * 350_000)),
    _instruction_fault(
        "instruction_not_utf8",
        "an instruction whose bytes are not UTF-8",
        lambda rig: Onset(rig.graph.instruct_raw(b"go \xff\xfe\xc3(")),
    ),
    _instruction_fault(
        "instruction_control",
        "an instruction that contains only control characters",
        partial(_send_instruction, "\x01\x07\t\r\n\x1b\x7f\u200b"),
    ),
    Fault(
        "instruction_flood",
        "1000 different instructions within one second",
        lambda rig: Onset(rig.graph.flood(1000.0, lambda count: rig.graph.instruct(f"go to place {count}"))),
        _end_flood,
        (Reason.NO_STEP,),
        step_s=0.0,
        hold_s=1.0,
    ),
)
