"""Find a policy's state dict in what a checkpoint holds, and give its tensors their own names. No torch.

Training scripts keep the weights under keys of their choice, beside optimizers, averaged copies and statistics, and
wrap modules in others, which shows in the tensors' names. The parts of the family (family.PART_NAMES) tell which dict
is the policy's. Where two would do, nothing is chosen.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.layout import PART_NAMES, REQUIRED_PARTS
from mobile_vla_inference.policy.storage.pickle_graph import (
    ForeignTensor,
    Global,
    PickledDict,
    PickledObject,
    Storage,
    Tensor,
)

#: Keys of a training checkpoint that often hold the model's state dict; any other is found too.
WRAPPERS = ("model_state_dict", "state_dict", "model")

#: What DataParallel, a holding module, torch.compile and FSDP put before every key.
PREFIXES = ("module.", "model.", "_orig_mod.", "_fsdp_wrapped_module.", "policy.", "net.")

#: Words that wrappers of modules put into names at any place: they hold the wrapped module under this attribute.
_WRAPPER_WORDS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)

_MAX_DEPTH = 5
_MAX_CONTAINERS = 100_000
_MAX_SHOWN = 3


@dataclass(frozen=True)
class StateDict:
    """The tensors of a policy as a file has them.

    Attributes:
        path: the keys that lead to it, joined by dots; None where the file is nothing else.
        tensors: what it holds by key.
        containers: the dict itself, or the dicts that it is made of.
    """

    path: str | None
    tensors: dict[str, Tensor | ForeignTensor]
    containers: tuple[PickledDict, ...]


def find_state_dict(source: str, graph: Any) -> StateDict:
    """Return the one state dict of a policy in a checkpoint's content.

    Dicts with all parts of a policy are preferred to those with fewer, and these to any other dict of tensors.

    Args:
        source: what the messages call the file.
        graph: what the file holds.

    Raises:
        CheckpointError: there is none, or more than one that fits; the message names what was found.
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
    for state in fitting:  # one state dict is often there twice, under two names
        different.setdefault(frozenset((_without_wrappers(n), t) for n, t in state.tensors.items()), state)
    if len(different) > 1:
        names = [state.path or "the file itself" for state in different.values()]
        more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
        raise CheckpointError(
            f"{source} holds {len(names)} sets of weights, {' and '.join(map(shown, names[:_MAX_SHOWN]))}{more}, "
            f"expected one; save the one that is to drive alone, as model_state_dict"
        )
    if not fitting:
        raise CheckpointError(_nothing_found(source, graph))
    state = fitting[0]
    _check_values(source, state)
    return state


def clean_names(source: str, names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Return what stands before every name, and each tensor's name in the file by its own name.

    Words of wrapping modules are left out wherever they stand. Then the prefix before a policy's parts goes, or one of
    PREFIXES that all names share.

    Raises:
        CheckpointError: two prefixes hold a policy each, or two names become one.
    """
    unwrapped = {name: _without_wrappers(name) for name in names}
    prefix = _policy_prefix(source, unwrapped.values())
    own = {name: short.removeprefix(prefix) for name, short in unwrapped.items()}
    while shared := next((p for p in PREFIXES if own and all(name.startswith(p) for name in own.values())), None):
        own = {name: short.removeprefix(shared) for name, short in own.items()}
    files: dict[str, str] = {}
    for name, short in own.items():
        if short in files:
            raise CheckpointError(
                f"{source} holds {shown(files[short])} and {shown(name)}, which are {shown(short)} twice, expected "
                f"each tensor once; save the state dict of the bare module"
            )
        files[short] = name
    before = {name.removesuffix(short) if name.endswith(short) else None for short, name in files.items()}
    return before.pop() or "" if len(before) == 1 else "", files


def _without_wrappers(name: str) -> str:
    *words, last = name.split(".")
    return ".".join([*(word for word in words if word not in _WRAPPER_WORDS), last])


def _policy_prefix(source: str, names: Iterable[str]) -> str:
    """Return what stands before all parts of a policy; empty where no prefix has all of them."""
    parts: dict[str, set[str]] = defaultdict(set)
    for name in names:
        words = name.split(".")[:-1]
        place = next((i for i, word in enumerate(words) if word in PART_NAMES), None)
        if place is not None:
            parts["".join(f"{word}." for word in words[:place])].add(words[place])
    whole = sorted(prefix for prefix, found in parts.items() if found >= REQUIRED_PARTS)
    if len(whole) > 1:
        raise CheckpointError(
            f"{source} holds {len(whole)} sets of weights, "
            f"{' and '.join(shown(prefix + '*') for prefix in whole[:_MAX_SHOWN])}, expected one; "
            f"save the one that is to drive alone, as model_state_dict"
        )
    return whole[0] if whole else ""


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
    """Refuse a state dict with a tensor that is not simply its stored values, or something that may be one."""
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
    """Tell whether an object is no more than its attributes: training arguments, mostly."""
    return isinstance(value, PickledObject) and value.name in ("argparse.Namespace", "types.SimpleNamespace")


def describe(value: Any) -> str:
    """Return in a few words what something in a checkpoint is."""
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


def shown(name: Any) -> str:
    """Return a key or a record's name for a message: short, and on one line."""
    text = str(name) if isinstance(name, (str, int, float, bool)) else describe(name)
    return text if text.isprintable() and len(text) <= 120 else f"{text[:120]!a}..."
