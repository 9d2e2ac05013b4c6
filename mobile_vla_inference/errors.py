"""Errors that a user can act on. Each is one sentence: what was found, what was expected, what to do."""

from __future__ import annotations


class MobileVlaError(Exception):
    """A fault that a user can act on: one sentence with what was found, what was expected and what to do."""


class CheckpointError(MobileVlaError):
    """A checkpoint, its settings or its processors can't be used."""


class FrameError(MobileVlaError):
    """An image can't be used as a frame."""


class InstructionError(MobileVlaError):
    """An instruction can't be used."""


class DeviceError(MobileVlaError):
    """The requested device or data type can't be used on this machine."""


class PolicyError(MobileVlaError):
    """The policy computed a value that is not a usable action."""
