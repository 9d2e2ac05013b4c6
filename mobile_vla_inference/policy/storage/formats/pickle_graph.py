"""Read what the pickle of a `.pth` describes, without running it.

A pickle is a program for a small stack machine. This module reads its instructions one by one (pickletools decodes
them) and builds only descriptions: dicts and lists, numbers and text, and `Tensor` where the pickle calls one of
torch's rebuild functions with arguments that torch accepts. A class or function with any other name becomes a
`PickledObject`, which keeps its arguments: nothing is imported, nothing that the file names is called, and no key of
the file is hashed, so that colliding keys can't make it slow.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any

from mobile_vla_inference.policy.storage.formats.damage import MALFORMED
from mobile_vla_inference.policy.storage.formats.pickle_values import (
    ForeignTensor,
    Global,
    Instruction,
    NumpyType,
    PickledDict,
    PickledObject,
    Storage,
    Tensor,
    TooMany,
    kind_of,
)
from mobile_vla_inference.policy.storage.formats.pickled_plain_values import PLAIN_CALLS
from mobile_vla_inference.policy.storage.formats.pickled_tensors import (
    FOREIGN,
    PLAIN_CLASSES,
    foreign_tensor,
    with_attributes,
    with_gradient,
    with_metadata,
)
from mobile_vla_inference.policy.storage.number_types import ITEM_BYTES, MAX_RANK, STORAGE_TYPES, is_count

#: Limit of the instructions; the published file's pickle has about 60,000.
MAX_OPERATIONS = 1_000_000

#: Instructions that push the value they carry.
_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)


def read_graph(data: bytes, check_global: Callable[[str], None]) -> tuple[Any, dict[str, Storage]]:
    """Return the value that a pickle describes, and the storages that it names, by their keys.

    Args:
        data: the pickle, protocols 2 to 5.
        check_global: called with the name of each class and function; it raises for those that no file may name.

    Raises:
        TooMany: it has more than MAX_OPERATIONS instructions.
        Instruction, or another of DAMAGED: it is damaged, or torch.save did not write it.
    """
    return _Machine(check_global).run(data)


class _Machine:
    """The stack machine: it follows torch's rules for tensors, and keeps all other objects as descriptions."""

    def __init__(self, check_global: Callable[[str], None]) -> None:
        self._check_global = check_global
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, Storage] = {}
        self._functions: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor_v2,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter,
            "torch._tensor._rebuild_from_type_v2": self._tensor_of_class,
            **dict.fromkeys(FOREIGN, None),
            "collections.OrderedDict": self._dict,
            "collections.Counter": self._dict,
            "collections.defaultdict": lambda *_: PickledDict(),
            "builtins.set": self._set,
            "builtins.frozenset": self._set,
            "torch.Size": self._size,
        }
        self._operations: dict[str, Callable[[Any], None]] = {
            "NONE": lambda _: self._push(None),
            "NEWTRUE": lambda _: self._push(True),
            "NEWFALSE": lambda _: self._push(False),
            **dict.fromkeys(_LITERALS, self._push),
            **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda _: self._push([])),
            "EMPTY_TUPLE": lambda _: self._push(()),
            "EMPTY_DICT": lambda _: self._push(PickledDict()),
            "SHORT_BINSTRING": lambda text: self._push(text.encode("latin1").decode("utf-8")),
            "MARK": self._mark,
            "TUPLE": lambda _: self._push(tuple(self._pop_mark())),
            "TUPLE1": lambda _: self._push(tuple(self._pop(1))),
            "TUPLE2": lambda _: self._push(tuple(self._pop(2))),
            "TUPLE3": lambda _: self._push(tuple(self._pop(3))),
            "FROZENSET": lambda _: self._push(self._pop_mark()),
            "APPEND": lambda _: self._append(self._pop(1)),
            "APPENDS": lambda _: self._append(self._pop_mark()),
            "ADDITEMS": lambda _: self._append(self._pop_mark()),
            "SETITEM": lambda _: self._set_items(self._pop(2)),
            "SETITEMS": lambda _: self._set_items(self._pop_mark()),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._put),
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda place: self._push(self._memo[place])),
            "GLOBAL": lambda name: self._global(*name.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._global(*self._pop(2)),
            "REDUCE": lambda _: self._reduce(*self._pop(2)),
            "NEWOBJ": lambda _: self._new(*self._pop(2)),
            "NEWOBJ_EX": lambda _: self._new(*self._pop(3)[:2]),
            "BUILD": lambda _: self._build(*self._pop(1)),
            "BINPERSID": lambda _: self._push(self._storage(*self._pop(1))),
            "FRAME": lambda _: None,
        }

    def run(self, data: bytes) -> tuple[Any, dict[str, Storage]]:
        protocol = 2
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            name = opcode.name
            if name == "STOP":
                return self._pop(1)[0], self._storages
            if name == "PROTO" and count == 0 and argument <= 5:
                protocol = max(argument, 2)
            elif name in self._operations and opcode.proto <= protocol:
                self._operations[name](argument)
            else:
                raise Instruction(f"instruction {name} of protocol {opcode.proto}")
            if count >= MAX_OPERATIONS:
                raise TooMany
        raise Instruction("no end")

    # --- the stack ---

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise Instruction("an instruction without its operands")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        values = self._stack
        self._stack = self._marked.pop()
        return values

    def _put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    # --- containers ---

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, PickledObject):
            target = target.items
        if not isinstance(target, list):
            raise Instruction(f"items for {kind_of(target)}")
        target.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, PickledDict) or len(values) % 2:
            raise Instruction(f"{len(values)} keys and values for {kind_of(target)}")
        target.pairs.extend(zip(values[::2], values[1::2]))

    @staticmethod
    def _dict(*arguments: Any) -> PickledDict:
        if not arguments:
            return PickledDict()
        (content,) = arguments
        if isinstance(content, PickledDict):
            return PickledDict(list(content.pairs))
        pairs = [tuple(pair) for pair in content]
        if any(len(pair) != 2 for pair in pairs):
            raise Instruction("a dict of other items than pairs")
        return PickledDict(pairs)

    @staticmethod
    def _set(items: Any = ()) -> list[Any]:
        return list(items)

    @staticmethod
    def _size(lengths: Any = ()) -> tuple[Any, ...]:
        return tuple(lengths)

    # --- classes, functions and objects ---

    def _global(self, module: Any, name: Any) -> None:
        # Protocol 2 has the names of Python 2; pickle and torch translate them in the same way.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full_name = f"{module}.{name}"
        if not all(part.isidentifier() for part in full_name.split(".")):
            raise Instruction("a class or function with an invalid name")
        self._check_global(full_name)
        self._push(Global(full_name))

    def _reduce(self, function: Any, arguments: Any) -> None:
        self._push(self._call(function, arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return the result of a call that is known here, or a PickledObject that keeps the arguments."""
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise Instruction(f"a call of {kind_of(function)}")
        if function.name in FOREIGN:
            return foreign_tensor(function.name, arguments)
        if function.name in self._functions:
            return self._functions[function.name](*arguments)
        if function.name in PLAIN_CALLS:
            try:
                value = PLAIN_CALLS[function.name](*arguments)
            except MALFORMED:
                value = None  # not what its library saves: the arguments are kept instead
            if value is not None:
                return value
        return PickledObject(name=function.name, arguments=arguments)

    def _new(self, cls: Any, arguments: Any) -> None:
        if not isinstance(cls, Global) or not isinstance(arguments, tuple):
            raise Instruction(f"a new object of {kind_of(cls)}")
        if cls.name in ("collections.OrderedDict", "collections.Counter", "collections.defaultdict"):
            self._push(PickledDict())
        elif cls.name in self._functions:
            raise Instruction(f"a new object of {cls.name}")
        else:
            self._push(PickledObject(name=cls.name, arguments=arguments))

    def _build(self, state: Any) -> None:
        target = self._stack[-1]
        if isinstance(target, PickledObject):
            target.state = state
        elif isinstance(target, NumpyType):
            self._stack[-1] = NumpyType(target.code, isinstance(state, tuple) and len(state) > 1 and state[1] == ">")
        elif not isinstance(target, PickledDict) or not isinstance(state, PickledDict):
            raise Instruction(f"a state for {kind_of(target)}")
        # else: attributes of an OrderedDict, such as the _metadata of a state dict

    # --- storages and tensors, as torch's own functions of these names take them ---

    def _storage(self, pid: Any) -> Storage:
        kind, storage_type, key, _device, count = pid
        dtype = STORAGE_TYPES.get(storage_type.name) if isinstance(storage_type, Global) else None
        if kind != "storage" or dtype is None or not isinstance(key, str) or not is_count(count):
            raise Instruction("a storage of an unknown kind")
        storage = Storage(key, dtype, count)
        if self._storages.setdefault(key, storage) != storage:
            raise Instruction(f"two kinds of storage in data/{key[:40]}")
        return storage

    @staticmethod
    def _described(storage: Any, dtype: str, offset: Any, shape: Any, strides: Any) -> Tensor:
        if not isinstance(storage, Storage) or not isinstance(shape, (tuple, list)) or len(shape) != len(strides):
            raise Instruction("a tensor of an unknown kind")
        if len(shape) > MAX_RANK or not all(map(is_count, (offset, *shape, *strides))):
            raise Instruction("a tensor of an unknown size")
        tensor = Tensor(storage, dtype, offset, tuple(shape), tuple(strides))
        if (tensor.last + 1) * ITEM_BYTES[dtype] > storage.nbytes:
            raise Instruction(
                f"a tensor that reaches value {tensor.last} of {storage.nbytes // ITEM_BYTES[dtype]} in its storage"
            )
        return tensor

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
        return self._described(storage, storage.dtype, offset, shape, strides)

    def _tensor_v2(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, _hooks: Any, metadata: Any = None
    ) -> Tensor | ForeignTensor:
        tensor = self._described(storage, storage.dtype, offset, shape, strides)
        return with_metadata(with_gradient(tensor, grad), metadata)

    def _tensor_v3(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        grad: Any,
        _hooks: Any,
        dtype: Any,
        metadata: Any = None,
    ) -> Tensor | ForeignTensor:
        dtype_name = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""
        if dtype_name not in ITEM_BYTES:
            raise Instruction("a tensor of an unknown data type")
        tensor = self._described(storage, dtype_name, offset, shape, strides)
        return with_metadata(with_gradient(tensor, grad), metadata)

    @staticmethod
    def _parameter(data: Any, grad: Any, _hooks: Any, state: Any = None) -> Tensor | ForeignTensor:
        return with_attributes(with_gradient(data, grad), state)

    def _tensor_of_class(self, function: Any, cls: Any, arguments: Any, state: Any) -> Tensor | ForeignTensor:
        name = cls.name if isinstance(cls, Global) else ""
        rebuilt = isinstance(function, Global) and (function.name in self._functions or function.name in FOREIGN)
        if name not in PLAIN_CLASSES or not rebuilt:
            return ForeignTensor(f"a tensor of the class {name or 'unknown'}", "as a plain torch.Tensor")
        value = self._call(function, arguments)
        if not isinstance(value, (Tensor, ForeignTensor)):
            raise Instruction("a call for a tensor that returns none")
        return with_attributes(value, state)
