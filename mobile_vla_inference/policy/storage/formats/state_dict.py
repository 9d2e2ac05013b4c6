"""Find a policy's state dict in the content of a checkpoint.

Training scripts keep the weights under keys of their choice, next to optimizers, averaged copies and statistics. The
parts of a policy (layout.PART_NAMES) show which dict is the policy's. If two dicts fit, none is chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.formats.pickle_values import (
    ForeignTensor,
    Global,
    PickledDict,
    PickledObject,
    Storage,
    Tensor,
)
from mobile_vla_inference.policy.storage.layout import PART_NAMES, REQUIRED_PARTS
from mobile_vla_inference.policy.storage.tensor_names import shown_name, without_wrappers

#: Usual keys of the model's state dict in a training checkpoint; other keys are found too.
WRAPPERS = ("model_state_dict", "state_dict", "model")

_MAX_DEPTH = 5
_MAX_CONTAINERS = 100_000
_MAX_SHOWN = 3


@dataclass(frozen=True)
class StateDict:
    """The tensors of a policy, as they are in a file.

    Attributes:
        path: the keys that lead to it, joined by dots; None if it is the whole file.
        tensors: by key.
        containers: the dict itself, or the dicts that contain its parts.
    """

    path: str | None
    tensors: dict[str, Tensor | ForeignTensor]
    containers: tuple[PickledDict, ...]


def find_state_dict(source: str, graph: Any) -> StateDict:
    """Return the one state dict of a policy in a checkpoint's content.

    Dicts with all parts of a policy are preferred to those with fewer, and these to any other dict of tensors.

    Args:
        source: name of the file in messages.
        graph: content of the file.

    Raises:
        CheckpointError: there is none, or more than one that fits; the message lists what was found.
    """
    found = list(_candidates(graph))
    parts = [_parts_in(state.tensors) for state in found]
    fitting = [state for state, names in zip(found, parts) if names >= REQUIRED_PARTS]
    most = max(map(len, parts), default=0)
    if not fitting and most:
        fitting = [state for state, names in zip(found, parts) if len(names) == most]
    if not fitting:
        known = [state for state in found if state.path in WRAPPERS]
        fitting = [min(known, key=lambda state: WRAPPERS.index(state.path))] if known else found
    different: dict[frozenset, StateDict] = {}
    for state in fitting:  # the same state dict often has two keys
        different.setdefault(frozenset((without_wrappers(n), t) for n, t in state.tensors.items()), state)
    if len(different) > 1:
        names = [state.path or "the file itself" for state in different.values()]
        more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
        raise CheckpointError(
            f"{source} holds {len(names)} sets of weights, {' and '.join(map(shown, names[:_MAX_SHOWN]))}{more}, "
            f"expected one; save only the one that shall drive, as model_state_dict"
        )
    if not fitting:
        raise CheckpointError(_nothing_found(source, graph))
    state = fitting[0]
    _check_values(source, state)
    return state


def _parts_in(tensors: Mapping[str, Any]) -> set[str]:
    return {word for name in tensors for word in name.split(".")[:-1] if word in PART_NAMES}


def _candidates(graph: Any) -> Iterator[StateDict]:
    """Yield each dict that holds tensors by name, and each whose values are the parts of a policy, nearest first."""
    pending: deque[tuple[tuple[str, ...], Any]] = deque([((), graph)])
    seen: set[int] = set()
    while pending and len(seen) < _MAX_CONTAINERS:
        path, value = pending.popleft()
        if id(value) in seen or len(path) > _MAX_DEPTH:
            continue
        seen.add(id(value))
        children: dict[str, Any] = {}
        if isinstance(value, PickledDict):
            children = value.named()
            where = ".".join(path) if path else None
            tensors = {key: child for key, child in children.items() if isinstance(child, (Tensor, ForeignTensor))}
            if {key for key, child in children.items() if isinstance(child, PickledDict)} >= REQUIRED_PARTS:
                containers: list[PickledDict] = []
                joined = {}
                for key in (key for key in PART_NAMES if isinstance(children.get(key), PickledDict)):
                    joined |= _joined(children[key], f"{key}.", containers)
                yield StateDict(where, joined, tuple(containers))
            elif tensors:
                yield StateDict(where, tensors, (value,))
        elif isinstance(value, (list, tuple)):
            children = {str(place): child for place, child in enumerate(value[:_MAX_SHOWN])}
        pending += [
            ((*path, key), child)
            for key, child in children.items()
            if isinstance(child, (PickledDict, list, tuple)) and id(child) not in seen
        ]


def _joined(
    part: PickledDict, path: str, containers: list[PickledDict], depth: int = 0
) -> dict[str, Tensor | ForeignTensor]:
    """Return the tensors of a dict of dicts by their keys joined with dots; add the dicts to `containers`."""
    containers.append(part)
    tensors = {}
    for key, child in part.named().items():
        if isinstance(child, (Tensor, ForeignTensor)):
            tensors[path + key] = child
        elif isinstance(child, PickledDict) and depth < _MAX_DEPTH and len(containers) < _MAX_CONTAINERS:
            tensors |= _joined(child, f"{path}{key}.", containers, depth + 1)
    return tensors


def _check_values(source: str, state: StateDict) -> None:
    """Refuse a state dict with a tensor whose values are not stored as they are, or with an object that may be one."""
    for name, tensor in state.tensors.items():
        if isinstance(tensor, ForeignTensor):
            raise CheckpointError(
                f"{source}: {shown(name)} is {tensor.what}, expected a dense tensor; save it again {tensor.advice}"
            )
    for key, value in (pair for container in state.containers for pair in container.pairs):
        if not isinstance(key, str) and isinstance(value, (Tensor, ForeignTensor)):
            raise CheckpointError(
                f"{source} holds a tensor under {shown(key)}, expected names that are text; save model.state_dict()"
            )
        if isinstance(value, (PickledObject, Global, Storage)) and not is_plain_object(value):
            raise CheckpointError(
                f"{source}: {shown(key)} is {describe(value)}, expected a tensor; save model.state_dict() alone"
            )


def is_plain_object(value: Any) -> bool:
    """Return whether an object is only a set of attributes, such as training arguments."""
    return isinstance(value, PickledObject) and value.name in ("argparse.Namespace", "types.SimpleNamespace")


def describe(value: Any) -> str:
    """Return in a few words what a value in a checkpoint is."""
    if isinstance(value, PickledObject):
        made = value.arguments[0] if value.arguments else None
        name = made.name if value.name.endswith("._reconstruct") and isinstance(made, Global) else value.name
        return f"an object of {name[:100]}"
    if isinstance(value, Global):
        return f"the class or function {value.name[:100]}"
    if isinstance(value, PickledDict):
        return "a dict"
    if isinstance(value, (Tensor, ForeignTensor)):
        return "a tensor"
    return "nothing" if value is None else f"a {type(value).__name__.lower()}"


def _nothing_found(source: str, graph: Any) -> str:
    if isinstance(graph, PickledObject) or not isinstance(graph, PickledDict):
        return (
            f"{source} holds {describe(graph)}, expected a dict with the model's tensors by name; "
            f"save model.state_dict()"
        )
    found = ", ".join(f"{shown(key)}: {describe(value)}" for key, value in graph.pairs[: 2 * _MAX_SHOWN])
    return (
        f"{source} holds no tensors by name ({found or 'an empty dict'}), expected a policy's; "
        f"give the file that training wrote, or save model.state_dict()"
    )


def shown(key: Any) -> str:
    """Return a key for a message: short, and on one line."""
    return shown_name(str(key) if isinstance(key, (str, int, float, bool)) else describe(key))
