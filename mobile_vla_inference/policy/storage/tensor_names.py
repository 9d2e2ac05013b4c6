"""The names of a policy's tensors, without the words that wrapping modules add to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.layout import PART_NAMES, REQUIRED_PARTS

#: Prefixes that DataParallel, an outer module, torch.compile and FSDP put before every key.
PREFIXES = ("module.", "model.", "_orig_mod.", "_fsdp_wrapped_module.", "policy.", "net.")

_MAX_SHOWN = 3

#: Attributes under which wrappers keep the wrapped module; they can be at any place of a name.
_WRAPPER_WORDS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)


def clean_names(source: str, names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Return the prefix of all names, and each tensor's name in the file by its own name.

    Words of wrapping modules are removed at any place. Then the prefix before a policy's parts is removed, or prefixes
    of PREFIXES that all names have.

    Raises:
        CheckpointError: a policy's parts have two prefixes, or two names become one.
    """
    unwrapped = {name: without_wrappers(name) for name in names}
    prefix = _policy_prefix(source, unwrapped.values())
    own = {name: short.removeprefix(prefix) for name, short in unwrapped.items()}
    while shared := next((p for p in PREFIXES if own and all(name.startswith(p) for name in own.values())), None):
        own = {name: short.removeprefix(shared) for name, short in own.items()}
    files: dict[str, str] = {}
    for name, short in own.items():
        if short in files:
            raise CheckpointError(
                f"{source} holds {shown_name(files[short])} and {shown_name(name)}, which are twice "
                f"{shown_name(short)}, expected each tensor once; save the state dict of the bare module"
            )
        files[short] = name
    before = {name.removesuffix(short) if name.endswith(short) else None for short, name in files.items()}
    return before.pop() or "" if len(before) == 1 else "", files


def shown_name(name: str) -> str:
    """Return a name from a file for a message: short, and on one line."""
    return name if name.isprintable() and len(name) <= 120 else f"{name[:120]!a}..."


def without_wrappers(name: str) -> str:
    """Return a name without the words of wrapping modules."""
    *words, last = name.split(".")
    return ".".join([*(word for word in words if word not in _WRAPPER_WORDS), last])


def _policy_prefix(source: str, names: Iterable[str]) -> str:
    """Return the prefix that all parts of a policy have; empty if no prefix has all required parts."""
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
            f"{' and '.join(shown_name(prefix + '*') for prefix in whole[:_MAX_SHOWN])}, expected one; "
            f"save only the one that shall drive, as model_state_dict"
        )
    return whole[0] if whole else ""
