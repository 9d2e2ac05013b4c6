"""A worker process with a scripted policy, so that supervision is tested in milliseconds, without torch.

The protocol, the process and the shared memory are the real ones; only the policy's arithmetic is scripted by the
checkpoint's name (`ok`, `follow`, `slow`, `hang`, `crash`, `nan`, `raise`, `refuse`, `long`,
`garbage`, `many_values`); SCRIPTED_CHANGE names what is different after the first start.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from made_up_facts import FACTS, made_up_facts

from mobile_vla_inference.action import Action
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy import worker_process
from mobile_vla_inference.policy_facts import PolicyFacts

#: What another checkpoint changes, by the value of SCRIPTED_CHANGE.
_CHANGES: dict[str, dict[str, Any]] = {
    "scale": {"action_scale": (-1.0, 1.0)},
    "checkpoint": {"checkpoint_id": "another"},
    "size": {"image_size": 16},
    "assumed": {"assumed_settings": ("action_scale",)},
}


class _Config:
    image_size = FACTS.image_size


class ScriptedPolicy:
    """Answer each step with the mean of the frame and the number of steps since the last reset.

    `follow` answers with the number in the instruction instead of the mean.
    """

    def __init__(self, script: str) -> None:
        self.config = _Config()
        self._script = script
        self._steps = 0
        self._instruction = ""

    def warm_up(self) -> None:
        self._steps = 0

    def describe(self) -> PolicyFacts:
        facts = made_up_facts(variant="x" * 300_000 if self._script == "long" else "scripted")
        if (once := os.environ.get("SCRIPTED_CHANGE_ONCE")) is not None:
            if Path(once).exists():
                facts = replace(facts, **_CHANGES[os.environ["SCRIPTED_CHANGE"]])
            Path(once).touch()
        return facts

    def reset(self) -> None:
        self._steps = 0

    def set_instruction(self, text: str) -> None:
        self._instruction = text

    def step(self, frame: np.ndarray) -> Action:
        self._steps += 1
        if self._script == "slow":
            time.sleep(0.2)
        if self._script == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._script == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._script == "raise":
            raise RuntimeError("scripted failure")
        value = float("nan") if self._script == "nan" else float(frame.mean())
        if self._script == "follow":
            value = float(self._instruction.split()[-1])
        if self._script == "many_values":
            return Action((value,) * 5, 0.001)
        return Action((value, float(self._steps)), 0.001)


def _load(path, **_options) -> ScriptedPolicy:
    if path.name == "refuse":
        raise CheckpointError("scripted refusal")
    if path.name == "garbage":
        with socket.socket(fileno=os.dup(int(sys.argv[1]))) as connection:
            connection.send(b'{"op": "no such thing"}')
    return ScriptedPolicy(path.name)


if __name__ == "__main__":
    raise SystemExit(worker_process.main(_load))
