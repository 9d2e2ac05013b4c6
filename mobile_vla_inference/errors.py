"""The errors that a user can act on. Every one is one sentence: what was found, what was expected, what to do."""

from __future__ import annotations


class MobileVlaError(Exception):
    """A fault that a user can act on: one sentence with what was found, expected and what to do next."""


class CheckpointError(MobileVlaError):
    """A checkpoint, its settings or its processors can't be used."""


class FrameError(MobileVlaError):
    """An image can't be used as a frame."""


class InstructionError(MobileVlaError):
    """An instruction can't be used."""


class DeviceError(MobileVlaError):
    """The device or number type asked for can't be used here."""


class PolicyError(MobileVlaError):
    """The policy computed something that is no action."""
