"""The drill's catalogue: every fault, with its injection, the expected reason and how the robot moves again."""

from __future__ import annotations

from mobile_vla_inference.tools.drill import (
    image_faults,
    instruction_faults,
    node_faults,
    operator_faults,
    sharing_faults,
    worker_faults,
)

#: In the order of a round: faults that need a fresh node are first, faults that end it are last.
CATALOGUE = (
    *instruction_faults.FAULTS,
    *image_faults.FAULTS,
    *operator_faults.FAULTS,
    *worker_faults.FAULTS,
    *operator_faults.RAPID_FAULTS,
    *sharing_faults.FAULTS,
    *node_faults.FAULTS,
    *node_faults.ENDING_FAULTS,
    *worker_faults.SETTINGS_FAULTS,
    *image_faults.COMPRESSED_FAULTS,
    *worker_faults.COMPRESSED_FAULTS,
)
