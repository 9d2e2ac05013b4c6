"""Where each tensor of a checkpoint lies in its file: name, type, shape, offset. No torch, no tensor data read.

A `.pth` is a zip archive: a pickle that describes the tensors, and one uncompressed record per storage. The pickle is
never run: a restricted unpickler rebuilds only the object graph, and refuses by name whatever a checkpoint doesn't
need. Of a safetensors file only the header is read. What can't be read gives one sentence, as a CheckpointError.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import shlex
import stat
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mobile_vla_inference.border import CheckpointError

#: Bytes per value of the number types that a tensor can have, by torch's names.
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}

#: Keys of a training checkpoint that hold the model's state dict.
WRAPPERS = ("model_state_dict", "state_dict", "model")

#: What DataParallel, a holding module and torch.compile put before every key.
PREFIXES = ("module.", "model.", "_orig_mod.")

SHARD_INDEX_FILE = "model.safetensors.index.json"

#: What follows a quantised weight's name in the name of its scales, one for each row.
SCALE_SUFFIX = "_scale"

_DEAD_KEYS = {
    "lm_head": re.compile(r"(^|\.)lm_head\.(weight|bias)$"),
    "position_ids": re.compile(r"(^|\.)position_ids$"),
}
_STORAGE_TYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
#: Number types of safetensors files, by their codes.
SAFETENSORS_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

#: struct's formats of numpy's scalar types.
_NUMPY_FORMATS = {"f2": "<e", "f4": "<f", "f8": "<d", "b1": "<?", "i2": "<h", "i4": "<i", "i8": "<q", "u1": "<B"}

_MAX_DESCRIPTION_BYTES = 64 << 20  # the published file's data.pkl has 0.2 MB
_MAX_RANK = 8
_BOMB_RATIO = 100
_MAX_PLAIN_DEPTH = 2
_MAX_PLAIN_ITEMS = 200
_MAX_PLAIN_TEXT = 1000
_HEAD_BYTES = 512
_LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # 0x1950a86a20f9469cfc6c, which opens files of torch before 1.6
_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")
_OTHER_FORMATS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (of recorded episodes?)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy array"),
)

#: Opcodes that torch.save and pickle's protocols 2 to 4 use for plain data; others have no place in a checkpoint.
# fmt: off
_OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1",
    "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "SHORT_BINSTRING", "BINSTRING", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET", "DICT", "LIST", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD",
    "BINPERSID",
))
# fmt: on
#: What pickle, zipfile and json raise on damaged input (their documentation names these and leaves the list open).
_MALFORMED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OverflowError,
    MemoryError,
    RecursionError,
    NotImplementedError,
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in its file.

    Attributes:
        dtype: number type by torch's name, a key of ITEM_BYTES.
        shape: sizes.
        nbytes: bytes of its values.
        file: where it lies.
        offset: byte of its first value in `file`.
        strides: in values, where it is not contiguous (a transposed view was saved); else None.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TensorIndex:
    """What a checkpoint file or folder holds.

    Attributes:
        path: the file or folder.
        format: `zip`, `safetensors` or `sharded safetensors`.
        file_size: bytes of all its files.
        tensors: the model's state dict without prefix and without what inference never uses.
        wrapper: key of the training checkpoint that held it; None for a bare state dict.
        prefix: what was stripped from every key.
        metadata: plain values beside the tensors (epoch, val_mae, args as a dict).
        dead: bytes that inference never uses: `optimizer`, `lm_head`, `position_ids`.
        optimizer_shapes: shapes of the parameters that the optimizer trained, where its state is in the file.
        scales: of the int8 weights that have them, by the weight's name; not among `tensors`.
    """

    path: Path
    format: str
    file_size: int
    tensors: dict[str, TensorEntry]
    wrapper: str | None = None
    prefix: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    dead: dict[str, int] = field(default_factory=dict)
    optimizer_shapes: tuple[tuple[int, ...], ...] = ()
    scales: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def stored(self) -> dict[str, TensorEntry]:
        """Every tensor that loading reads, by its key in the module: `tensors` and `scales`."""
        return self.tensors | {name + SCALE_SUFFIX: entry for name, entry in self.scales.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name."""
        return {name: entry.shape for name, entry in self.tensors.items()}


def read_index(path: Path | str) -> TensorIndex:
    """Read where the tensors of a checkpoint lie: a `.pth`, a safetensors file, or a folder of safetensors shards.

    Raises:
        CheckpointError: it is missing, unreadable, damaged, unsafe, or no checkpoint.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_folder(path)
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is no regular file, expected a checkpoint; check the path")
        with path.open("rb") as file:
            return _read_file(path, file)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist, expected a checkpoint (.pth or .safetensors) or a converted folder; check the path"
        ) from error
    except PermissionError as error:
        raise CheckpointError(
            f"{path} can't be opened (permission denied), expected a readable file; "
            f"run chmod a+r on it, or use an account that may read it"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read ({error.strerror or error}), expected a readable file; check the disk and the path"
        ) from error


def _read_file(path: Path, file: BinaryIO) -> TensorIndex:
    size = os.fstat(file.fileno()).st_size
    head = os.pread(file.fileno(), _HEAD_BYTES, 0)
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes), expected a checkpoint; download or copy it again")
    if head.startswith(b"PK"):
        return _read_zip(path, file, size)
    if path.suffix == ".safetensors" or _looks_like_safetensors(head, size):
        tensors, metadata = _read_safetensors(path, file, size)
        return _model_index(path, "safetensors", size, tensors, metadata=metadata)
    if _LEGACY_MAGIC in head[:32]:
        raise CheckpointError(_legacy_sentence(path))
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        _refuse_bare_pickle(path, file)
    raise CheckpointError(f"{path} is {_what_it_is(head, size)}, expected a checkpoint{_what_to_do(head)}")


def _what_it_is(head: bytes, size: int) -> str:
    if head.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer of {size} bytes"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "an HTML page"
    if head[257:262] == b"ustar":
        return "a tar archive"
    for magic, name in _OTHER_FORMATS:
        if head.startswith(magic):
            return name
    return f"{size} bytes that open with {head[:8].hex(' ')}, which no checkpoint does"


def _what_to_do(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "; run git lfs pull where it was cloned"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "; download the file itself, not the page that shows it (a login may be needed)"
    return " (a zip-format .pth or safetensors); give the file that training wrote"


def _legacy_sentence(path: Path) -> str:
    resave = (
        "import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); "
        f"torch.save(torch.load({str(path)!r}, map_location='cpu', weights_only=True), "
        f"{str(path.with_stem(path.stem + '_zip'))!r})"
    )
    return (
        f"{path} is in the format of torch before 1.6, which can't be mapped into memory, expected the zip format; "
        f"save it again on a machine with memory for all of it: python3 -c {shlex.quote(resave)}"
    )


def _refuse_bare_pickle(path: Path, file: BinaryIO) -> None:
    """Raise for a pickle outside an archive: the names it asks for, if unsafe, or else that it is no checkpoint."""
    with contextlib.suppress(*_MALFORMED):  # cut or not plain data: what it is has been found already
        _load_graph(path, file.read(_MAX_DESCRIPTION_BYTES), storages={})
    raise CheckpointError(
        f"{path} is a bare pickle, expected a checkpoint as torch.save writes it (zip format); save it again that way"
    )


# --- zip archives of torch.save ---


def _read_zip(path: Path, file: BinaryIO, size: int) -> TensorIndex:
    records, root = _zip_directory(path, file, size)
    description = records[f"{root}/data.pkl"]
    if description.file_size > _MAX_DESCRIPTION_BYTES:
        raise CheckpointError(
            f"{path} has a data.pkl of {description.file_size / 1e6:.0f} MB, expected at most "
            f"{_MAX_DESCRIPTION_BYTES / 1e6:.0f} MB; it describes no policy: give the file that training wrote"
        )
    byte_order = records.get(f"{root}/byteorder")
    if byte_order is not None and _read_record(path, file, byte_order, size) != b"little":
        raise CheckpointError(f"{path} is not little-endian, expected that; save it again on an x86 or ARM machine")
    data = _read_record(path, file, description, size)
    folder = f"{root}/data/"
    storages = {name.removeprefix(folder): info for name, info in records.items() if name.startswith(folder)}
    try:
        graph = _load_graph(path, data, storages)
    except _MALFORMED as error:
        raise CheckpointError(
            f"{path} has a damaged data.pkl ({str(error)[:120] or type(error).__name__}), expected what torch.save "
            f"writes; download or copy it again"
        ) from error
    wrapper, state = _unwrap(path, graph)
    tensors = {name: _zip_entry(path, file, size, name, tensor) for name, tensor in state.items()}
    rest = {k: v for k, v in graph.items() if k != wrapper} if wrapper else {}
    metadata = {k: _plain(v) for k, v in (rest or graph).items() if isinstance(k, str) and not _holds_tensors(v)}
    optimizer = {tensor.storage.key: tensor.storage.nbytes for tensor in _tensors_in(list(rest.values()))}
    dead = {"optimizer": sum(optimizer.values())}
    return _model_index(
        path,
        "zip",
        size,
        tensors,
        wrapper=wrapper,
        metadata=metadata,
        dead=dead,
        optimizer_shapes=_optimizer_shapes(rest),
    )


def _zip_directory(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """Return the records of a checkpoint's archive by name, and the name of its one folder."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except _MALFORMED as error:
        raise CheckpointError(
            f"{path} is cut off or damaged: its {size} bytes have no zip directory at their end, expected a whole "
            f"checkpoint; compare its size with the source and copy it again"
        ) from error
    records = {info.filename: info for info in infos}
    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        shown = ", ".join(list(records)[:3]) or "nothing"
        raise CheckpointError(
            f"{path} is a zip archive of something else (it holds {shown}), expected a checkpoint as torch.save "
            f"writes it; unpack it, or give the file that training wrote"
        )
    root = roots[0]
    if f"{root}/constants.pkl" in records or any(name.startswith(f"{root}/code/") for name in records):
        raise CheckpointError(
            f"{path} is a TorchScript program, expected a checkpoint with the tensors only; "
            f"save its state_dict() with torch.save"
        )
    _check_stored(path, infos)
    return records, root


def _check_stored(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    packed = [info for info in infos if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1]
    if not packed:
        return
    unpacked_bytes, packed_bytes = sum(i.file_size for i in packed), sum(i.compress_size for i in packed)
    if unpacked_bytes > _BOMB_RATIO * max(packed_bytes, 1):
        raise CheckpointError(
            f"{path} would unpack {packed_bytes} bytes to {unpacked_bytes} (a zip bomb), expected uncompressed records "
            f"as torch.save writes them; don't use this file"
        )
    raise CheckpointError(
        f"{path} has {len(packed)} compressed or encrypted records of {len(infos)}, which can't be mapped into memory, "
        f"expected uncompressed ones; save it again with torch.save, or zip it again with zip -0"
    )


def _read_record(path: Path, file: BinaryIO, info: zipfile.ZipInfo, size: int) -> bytes:
    data = os.pread(file.fileno(), info.file_size, _record_offset(path, file, info, size))
    if zlib.crc32(data) != info.CRC:
        raise CheckpointError(
            f"{path}: {info.filename} doesn't match its checksum, expected an undamaged archive; copy the file again"
        )
    return data


def _record_offset(path: Path, file: BinaryIO, info: zipfile.ZipInfo, size: int) -> int:
    """Return where the data of a stored record begins; its local header is read, because its length varies."""
    header = os.pread(file.fileno(), _ZIP_LOCAL_HEADER.size, info.header_offset)
    if len(header) == _ZIP_LOCAL_HEADER.size:
        magic, name_bytes, extra_bytes = _ZIP_LOCAL_HEADER.unpack(header)
        offset = info.header_offset + len(header) + name_bytes + extra_bytes
        if magic == b"PK\x03\x04" and offset + info.file_size <= size:
            return offset
    raise CheckpointError(
        f"{path} is damaged: record {info.filename} of {info.file_size} bytes is not where the zip directory says, "
        f"expected a whole checkpoint; copy the file again"
    )


@dataclass(frozen=True)
class _Storage:
    """A storage that the pickle names: record `data/<key>` with `count` values."""

    key: str
    dtype: str
    count: int
    record: zipfile.ZipInfo

    @property
    def nbytes(self) -> int:
        return self.count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class _Tensor:
    """A tensor that the pickle describes; offset and strides in values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _zip_entry(path: Path, file: BinaryIO, size: int, name: str, tensor: _Tensor) -> TensorEntry:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    item_bytes = ITEM_BYTES[storage.dtype]
    if storage.record.file_size < storage.nbytes:
        raise CheckpointError(
            f"{path} is damaged: {name} needs {storage.nbytes} bytes, but its record {storage.record.filename} has "
            f"{storage.record.file_size}, expected a whole checkpoint; copy the file again"
        )
    last = tensor.offset + sum((length - 1) * stride for length, stride in zip(shape, strides))
    if 0 not in shape and last >= storage.count:
        raise CheckpointError(
            f"{path} is damaged: {name} reaches value {last}, but its storage has {storage.count}, "
            f"expected a tensor inside its storage; copy the file again"
        )
    return TensorEntry(
        dtype=storage.dtype,
        shape=shape,
        nbytes=math.prod(shape) * item_bytes,
        file=path,
        offset=_record_offset(path, file, storage.record, size) + tensor.offset * item_bytes,
        strides=None if _is_contiguous(shape, strides) else strides,
    )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides)):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _load_graph(path: Path, data: bytes, storages: Mapping[str, zipfile.ZipInfo]) -> Any:
    """Rebuild the object graph of a pickle, with `_Tensor` for tensors.

    Raises:
        CheckpointError: it asks for a class or function that a checkpoint doesn't need.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"opcode {opcode.name}")
        if opcode.name == "LONG_BINPUT" and argument > len(data):  # its memo would be as large as the number says
            raise pickle.UnpicklingError(f"memo {argument}")
    return _GraphUnpickler(path, data, storages).load()


class _GraphUnpickler(pickle.Unpickler):
    """Rebuild tensors' descriptions and plain data; nothing that it can name runs code of the file."""

    def __init__(self, path: Path, data: bytes, storages: Mapping[str, zipfile.ZipInfo]) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        self._storages = storages
        self._known = {
            "collections.OrderedDict": OrderedDict,
            # A class of this unpickler's own: a pickle can set attributes of what it names.
            "argparse.Namespace": type("Namespace", (argparse.Namespace,), {}),
            "torch._utils._rebuild_tensor_v2": self._rebuild_tensor,
            "torch._utils._rebuild_parameter": self._first,
            "torch._utils._rebuild_parameter_with_state": self._first,
            "torch.Size": self._rebuild_size,
            "torch.device": self._rebuild_device,
            "_codecs.encode": self._encode,
            "numpy.dtype": self._rebuild_numpy_type,
            "numpy.core.multiarray.scalar": self._rebuild_numpy_scalar,
            "numpy._core.multiarray.scalar": self._rebuild_numpy_scalar,
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return our stand-in for a global; raise CheckpointError, with its name, where a checkpoint needs none."""
        full_name = f"{module}.{name}"
        if full_name in self._known:
            return self._known[full_name]
        if module == "torch" and name in (*_STORAGE_TYPES, *ITEM_BYTES):
            return full_name
        raise CheckpointError(
            f"{self._path} asks to load {full_name}, which could run code of the file's author, expected tensors and "
            f"plain values only; don't use it, or have its author save model.state_dict() alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage's description; check that its record is in the archive."""
        kind, storage_type, key, _device, count = pid
        dtype = _STORAGE_TYPES.get(str(storage_type).removeprefix("torch."))
        if kind != "storage" or dtype is None or not isinstance(key, str) or not _is_count(count):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        if key not in self._storages:
            raise CheckpointError(
                f"{self._path} is damaged: it names the record data/{key[:40]}, which its archive lacks, "
                f"expected a whole checkpoint; copy the file again"
            )
        return _Storage(key, dtype, count, self._storages[key])

    @staticmethod
    def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or len(shape) != len(strides) or not all(map(_is_count, numbers)):
            raise pickle.UnpicklingError("a tensor of an unknown kind")
        if len(shape) > _MAX_RANK:
            raise pickle.UnpicklingError(f"a tensor of {len(shape)} dimensions")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    @staticmethod
    def _first(data: Any, *_: Any) -> Any:
        return data

    @staticmethod
    def _rebuild_size(values: Any) -> tuple[Any, ...]:
        return tuple(values)

    @staticmethod
    def _rebuild_device(*parts: Any) -> str:
        return ":".join(str(part) for part in parts)

    @staticmethod
    def _encode(text: Any, encoding: Any) -> bytes:
        if encoding != "latin1" or not isinstance(text, str):
            raise pickle.UnpicklingError(f"text in encoding {encoding!r:.20}")
        return text.encode("latin1")

    @staticmethod
    def _rebuild_numpy_type(code: Any, *_: Any) -> _NumpyType:
        return _NumpyType(str(code))

    @staticmethod
    def _rebuild_numpy_scalar(numpy_type: Any, data: Any) -> int | float | bool | str:
        return numpy_type.value(data)


class _NumpyType:
    """The type of a numpy scalar such as a val_mae that `numpy.mean` gave."""

    def __init__(self, code: str) -> None:
        self._code = code

    def __setstate__(self, state: Any) -> None:
        """Take numpy's state (version, byte order, ...), of which nothing is needed: files are little-endian."""

    def value(self, data: bytes) -> int | float | bool | str:
        """Return the scalar as a plain value; a description where it is none."""
        if self._code not in _NUMPY_FORMATS:
            return f"numpy {self._code[:20]}"
        return struct.unpack(_NUMPY_FORMATS[self._code], data)[0]


# --- safetensors ---


def _looks_like_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size


def _read_safetensors(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    head = os.pread(file.fileno(), 8, 0)
    header_bytes = int.from_bytes(head, "little")
    if len(head) < 8 or 8 + header_bytes > size or header_bytes > _MAX_DESCRIPTION_BYTES:
        raise CheckpointError(
            f"{path} is cut off or no safetensors file: {size} bytes with a header of {header_bytes}, "
            f"expected a whole file; copy it again"
        )
    try:
        header = json.loads(os.pread(file.fileno(), header_bytes, 8))
        metadata = dict(header.pop("__metadata__", {}))
        tensors = {name: _safetensors_entry(path, entry, 8 + header_bytes) for name, entry in header.items()}
    except _MALFORMED as error:
        raise CheckpointError(
            f"{path} has a damaged safetensors header ({str(error)[:120]}), expected JSON with types, shapes and "
            f"offsets; copy the file again"
        ) from error
    end = max((entry.offset + entry.nbytes for entry in tensors.values()), default=8 + header_bytes)
    if end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, expected {end} by its header, so it is cut off or damaged; copy the file again"
        )
    return tensors, metadata


def _safetensors_entry(path: Path, entry: dict[str, Any], data_start: int) -> TensorEntry:
    if entry["dtype"] not in SAFETENSORS_TYPES:
        raise ValueError(f"number type {entry['dtype']!r:.20}")
    dtype = SAFETENSORS_TYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(map(_is_count, (*shape, begin, end))) or len(shape) > _MAX_RANK:
        raise ValueError("a shape or an offset that is no number")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise ValueError(f"{end - begin} bytes for a tensor of {nbytes}")
    return TensorEntry(dtype, shape, nbytes, path, data_start + begin)


def _read_folder(folder: Path) -> TensorIndex:
    """Read a folder of safetensors: the shards that its index names, or all of them where it has no index."""
    weight_map = _read_weight_map(folder)
    names = sorted(set(weight_map.values())) if weight_map else sorted(p.name for p in folder.glob("*.safetensors"))
    if not names:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".pth", ".pt"))
        hint = f"give the file itself: {folder / others[0]}" if others else "check the path"
        raise CheckpointError(f"{folder} is a folder without safetensors files, expected a converted one; {hint}")
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, Any] = {}
    total = 0
    for name in names:
        shard = folder / name
        if not shard.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its index names, expected all shards; copy it again")
        with shard.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found, values = _read_safetensors(shard, file, size)
        twice = tensors.keys() & found.keys()
        if twice:
            raise CheckpointError(
                f"{folder} holds {min(twice)} in two files, expected each once; remove the files of another model"
            )
        total += size
        tensors.update(found)
        metadata.update(values)
    if weight_map:
        actual = {name: entry.file.name for name, entry in tensors.items()}
        wrong = sorted(actual.items() ^ weight_map.items())
        if wrong:
            raise CheckpointError(
                f"{folder / SHARD_INDEX_FILE} and the shards disagree on {wrong[0][0]}, expected each tensor in the "
                f"file that the index names; copy the folder again"
            )
    return _model_index(folder, "sharded safetensors", total, tensors, metadata=metadata)


def _read_weight_map(folder: Path) -> dict[str, str]:
    path = folder / SHARD_INDEX_FILE
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = list(weight_map.values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("no weight_map of names of files in the same folder")
    except _MALFORMED as error:
        raise CheckpointError(
            f"{path} is damaged ({str(error)[:120]}), expected JSON with a weight_map; copy the folder again"
        ) from error
    return weight_map


# --- what is common ---


def _model_index(
    path: Path,
    file_format: str,
    size: int,
    tensors: dict[str, TensorEntry],
    *,
    wrapper: str | None = None,
    metadata: dict[str, Any],
    dead: dict[str, int] | None = None,
    optimizer_shapes: tuple[tuple[int, ...], ...] = (),
) -> TensorIndex:
    """Strip prefixes, and take what inference never uses out of the tensors."""
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors, expected a policy's; give the file that training wrote")
    prefix, tensors = _strip_prefixes(tensors)
    kinds = {name: _dead_kind(name) for name in tensors}
    live = {name: entry for name, entry in tensors.items() if kinds[name] is None}
    scales = {
        name: live.pop(name + SCALE_SUFFIX)
        for name, entry in list(live.items())
        if entry.dtype == "int8" and name + SCALE_SUFFIX in live
    }
    counted = {(entry.file, entry.offset) for entry in live.values()}  # a tied lm_head is the embedding's storage
    dead = {"optimizer": 0, "lm_head": 0, "position_ids": 0, **(dead or {})}
    for name, kind in kinds.items():
        place = (tensors[name].file, tensors[name].offset)
        if kind is not None and place not in counted:
            counted.add(place)
            dead[kind] += tensors[name].nbytes
    return TensorIndex(path, file_format, size, live, wrapper, prefix, metadata, dead, optimizer_shapes, scales)


def _dead_kind(name: str) -> str | None:
    return next((kind for kind, pattern in _DEAD_KEYS.items() if pattern.search(name)), None)


def _strip_prefixes(tensors: dict[str, TensorEntry]) -> tuple[str, dict[str, TensorEntry]]:
    stripped = ""
    while True:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            return stripped, tensors
        stripped += prefix
        tensors = {name.removeprefix(prefix): entry for name, entry in tensors.items()}


def _unwrap(path: Path, graph: Any) -> tuple[str | None, dict[str, _Tensor]]:
    """Return the key that holds the model's state dict (None: the file is one) and its tensors by name."""
    if not isinstance(graph, dict):
        raise CheckpointError(
            f"{path} holds a {type(graph).__name__.lstrip('_')}, expected a dict with the model's tensors by name; "
            f"save model.state_dict()"
        )
    for wrapper in WRAPPERS:
        state = graph.get(wrapper)
        if isinstance(state, dict) and any(isinstance(value, _Tensor) for value in state.values()):
            return wrapper, _named_tensors(state)
    return None, _named_tensors(graph)


def _named_tensors(state: dict[Any, Any]) -> dict[str, _Tensor]:
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, _Tensor)}


def _tensors_in(value: Any) -> Iterator[_Tensor]:
    """Yield the tensors in nested dicts and lists, each container once (a pickle can nest without end)."""
    pending, seen = [value], set()
    while pending:
        value = pending.pop()
        if isinstance(value, _Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)


def _optimizer_shapes(rest: dict[Any, Any]) -> tuple[tuple[int, ...], ...]:
    """Return the shape of each parameter that an optimizer's state_dict() has moments of (Adam, SGD and the like)."""
    shapes = []
    for value in rest.values():
        state = value.get("state") if isinstance(value, dict) else None
        for moments in state.values() if isinstance(state, dict) else ():
            shapes.append(next((tensor.shape for tensor in _tensors_in(moments) if tensor.shape), ()))
    return tuple(shapes)


def _holds_tensors(value: Any) -> bool:
    return next(_tensors_in(value), None) is not None


def _plain(value: Any, depth: int = 0) -> Any:
    """Return metadata as JSON-ready values; what is too deep, long or strange becomes its type's name."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else "int"
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value[:_MAX_PLAIN_TEXT]
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, (dict, list, tuple)) and depth < _MAX_PLAIN_DEPTH and len(value) <= _MAX_PLAIN_ITEMS:
        if isinstance(value, dict):
            return {str(k)[:_MAX_PLAIN_TEXT]: _plain(v, depth + 1) for k, v in value.items()}
        return [_plain(item, depth + 1) for item in value]
    return type(value).__name__


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48
