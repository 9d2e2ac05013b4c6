"""What the policy worker reports: its state, the actions, the faults."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WorkerState(Enum):
    """The state of the worker; the value is shown in the diagnostics."""

    STOPPED = "stopped"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"


@dataclass(frozen=True)
class StepResult:
    """An action and the frame that caused it.

    Attributes:
        values: normalised action, one float per axis.
        stamp_s: stamp of the frame, seconds.
        received_s: arrival of the frame, steady clock.
        captured_s: capture of the frame, steady clock.
        started_s: when the frame's step was due and its conversion began, steady clock.
        loaded_s: when the converted frame was in shared memory, steady clock.
        finished_s: when the action came back, steady clock.
        step_s: seconds that the policy itself took.
        first_of_state: whether the hidden state was empty before this step.
    """

    values: tuple[float, ...]
    stamp_s: float
    received_s: float
    captured_s: float
    started_s: float
    loaded_s: float
    finished_s: float
    step_s: float
    first_of_state: bool


@dataclass(frozen=True)
class WorkerFault:
    """The worker died, hung or failed; `message` is one sentence; `final` means that it is not started again."""

    message: str
    final: bool


@dataclass(frozen=True)
class WorkerChanged:
    """A restarted worker loaded another policy than before; `message` names the difference. It is not started again."""

    message: str


@dataclass(frozen=True)
class FrameRefused:
    """A frame could not be converted; `message` is the reason."""

    message: str


@dataclass(frozen=True)
class InstructionRefused:
    """The policy could not use the instruction; `message` is the reason."""

    message: str


@dataclass(frozen=True)
class StepFailed:
    """The policy computed no usable action for a frame; `message` is the reason. The hidden state is reset."""

    message: str


WorkerEvent = StepResult | StepFailed | WorkerFault | WorkerChanged | FrameRefused | InstructionRefused
