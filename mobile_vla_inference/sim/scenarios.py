"""The scenarios: one or two boxes between the robot and a cup, and the side on which to pass them.

Eight are those of the original data, `{1box,2box}_{vert,hori}_{left,right}`. Eight more, `..._cone_{left,right}`, need
a memory: the boxes stand behind a doorway, a cone next to it shows the side, and behind the doorway the cone is out of
sight. layout.py draws the world of a scenario, phrases.py its instruction.
"""

from __future__ import annotations

import numpy as np

SIDES = ("left", "right")
SCENARIOS = tuple(
    f"{boxes}_{shape}_{cue}{side}"
    for cue in ("", "cone_")
    for boxes in ("1box", "2box")
    for shape in ("vert", "hori")
    for side in SIDES
)

#: Training draws worlds with smaller seeds; evaluation uses seeds from here on.
EVALUATION_SEEDS_FROM = 1_000_000


def side_of(scenario: str) -> str:
    """Return the side on which to pass the boxes, `left` or `right`."""
    return scenario.rpartition("_")[2]


def other_side(scenario: str) -> str:
    """Return the scenario with the same world, and the boxes passed on the other side."""
    stem, _, side = scenario.rpartition("_")
    return f"{stem}_{'right' if side == 'left' else 'left'}"


def is_by_cone(scenario: str) -> bool:
    """Return whether a cone shows the side, and not the instruction."""
    return "_cone_" in scenario


def cone_side(seed: int) -> str:
    """Return the side on which the cone stands in a world with a doorway, `left` or `right`."""
    return SIDES[np.random.default_rng([seed, 5]).integers(2)]
