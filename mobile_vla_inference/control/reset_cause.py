"""ResetCause: why the policy's LSTM state was cleared; one table for the node, the worker and a replay."""

from __future__ import annotations

from enum import Enum


class ResetCause(str, Enum):
    """Why the hidden state was cleared; the value is shown in the diagnostics and in a replay's report."""

    START = "start"  # nothing was stepped before
    STEPS_FILE = "steps_file"  # a replay repeats recorded steps: the node's state was empty here
    REQUEST = "request"  # ~/reset
    ENABLE = "enable"  # ~/enable
    ACTIVATION = "activation"  # the lifecycle node became active or inactive
    INSTRUCTION = "instruction"  # another instruction is in force
    IMAGE_GAP = "image_gap"  # too much time between two stepped images
    TIME_BACKWARDS = "time_backwards"  # an image is older than the one before: a bag that loops
    IMAGE_SOURCES = "image_sources"  # a second publisher on the image topic came or left
    STEP_FAILED = "step_failed"  # the policy gave no usable action

    def __str__(self) -> str:
        """Return the value, in every Python release."""
        return self.value
