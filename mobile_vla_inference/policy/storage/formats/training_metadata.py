"""What a `.pth` holds in addition to the weights: training arguments, results, the optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mobile_vla_inference.policy.storage.formats.pickle_values import (
    ForeignTensor,
    Global,
    PickledDict,
    PickledObject,
    Tensor,
)
from mobile_vla_inference.policy.storage.formats.pickled_plain_values import numpy_array_values
from mobile_vla_inference.policy.storage.formats.state_dict import describe, is_plain_object
from mobile_vla_inference.policy.storage.tensor_index import MAX_METADATA_TEXT

_MAX_PLAIN_DEPTH = 2
_MAX_PLAIN_ITEMS = 200
_MAX_PLAIN_VALUES = 20_000


def _inside(value: Any) -> Iterable[Any]:
    """Return the content of a container; of an object, its attributes and arguments too."""
    if isinstance(value, PickledObject):
        return (*(child for _, child in value.pairs), value.state, *value.arguments, *value.items)
    if isinstance(value, PickledDict):
        return [child for _, child in value.pairs]
    return value if isinstance(value, (list, tuple)) else ()


def _walk(value: Any, skip: Iterable[int] = ()) -> Iterator[Any]:
    """Yield a value and its content, each container once: a pickle can nest deeply, and a list can hold itself."""
    pending, seen = [value], set(skip)
    while pending:
        value = pending.pop()
        if isinstance(value, (PickledDict, list, tuple)):
            if id(value) in seen:
                continue
            seen.add(id(value))
            pending.extend(_inside(value))
        yield value


def tensors_in(value: Any, skip: Iterable[int] = ()) -> Iterator[Tensor]:
    """Yield the tensors in a value, except in the containers whose ids are in `skip`."""
    return (found for found in _walk(value, skip) if isinstance(found, Tensor))


def optimizer_shapes(rest: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    """Return the shape of each parameter that an optimizer's state_dict() has moments of (such as Adam's)."""
    shapes = []
    for value in rest:
        state = value.named().get("state") if isinstance(value, PickledDict) else None
        for _, moments in state.pairs if isinstance(state, PickledDict) else ():
            shapes.append(_moments_shape(moments))
    return tuple(shapes)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, PickledDict) and {"state", "param_groups"} <= value.named().keys()


def _moments_shape(moments: Any) -> tuple[int, ...]:
    tensors = moments.named().values() if isinstance(moments, PickledDict) else ()
    return next((tensor.shape for tensor in tensors if isinstance(tensor, Tensor) and tensor.shape), ())


class TrainingMetadata:
    """The values next to the weights, for JSON; a value that is too deep, too long or unknown becomes its type's name.

    Args:
        single_value: returns the value of a tensor with one value, or None.
        skip: ids of the containers that hold the weights.
    """

    def __init__(self, single_value: Callable[[Tensor], Any], skip: set[int]) -> None:
        self._single_value = single_value
        self._skip = skip
        self._values_left = _MAX_PLAIN_VALUES

    def plain(self, value: Any, depth: int = 0) -> Any:
        """Return a value for JSON."""
        self._values_left -= 1
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return value if abs(value) < 1 << 63 else "int"
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, str):
            return value[:MAX_METADATA_TEXT].encode("utf-8", "replace").decode()
        if isinstance(value, Tensor):
            single = self._single_value(value)
            return "tensor" if single is None else self.plain(single)
        if isinstance(value, PickledObject):
            numbers = numpy_array_values(value)
            if numbers is not None:
                return self.plain(numbers, depth)
            value = value.attributes or value
        if depth < _MAX_PLAIN_DEPTH and self._values_left > 0:
            if isinstance(value, PickledDict) and not isinstance(value, PickledObject):
                if len(value.pairs) <= _MAX_PLAIN_ITEMS:
                    return {self._key(k): self.plain(v, depth + 1) for k, v in value.pairs}
            elif isinstance(value, (list, tuple)) and len(value) <= _MAX_PLAIN_ITEMS:
                return [self.plain(item, depth + 1) for item in value]
        return _type_name(value)

    def unread(self, value: Any) -> str | None:
        """Return what a value next to the weights is if it is not read completely; None if it is."""
        tensors, objects = 0, []
        for found in _walk(value, self._skip):
            if isinstance(found, PickledObject) and not is_plain_object(found) and numpy_array_values(found) is None:
                objects.append(describe(found))
            tensors += isinstance(found, ForeignTensor) or (
                isinstance(found, Tensor) and (found is not value or self._single_value(found) is None)
            )
        texts = list(dict.fromkeys(objects))[:2]
        if _is_optimizer(value):  # counted as dead weight
            tensors = 0
        return ", ".join(([f"{tensors} tensors"] if tensors else []) + texts) or None

    def _key(self, key: Any) -> str:
        return self.plain(key) if isinstance(key, str) else str(self.plain(key, _MAX_PLAIN_DEPTH))


def _type_name(value: Any) -> str:
    if isinstance(value, (PickledObject, Global)):
        return value.name[:MAX_METADATA_TEXT]
    return "dict" if isinstance(value, PickledDict) else type(value).__name__
