"""Values of a pickle that are not tensors: paths, devices, numpy numbers. They are read without their libraries.

The functions of PLAIN_CALLS return None if the arguments are not what the library saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mobile_vla_inference.policy.storage.formats.damage import MALFORMED
from mobile_vla_inference.policy.storage.formats.pickle_values import NumpyType, PickledObject
from mobile_vla_inference.policy.storage.number_types import numpy_values

_MAX_NUMPY_VALUES = 200


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


#: What a call of each of these functions returns.
PLAIN_CALLS: dict[str, Callable[..., Any]] = {
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
    """Return a small numpy array as a number or a list of numbers; None for any other object."""
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
