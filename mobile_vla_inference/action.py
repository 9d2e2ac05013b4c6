"""Actions: normalised values of the policy, velocities of the base (m/s, rad/s), and the mapping in both directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

_FIELD_OF_AXIS = {"linear.x": "linear_x_mps", "linear.y": "linear_y_mps", "angular.z": "angular_z_radps"}

#: Axes of a Twist that an action can drive, by REP-103 (x forward, y left, z counter-clockwise), in the order of every
#: triple of velocities, and their units.
AXES = tuple(_FIELD_OF_AXIS)
AXIS_UNITS = ("m/s", "m/s", "rad/s")

#: Commands are float32 in the files: an excess over the scale up to this is rounding.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Action:
    """The policy's output of one step, normalised to about [-1, 1] per axis.

    Attributes:
        values: one float per action axis, in the order of the settings' `action_axes`.
        step_s: seconds that the policy spent on this step, preprocessing included.
    """

    values: tuple[float, ...]
    step_s: float = 0.0


@dataclass(frozen=True)
class VelocityCommand:
    """A velocity of the base by REP-103: x forward, y left, z counter-clockwise."""

    linear_x_mps: float = 0.0
    linear_y_mps: float = 0.0
    angular_z_radps: float = 0.0

    @property
    def values(self) -> tuple[float, float, float]:
        """The three numbers in the order linear x, linear y, angular z."""
        return (self.linear_x_mps, self.linear_y_mps, self.angular_z_radps)

    @property
    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return all(math.isfinite(value) for value in self.values)

    @property
    def is_zero(self) -> bool:
        """Whether this command is standstill."""
        return self.values == (0.0, 0.0, 0.0)


STANDSTILL = VelocityCommand()


class ActionSettings(Protocol):
    """What defines an ActionMapping: PolicySettings, and all other objects with these attributes."""

    action_axes: Sequence[str]
    action_scale: Sequence[float]
    action_offset: Sequence[float]


@dataclass(frozen=True)
class ActionMapping:
    """How normalised action values become a velocity: per axis, value x scale + offset.

    Attributes:
        axes: for each action value, the Twist axis that it drives (`linear.x`, `linear.y`, `angular.z`).
        scale: command units per normalised unit, one per axis (training divided commands by 2.0).
        offset: command units added afterwards, one per axis.
    """

    axes: tuple[str, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise ValueError if an axis is unknown or named twice, or a number is missing or not finite."""
        if not self.axes or len(set(self.axes)) != len(self.axes) or set(self.axes) - set(AXES):
            raise ValueError(f"action axes are {list(self.axes)}, expected some of {', '.join(AXES)}, each once")
        for name, values in (("scale", self.scale), ("offset", self.offset)):
            if len(values) != len(self.axes) or not all(math.isfinite(value) for value in values):
                raise ValueError(f"action {name} is {list(values)}, expected {len(self.axes)} finite numbers")

    @classmethod
    def of(cls, settings: ActionSettings) -> ActionMapping:
        """Return the mapping of a policy; raise ValueError where its settings don't fit."""
        return cls(tuple(settings.action_axes), tuple(settings.action_scale), tuple(settings.action_offset))

    def velocity(self, values: Sequence[float]) -> VelocityCommand:
        """Convert one action (as many values as axes); raise ValueError if the count differs."""
        if len(values) != len(self.axes):
            raise ValueError(f"action has {len(values)} values, expected {len(self.axes)} ({', '.join(self.axes)})")
        fields = {
            _FIELD_OF_AXIS[axis]: float(value) * scale + offset
            for axis, value, scale, offset in zip(self.axes, values, self.scale, self.offset)
        }
        return VelocityCommand(**fields)


def training_values(commands: np.ndarray, scale: Sequence[float], offset: Sequence[float]) -> np.ndarray:
    """Return commands [..., axes] as in training: minus the offset, divided by the scale, clipped to [-1, 1]."""
    return np.clip(_unclipped_values(commands, scale, offset), -1.0, 1.0)


def _unclipped_values(commands: np.ndarray, scale: Sequence[float], offset: Sequence[float]) -> np.ndarray:
    """Return commands [..., axes] minus the offset, divided by the scale."""
    scales = np.asarray(scale, dtype=np.float64)
    return (commands - np.asarray(offset)) / np.where(scales == 0.0, 1.0, scales)


def clipped_shares(commands: np.ndarray, scale: Sequence[float], offset: Sequence[float]) -> np.ndarray:
    """Return the share of commands [steps, axes] that `training_values` clips, per axis, 0 to 1."""
    return (np.abs(_unclipped_values(commands, scale, offset)) > 1.0 + _ROUNDING).mean(axis=0)
