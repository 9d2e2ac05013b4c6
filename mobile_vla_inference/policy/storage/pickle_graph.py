"""The object graph that the pickle of a `.pth` describes, built without running it. No torch.

A pickle is a program for a small stack machine. This module reads its instructions one by one (pickletools decodes
them) and builds only descriptions: dicts and lists, numbers and text, and `Tensor` where the pickle calls one of
torch's rebuild functions with arguments that torch would take. A class or function with any other name becomes a
`PickledObject`, which keeps what it was given: nothing is imported, nothing that the file names is called, and no key
of the file is hashed, so that a file can't make it slow either.
"""

from __future__ import annotations

import pickletools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mobile_vla_inference.policy.storage.number_types import ITEM_BYTES, STORAGE_TYPES, is_differentiable, numpy_values

#: More instructions describe no policy: the published file's pickle has some 60,000.
MAX_OPERATIONS = 1_000_000

_MAX_RANK = 8
_MAX_COUNT = 1 << 48
_MAX_NUMPY_VALUES = 200

#: What may be built from a pickle's bytes raises one of these where they are damaged.
MALFORMED = (ValueError, TypeError, LookupError, OverflowError, struct.error)


@dataclass(frozen=True)
class Global:
    """A class or function that the pickle names; only its name is known."""

    name: str


@dataclass(eq=False)
class PickledDict:
    """A dict, OrderedDict, defaultdict or Counter: keys and values in the order of the file."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def named(self) -> dict[str, Any]:
        """Return the values under keys that are text; of a key that is there twice the last, as in a dict."""
        return {key: value for key, value in self.pairs if isinstance(key, str)}


@dataclass(eq=False)
class PickledObject(PickledDict):
    """An object of a class that is not known here: what the pickle gave it, and nothing done with it.

    Attributes:
        name: of its class, or of the function that would have made it.
        arguments: what that would have been called with.
        state: what the object's attributes would have been set from.
        items: what would have been appended.
    """

    name: str = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    @property
    def attributes(self) -> PickledDict | None:
        """Its attributes, where its state is a plain dict of them."""
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
        """Place of its last value in its storage; -1 where it has none."""
        if 0 in self.shape:
            return -1
        return self.offset + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides))


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor whose values are not simply those in its storage.

    Attributes:
        what: what it is, such as `a sparse tensor`.
        advice: what makes a plain tensor of it.
    """

    what: str
    advice: str


@dataclass(frozen=True)
class NumpyType:
    """The type of a numpy array or scalar."""

    code: str
    is_big_endian: bool = False


#: Instructions that push the value they carry.
_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)


class Instruction(ValueError):  # noqa: N818 - a message about one, caught as damage
    """An instruction that the pickle of a checkpoint doesn't have, or one with the wrong arguments."""


class TooMany(Instruction):
    """More instructions than MAX_OPERATIONS."""


def read_graph(data: bytes, check_global: Callable[[str], None]) -> tuple[Any, dict[str, Storage]]:
    """Return what a pickle describes, and the storages that it names by their keys.

    Args:
        data: the pickle, protocols 2 to 5.
        check_global: called with the name of each class and function, to raise for those that no file may name.

    Raises:
        TooMany: it has more than MAX_OPERATIONS instructions.
        Instruction, or another of MALFORMED: it is damaged, or no pickle that torch.save writes.
    """
    return _Machine(check_global).run(data)


class _Machine:
    """The stack machine: torch's own rules for what is a tensor, and inert objects for everything else."""

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
            **dict.fromkeys(_FOREIGN, None),
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
            raise Instruction(f"items for {_kind(target)}")
        target.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, PickledDict) or len(values) % 2:
            raise Instruction(f"{len(values)} keys and values for {_kind(target)}")
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
            raise Instruction("a dict of something else than pairs")
        return PickledDict(pairs)

    @staticmethod
    def _set(items: Any = ()) -> list[Any]:
        return list(items)

    @staticmethod
    def _size(lengths: Any = ()) -> tuple[Any, ...]:
        return tuple(lengths)

    # --- classes, functions and objects ---

    def _global(self, module: Any, name: Any) -> None:
        # Protocol 2 has the names of Python 2, as pickle and torch translate them too.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full_name = f"{module}.{name}"
        if not all(part.isidentifier() for part in full_name.split(".")):
            raise Instruction("the name of a class or function that is none")
        self._check_global(full_name)
        self._push(Global(full_name))

    def _reduce(self, function: Any, arguments: Any) -> None:
        self._push(self._call(function, arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return what a call is known to give: a description, or an inert object that keeps the arguments."""
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise Instruction(f"a call of {_kind(function)}")
        if function.name in _FOREIGN:
            return _foreign(function.name, arguments)
        if function.name in self._functions:
            return self._functions[function.name](*arguments)
        if function.name in _PLAIN:
            try:
                value = _PLAIN[function.name](*arguments)
            except MALFORMED:
                value = None  # not as its library saves it: kept, not read
            if value is not None:
                return value
        return PickledObject(name=function.name, arguments=arguments)

    def _new(self, cls: Any, arguments: Any) -> None:
        if not isinstance(cls, Global) or not isinstance(arguments, tuple):
            raise Instruction(f"a new object of {_kind(cls)}")
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
            raise Instruction(f"a state for {_kind(target)}")
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
        if len(shape) > _MAX_RANK or not all(map(is_count, (offset, *shape, *strides))):
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
        return _with_metadata(_with_gradient(tensor, grad), metadata)

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
            raise Instruction("a tensor of an unknown number type")
        tensor = self._described(storage, dtype_name, offset, shape, strides)
        return _with_metadata(_with_gradient(tensor, grad), metadata)

    @staticmethod
    def _parameter(data: Any, grad: Any, _hooks: Any, state: Any = None) -> Tensor | ForeignTensor:
        return _with_attributes(_with_gradient(data, grad), state)

    def _tensor_of_class(self, function: Any, cls: Any, arguments: Any, state: Any) -> Tensor | ForeignTensor:
        name = cls.name if isinstance(cls, Global) else ""
        rebuilt = isinstance(function, Global) and (function.name in self._functions or function.name in _FOREIGN)
        if name not in _PLAIN_CLASSES or not rebuilt:
            return ForeignTensor(f"a tensor of the class {name or 'unknown'}", "as a plain torch.Tensor")
        value = self._call(function, arguments)
        if not isinstance(value, (Tensor, ForeignTensor)):
            raise Instruction("a tensor that is none")
        return _with_attributes(value, state)


def is_count(value: Any) -> bool:
    """Tell whether a value from outside is a number of things."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_COUNT


def _kind(value: Any) -> str:
    return value.name if isinstance(value, Global) else type(value).__name__


def _with_gradient(value: Any, grad: Any) -> Tensor | ForeignTensor:
    """Return the tensor; refuse what torch refuses: integers that ask for gradients."""
    if not isinstance(value, (Tensor, ForeignTensor)) or not isinstance(grad, bool):
        raise Instruction("a parameter of an unknown kind")
    if grad and isinstance(value, Tensor) and not is_differentiable(value.dtype):
        raise Instruction(f"a gradient of {value.dtype}")
    return value


def _with_metadata(tensor: Tensor | ForeignTensor, metadata: Any) -> Tensor | ForeignTensor:
    """Return the tensor, or a foreign one where the metadata says that the values are not as they are stored."""
    if not metadata or (isinstance(metadata, PickledDict) and not metadata.pairs):
        return tensor
    marks = ", ".join(sorted(map(str, metadata.named()))) if isinstance(metadata, PickledDict) else "unknown"
    return ForeignTensor(
        f"a tensor that is lazily changed ({marks[:40]})", "after .resolve_conj().resolve_neg(), as plain values"
    )


def _with_attributes(tensor: Tensor | ForeignTensor, state: Any) -> Tensor | ForeignTensor:
    """Return the tensor, or a foreign one where an attribute that was saved with it replaces its values."""
    for attributes in state if isinstance(state, tuple) else (state,):
        if attributes is None:
            continue
        if not isinstance(attributes, PickledDict) or isinstance(attributes, PickledObject):
            raise Instruction("a tensor with attributes of an unknown kind")
        for name, _ in attributes.pairs:
            if not isinstance(name, str):
                raise Instruction("a tensor with an attribute without a name")
            if name in _VALUE_ATTRIBUTES or name.startswith("__"):
                return ForeignTensor(f"a tensor whose attribute {name[:40]!r} replaces it", "as a plain torch.Tensor")
    return tensor


#: Attributes of a tensor that are its values.
_VALUE_ATTRIBUTES = ("data", "real", "imag")

#: Classes whose values are those of a plain tensor.
_PLAIN_CLASSES = (
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.Parameter",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
)

#: torch's functions that build tensors of other kinds: what they are, and what to do about it.
_FOREIGN = {
    "torch._utils._rebuild_sparse_tensor": ("a sparse tensor", "after .to_dense()"),
    "torch._utils._rebuild_sparse_csr_tensor": ("a sparse tensor", "after .to_dense()"),
    "torch._utils._rebuild_qtensor": ("a quantized tensor", "after .dequantize()"),
    "torch._utils._rebuild_nested_tensor": ("a nested tensor", "as plain tensors"),
    "torch._utils._rebuild_mkldnn_tensor": ("an MKL-DNN tensor", "after .to_dense()"),
    "torch._utils._rebuild_meta_tensor_no_storage": ("a tensor on the meta device, without values", "with its values"),
    "torch._utils._rebuild_device_tensor_from_numpy": ("a numpy array of a tensor", "after .cpu()"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": ("a tensor of another kind of device", "after .cpu()"),
    "torch._utils._rebuild_xla_tensor": ("a tensor of an XLA device", "after .cpu()"),
    "torch._utils._rebuild_wrapper_subclass": ("a tensor of a class of its own", "as a plain torch.Tensor"),
}


def _foreign(function: str, arguments: tuple[Any, ...]) -> ForeignTensor:
    what, advice = _FOREIGN[function]
    if function.endswith("_sparse_tensor") and arguments and isinstance(arguments[0], str):
        what += f" ({arguments[0][:40]})"
    elif function.endswith("_wrapper_subclass") and arguments and isinstance(arguments[0], Global):
        what = f"a tensor of the class {arguments[0].name[:80]}"
    return ForeignTensor(what, advice)


# --- plain values beside the tensors: each returns None where it is not what the library saves ---


def _bytes(text: str = "", encoding: str = "latin1") -> bytes | None:
    return text.encode("latin1") if encoding in ("latin1", "latin-1") else None


def _bytearray(content: Any = b"", encoding: str = "latin1") -> bytes | None:
    return _bytes(content, encoding) if isinstance(content, str) else bytes(content) if type(content) is bytes else None


def _joined_path(*parts: str) -> str:
    return "/".join(parts).replace("//", "/", 1) if parts else "."


def _device(kind: str, index: int | None = None) -> str:
    return kind if index is None else f"{kind}:{index:d}"


def _numpy_scalar(dtype: NumpyType, data: bytes) -> Any:
    values = numpy_values(dtype.code, dtype.is_big_endian, data)
    return None if values is None else values[0]


_PLAIN: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _bytes,
    "builtins.bytearray": _bytearray,
    "builtins.complex": lambda real, imaginary=0.0: f"{complex(real, imaginary)}",
    "builtins.range": lambda *ends: f"range{ends[:2]}"[:80] if all(type(end) is int for end in ends) else None,
    "pathlib.Path": _joined_path,
    "pathlib.PosixPath": _joined_path,
    "pathlib.PurePosixPath": _joined_path,
    "pathlib._local.PosixPath": _joined_path,
    "pathlib._local.PurePosixPath": _joined_path,
    "torch.device": _device,
    "torch.serialization._get_layout": lambda name: str(name)[:40],
    "numpy.dtype": lambda code, *_: NumpyType(str(code)[:20]),
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}


def numpy_array_values(value: PickledObject) -> Any:
    """Return a small array of plain numbers as numbers in lists of one level; None for any other object."""
    if not value.name.endswith("multiarray._reconstruct") or not isinstance(value.state, tuple):
        return None
    try:
        _version, shape, dtype, _is_fortran, data = value.state
        values = numpy_values(dtype.code, dtype.is_big_endian, data[: 8 * _MAX_NUMPY_VALUES + 8])
    except (*MALFORMED, AttributeError):
        return None
    if values is None or len(values) > _MAX_NUMPY_VALUES or len(shape) > 1:
        return None
    return values if shape else values[0] if values else None
