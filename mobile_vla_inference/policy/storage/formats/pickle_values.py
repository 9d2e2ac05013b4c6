"""Descriptions of what a pickle holds, as pickle_graph.py builds them. Nothing that the file names is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mobile_vla_inference.policy.storage.number_types import ITEM_BYTES


@dataclass(frozen=True)
class Global:
    """A class or function that the pickle names; only its name is known."""

    name: str


@dataclass(eq=False)
class PickledDict:
    """A dict, OrderedDict, defaultdict or Counter: keys and values in the order of the file."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def named(self) -> dict[str, Any]:
        """Return the values whose keys are text; for a repeated key the last value, as in a dict."""
        return {key: value for key, value in self.pairs if isinstance(key, str)}


@dataclass(eq=False)
class PickledObject(PickledDict):
    """An object of a class that is not known here: what its class would receive if the pickle were run.

    Attributes:
        name: of its class, or of the function that would build it.
        arguments: of that call.
        state: source of the object's attributes.
        items: values to append to it.
    """

    name: str = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    @property
    def attributes(self) -> PickledDict | None:
        """Its attributes, if its state is a dict of them; else None."""
        return self.state if isinstance(self.state, PickledDict) else None


@dataclass(frozen=True)
class Storage:
    """A storage that the pickle names: record `data/<key>` with `count` values of a type."""

    key: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes that its record must have."""
        return self.count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Tensor:
    """A tensor that the pickle describes; offset and strides in values of its type."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def last(self) -> int:
        """Index of its last value in its storage; -1 if it has no values."""
        if 0 in self.shape:
            return -1
        return self.offset + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides))


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor whose values are not exactly those in its storage.

    Attributes:
        what: its kind, such as `a sparse tensor`.
        advice: how to save it as a plain tensor.
    """

    what: str
    advice: str


@dataclass(frozen=True)
class NumpyType:
    """The type of a numpy array or scalar."""

    code: str
    is_big_endian: bool = False


class Instruction(ValueError):  # noqa: N818 - describes an instruction, and is caught as damage
    """An instruction that no checkpoint's pickle has, or one with wrong arguments."""


class TooMany(Instruction):
    """More instructions than MAX_OPERATIONS."""


def kind_of(value: Any) -> str:
    """Return the name of a class or function, or of the type of any other value, for a message."""
    return value.name if isinstance(value, Global) else type(value).__name__
