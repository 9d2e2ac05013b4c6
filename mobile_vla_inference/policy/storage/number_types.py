"""The data types that checkpoint files name: torch's names, sizes, and how one value is read."""

from __future__ import annotations

import struct
from typing import Any

#: Bytes per value of the data types that a tensor can have, by torch's names.
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,  # two values in a byte, counted as one by torch
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex128": 16,
    "complex64": 8,
    "complex32": 4,
    "qint32": 4,
    "qint8": 1,
    "quint8": 1,
    "quint4x2": 1,
    "quint2x4": 1,
    "bits8": 1,
    "bits16": 2,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
}

#: torch's storage classes, one for each storage of a .pth; an untyped storage counts bytes.
STORAGE_TYPES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.QInt32Storage": "qint32",
    "torch.QInt8Storage": "qint8",
    "torch.QUInt8Storage": "quint8",
    "torch.QUInt4x2Storage": "quint4x2",
    "torch.QUInt2x4Storage": "quint2x4",
    "torch.storage.UntypedStorage": "uint8",
}

#: Number types of safetensors files, by their codes.
SAFETENSORS_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}

#: Formats of struct for one value, by torch's names.
_FORMATS = {
    "float64": "d",
    "float32": "f",
    "float16": "e",
    "int64": "q",
    "int32": "i",
    "int16": "h",
    "int8": "b",
    "uint64": "Q",
    "uint32": "I",
    "uint16": "H",
    "uint8": "B",
    "bool": "?",
}

#: Formats of struct for one value, by the codes that numpy saves.
_NUMPY_FORMATS = {
    "f2": "e",
    "f4": "f",
    "f8": "d",
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
}


#: More dimensions than any tensor of a policy has.
MAX_RANK = 8

_MAX_COUNT = 1 << 48


def is_count(value: Any) -> bool:
    """Return whether a value from a file is a count: a whole number from 0 to 2^48."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_COUNT


def is_differentiable(dtype: str) -> bool:
    """Return whether tensors of this type can have gradients; torch builds none with gradients of another type."""
    return dtype.startswith(("float", "bfloat", "complex"))


def scalar(dtype: str, data: bytes) -> float | int | bool | None:
    """Return the one little-endian value in `data`; None if its type is not a plain number's."""
    if dtype == "bfloat16":  # the upper half of a float32
        dtype, data = "float32", bytes(2) + data
    return struct.unpack("<" + _FORMATS[dtype], data)[0] if dtype in _FORMATS else None


def numpy_values(code: str, is_big_endian: bool, data: bytes) -> list[float | int | bool] | None:
    """Return the values that numpy saved as bytes; None if its type `code` is not a plain number's.

    Raises:
        struct.error: `data` is not a whole number of values.
    """
    if code not in _NUMPY_FORMATS:
        return None
    order = ">" if is_big_endian else "<"
    return [value for (value,) in struct.iter_unpack(order + _NUMPY_FORMATS[code], data)]
