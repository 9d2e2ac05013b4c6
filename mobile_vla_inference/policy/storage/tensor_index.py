"""Where each tensor of a checkpoint lies in its file: name, type, shape, offset. No torch, no tensor data read.

A `.pth` is a zip archive: a pickle that describes the tensors, and one uncompressed record per storage. The pickle is
never run: pickle_graph.py reads what it describes, and state_dict.py finds the policy's tensors in that. Of a
safetensors file only the header is read. What can't be read gives one sentence, as a CheckpointError.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import math
import os
import re
import shlex
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.outside_files import parse_json, read_json
from mobile_vla_inference.policy.storage.number_types import ITEM_BYTES, SAFETENSORS_TYPES, scalar
from mobile_vla_inference.policy.storage.pickle_graph import (
    MALFORMED,
    MAX_OPERATIONS,
    ForeignTensor,
    Global,
    PickledDict,
    PickledObject,
    Storage,
    Tensor,
    TooMany,
    is_count,
    numpy_array_values,
    read_graph,
)
from mobile_vla_inference.policy.storage.state_dict import (
    clean_names,
    describe,
    find_state_dict,
    is_plain_object,
    shown,
)

SHARD_INDEX_FILE = "model.safetensors.index.json"

#: What follows a quantised weight's name in the name of its scales, one for each row.
SCALE_SUFFIX = "_scale"

_DEAD_KEYS = {
    "lm_head": re.compile(r"(^|\.)lm_head\.(weight|bias)$"),
    "position_ids": re.compile(r"(^|\.)position_ids$"),
}
_MAX_DESCRIPTION_BYTES = 64 << 20  # the published file's data.pkl has 0.2 MB
_MAX_DIRECTORY_BYTES = 16 << 20  # the published file's has 0.1 MB
_MAX_HEADER_BYTES = 4 << 20  # of safetensors; the full-size policy's has 0.15 MB
_MAX_SHARDS = 10_000
_MAX_TENSORS = 20_000  # the full-size policy has 911
_MAX_RANK = 8
_BOMB_RATIO = 100
_FILE_FORMATS = range(1, 11)  # of torch's zip archives, as torch 2.13 reads them
_MAX_PLAIN_DEPTH = 2
_MAX_PLAIN_ITEMS = 200
_MAX_PLAIN_TEXT = 1000
_MAX_PLAIN_VALUES = 20_000
_HEAD_BYTES = 512
_LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # 0x1950a86a20f9469cfc6c, which opens files of torch before 1.6
_FOLDER_ATTRIBUTE = 0x10  # of a zip entry, as MS-DOS has it
_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")
_OTHER_FORMATS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (of recorded episodes?)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy array"),
)

#: Functions that run commands. No training saves one; a file that names one was made to attack who loads it.
_COMMANDS = re.compile(
    r"(?:posix|nt|os)\.(?:system|popen|fork|exec\w*|spawn\w*|posix_spawn\w*|startfile|unlink|remove|rmdir)"
    r"|builtins\.(?:eval|exec|execfile|compile|__import__)"
    r"|(?:subprocess|runpy)\..*|pty\.spawn|webbrowser\.open"
)

#: What zipfile and the pickle's reader raise on damaged input.
_MALFORMED = (*MALFORMED, zipfile.BadZipFile, AttributeError, EOFError, MemoryError, NotImplementedError)


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
        prefix: what was stripped from every key; empty where not all of them had the same.
        metadata: plain values beside the tensors (epoch, val_mae, args as a dict).
        dead: bytes that inference never uses: `optimizer`, `lm_head`, `position_ids`.
        optimizer_shapes: shapes of the parameters that the optimizer trained, where its state is in the file.
        scales: of the int8 weights that have them, by the weight's name; not among `tensors`.
        file_keys: the key in the file of each tensor of `stored`, by its name here.
        skipped: what the file holds beside the weights that is not read, each with what it is.
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
    file_keys: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

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
    if _is_text(head):
        return f"a text file of {size} byte{'s' * (size != 1)}"
    return f"{size} bytes that open with {head[:8].hex(' ')}, which no checkpoint does"


def _is_text(head: bytes) -> bool:
    """Whether a file begins with UTF-8 text: its last character may be cut; the first byte of an archive is none."""
    text = codecs.getincrementaldecoder("utf-8-sig")("replace").decode(head)
    return not b"PK".startswith(head) and all(
        character.isprintable() or character in "\t\n\r\f" for character in text.replace("\ufffd", "\0")
    )


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
        read_graph(file.read(_MAX_DESCRIPTION_BYTES), _refuse_commands(path))
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
    _check_format(path, file, size, records, root)
    data = _read_record(path, file, description, size)
    try:
        graph, named = read_graph(data, _refuse_commands(path))
    except TooMany as error:
        raise CheckpointError(
            f"{path} describes more than {MAX_OPERATIONS} values, expected a policy and its training's state; "
            f"save model.state_dict() alone"
        ) from error
    except _MALFORMED as error:
        raise CheckpointError(
            f"{path} has a damaged data.pkl ({_reason(error)}), expected what torch.save writes; "
            f"download or copy it again"
        ) from error
    places = {
        key: _storage_place(path, file, size, records.get(f"{root}/data/{key}"), storage)
        for key, storage in named.items()
    }
    state = find_state_dict(str(path), graph)
    tensors = {name: _zip_entry(path, places, name, tensor) for name, tensor in state.tensors.items()}
    own = {id(container) for container in state.containers}
    rest = {
        key: value
        for key, value in (graph.named() if isinstance(graph, PickledDict) else {}).items()
        if id(value) not in own and not (id(graph) in own and isinstance(value, (Tensor, ForeignTensor)))
    }
    metadata = _Metadata(lambda tensor: _single_value(file, places, tensor), own)
    plain = {key: metadata.plain(value) for key, value in rest.items()}
    used = {tensor.storage.key for tensor in state.tensors.values()}
    # A tensor of one value is read; any more is an optimizer's, an averaged copy or the like.
    with_tensors = {
        key: value
        for key, value in rest.items()
        if next(_tensors_in(value, own), None) and not (isinstance(value, Tensor) and plain[key] != "tensor")
    }
    others = {t.storage.key: t.storage.nbytes for t in _tensors_in(list(with_tensors.values()), own)}
    others = {key: nbytes for key, nbytes in others.items() if key not in used}
    return _model_index(
        path,
        "zip",
        size,
        tensors,
        wrapper=state.path,
        metadata={key: value for key, value in plain.items() if key not in with_tensors},
        dead={"optimizer": sum(others.values())},
        optimizer_shapes=_optimizer_shapes(rest.values()),
        skipped=tuple(f"{key} ({what})" for key, value in rest.items() if (what := metadata.unread(value))),
    )


def _reason(error: Exception) -> str:
    text = str(error)[:120]
    return text if text and text.isprintable() else type(error).__name__


def _check_format(path: Path, file: BinaryIO, size: int, records: Mapping[str, zipfile.ZipInfo], root: str) -> None:
    """Refuse what a record beside the pickle says about the others, where that is not what is read here."""
    order = records.get(f"{root}/byteorder")
    if order is not None and _read_record(path, file, order, size, 100) != b"little":
        raise CheckpointError(f"{path} is not little-endian, expected that; save it again on an x86 or ARM machine")
    version = records.get(f"{root}/version") or records.get(f"{root}/.data/version")
    if version is None:
        return
    text = _read_record(path, file, version, size, 100).decode("latin1").strip()
    if not text.isdecimal() or int(text) not in _FILE_FORMATS:
        raise CheckpointError(
            f"{path} has version {text[:20]!a} of torch's file format, expected {_FILE_FORMATS[0]} to "
            f"{_FILE_FORMATS[-1]}; update this package, or save it again with torch 2"
        )


def _storage_place(path: Path, file: BinaryIO, size: int, record: zipfile.ZipInfo | None, storage: Storage) -> int:
    """Return where a storage's first byte lies in the file."""
    if record is None:
        raise CheckpointError(
            f"{path} is damaged: it names the record data/{storage.key[:40]}, which its archive lacks, "
            f"expected a whole checkpoint; copy the file again"
        )
    if record.file_size < storage.nbytes:
        raise CheckpointError(
            f"{path} is damaged: a storage needs {storage.nbytes} bytes, but its record {record.filename} has "
            f"{record.file_size}, expected a whole checkpoint; copy the file again"
        )
    return _record_offset(path, file, record, size)


#: zipfile's words for a file without a directory.
_NO_ZIP = "File is not a zip file"


class _BoundedReads(io.BufferedReader):
    """A file that gives no more bytes at once than a zip directory can have."""

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = _MAX_DIRECTORY_BYTES + 1 if size is None or size < 0 else size  # zipfile reads to the end at the end
        data = super().read(min(wanted, _MAX_DIRECTORY_BYTES + 1))
        if len(data) > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of more than {_MAX_DIRECTORY_BYTES} bytes")
        return data


def _zip_directory(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """Return the records of a checkpoint's archive by name, and the name of its one folder."""
    try:
        with _BoundedReads(io.FileIO(file.fileno(), closefd=False)) as bounded, zipfile.ZipFile(bounded) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except _MALFORMED as error:
        detail = "" if str(error) == _NO_ZIP else f" ({_reason(error)})"
        raise CheckpointError(
            f"{path} is cut off or damaged: its {size} bytes have no zip directory at their end{detail}, "
            f"expected a whole checkpoint; compare its size with the source and copy it again"
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
    _check_apart(path, infos, directory)
    return records, root


def _check_apart(path: Path, infos: list[zipfile.ZipInfo], directory: int) -> None:
    """Refuse records that overlap, or that two entries of the directory name: values would be read as others."""
    ordered = sorted(infos, key=lambda info: info.header_offset)
    ends = [info.header_offset + _ZIP_LOCAL_HEADER.size + len(info.orig_filename) + info.file_size for info in ordered]
    starts = [*(info.header_offset for info in ordered[1:]), directory]
    wrong = next((info.filename for info, end, start in zip(ordered, ends, starts) if end > start), None)
    if len({info.filename for info in infos}) < len(infos) or ordered[0].header_offset != 0:
        wrong = wrong or ordered[0].filename
    folder = next((info.filename for info in infos if info.external_attr & _FOLDER_ATTRIBUTE), None)
    if folder is not None:  # of which torch reads nothing, and gives whatever its memory held
        raise CheckpointError(
            f"{path} is damaged: its record {shown(folder)} is marked as a folder, expected a file; copy the file again"
        )
    if wrong is not None:
        raise CheckpointError(
            f"{path} is damaged: its record {shown(wrong)} overlaps another or is named twice, expected records one "
            f"after the other, as torch.save writes them; copy the file again"
        )


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


def _read_record(
    path: Path, file: BinaryIO, info: zipfile.ZipInfo, size: int, max_bytes: int = _MAX_DESCRIPTION_BYTES
) -> bytes:
    if info.file_size > max_bytes:
        raise CheckpointError(
            f"{path} has a record {info.filename} of {info.file_size} bytes, expected at most {max_bytes}; "
            f"give the file that training wrote"
        )
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
        name = os.pread(file.fileno(), name_bytes, info.header_offset + len(header))
        is_same = name.decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace") == info.orig_filename
        if magic == b"PK\x03\x04" and is_same and offset + info.file_size <= size:
            return offset
    raise CheckpointError(
        f"{path} is damaged: record {info.filename} of {info.file_size} bytes is not where the zip directory says, "
        f"expected a whole checkpoint; copy the file again"
    )


def _zip_entry(path: Path, places: Mapping[str, int], name: str, tensor: Tensor) -> TensorEntry:
    nbytes = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
    if nbytes > tensor.storage.nbytes:
        raise CheckpointError(
            f"{path}: {shown(name)} repeats the values of its storage ({tensor.storage.nbytes} bytes for a tensor of "
            f"{nbytes}), expected each value stored; save it again after .contiguous()"
        )
    return TensorEntry(
        dtype=tensor.dtype,
        shape=tensor.shape,
        nbytes=nbytes,
        file=path,
        offset=places[tensor.storage.key] + tensor.offset * ITEM_BYTES[tensor.dtype],
        strides=None if _is_contiguous(tensor.shape, tensor.strides) else tensor.strides,
    )


def _single_value(file: BinaryIO, places: Mapping[str, int], tensor: Tensor) -> Any:
    """Return the value of a tensor that has one, such as a val_mae that was kept as a tensor; else None."""
    if math.prod(tensor.shape) != 1:
        return None
    item_bytes = ITEM_BYTES[tensor.dtype]
    return scalar(
        tensor.dtype, os.pread(file.fileno(), item_bytes, places[tensor.storage.key] + tensor.offset * item_bytes)
    )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides)):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _refuse_commands(path: Path) -> Callable[[str], None]:
    def check(name: str) -> None:
        if _COMMANDS.fullmatch(name):
            raise CheckpointError(
                f"{path} asks to call {name[:100]}, which would run code of its author's on the machine that loads it, "
                f"expected weights; nothing of it was run: don't use this file"
            )

    return check


# --- safetensors ---


def _looks_like_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size


def _read_safetensors(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    head = os.pread(file.fileno(), 8, 0)
    header_bytes = int.from_bytes(head, "little")
    if len(head) < 8 or 8 + header_bytes > size:
        raise CheckpointError(
            f"{path} is cut off or no safetensors file: {size} bytes with a header of {header_bytes}, "
            f"expected a whole file; copy it again"
        )
    if header_bytes > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} has a safetensors header of {header_bytes} bytes, expected at most {_MAX_HEADER_BYTES}; "
            f"it describes no policy: give the right file"
        )
    text = os.pread(file.fileno(), header_bytes, 8)
    header = parse_json(text, f"{path}: its header", "that of a safetensors file", error=CheckpointError)
    try:
        metadata = header.pop("__metadata__", {})
        metadata = {str(key)[:_MAX_PLAIN_TEXT]: str(value)[:_MAX_PLAIN_TEXT] for key, value in metadata.items()}
        tensors = {name: _safetensors_entry(path, name, entry, 8 + header_bytes) for name, entry in header.items()}
    except _MALFORMED as error:
        raise CheckpointError(
            f"{path} has a damaged safetensors header ({str(error)[:120]}), expected JSON with types, shapes and "
            f"offsets; copy the file again"
        ) from error
    end = 8 + header_bytes
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise CheckpointError(
                f"{path} is damaged: {shown(name)} begins at byte {entry.offset}, where the tensor before it ends at "
                f"{end}, expected tensors one after the other; copy the file again"
            )
        end += entry.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, expected {end} by its header, so it is cut off or damaged; copy the file again"
        )
    return tensors, metadata


def _safetensors_entry(path: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorEntry:
    code = entry["dtype"]
    if not isinstance(code, str) or code not in SAFETENSORS_TYPES:
        raise CheckpointError(
            f"{path}: {shown(name)} has the number type {str(code)[:20]!a}, expected one of "
            f"{', '.join(SAFETENSORS_TYPES)}; save it again as F32"
        )
    dtype = SAFETENSORS_TYPES[code]
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(map(is_count, (*shape, begin, end))) or len(shape) > _MAX_RANK or end < begin:
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
    if len(names) > _MAX_SHARDS:
        raise CheckpointError(
            f"{folder} has {len(names)} safetensors files, expected at most {_MAX_SHARDS}; give a folder with one model"
        )
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
    if not (path.is_symlink() or path.exists()):  # a link to nowhere is there, and has to be told
        return {}
    content = read_json(path, "the index of safetensors files", _MAX_HEADER_BYTES, error=CheckpointError)
    try:
        weight_map = content["weight_map"]
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
    skipped: tuple[str, ...] = (),
) -> TensorIndex:
    """Give the tensors their own names, and take what inference never uses out of them."""
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors, expected a policy's; give the file that training wrote")
    if len(tensors) > _MAX_TENSORS:
        raise CheckpointError(
            f"{path} holds {len(tensors)} tensors, expected at most {_MAX_TENSORS}; give the file that training wrote"
        )
    prefix, file_keys = clean_names(str(path), tensors)
    tensors = {name: tensors[key] for name, key in file_keys.items()}
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
    stored = {name: file_keys[name] for name in (*live, *(name + SCALE_SUFFIX for name in scales))}
    return TensorIndex(
        path,
        file_format,
        size,
        live,
        wrapper=wrapper,
        prefix=prefix,
        metadata=metadata,
        dead=dead,
        optimizer_shapes=optimizer_shapes,
        scales=scales,
        file_keys=stored,
        skipped=skipped,
    )


def _dead_kind(name: str) -> str | None:
    return next((kind for kind, pattern in _DEAD_KEYS.items() if pattern.search(name)), None)


# --- what a .pth holds beside the weights ---


def _inside(value: Any) -> Iterable[Any]:
    """Return what a container holds, an object's attributes and arguments included."""
    if isinstance(value, PickledObject):
        return (*(child for _, child in value.pairs), value.state, *value.arguments, *value.items)
    if isinstance(value, PickledDict):
        return [child for _, child in value.pairs]
    return value if isinstance(value, (list, tuple)) else ()


def _walk(value: Any, skip: Iterable[int] = ()) -> Iterator[Any]:
    """Yield a value and all that it holds, each container once (a pickle can nest without end, and in a circle)."""
    pending, seen = [value], set(skip)
    while pending:
        value = pending.pop()
        if isinstance(value, (PickledDict, list, tuple)):
            if id(value) in seen:
                continue
            seen.add(id(value))
            pending.extend(_inside(value))
        yield value


def _tensors_in(value: Any, skip: Iterable[int] = ()) -> Iterator[Tensor]:
    return (found for found in _walk(value, skip) if isinstance(found, Tensor))


def _optimizer_shapes(rest: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    """Return the shape of each parameter that an optimizer's state_dict() has moments of (Adam, SGD and the like)."""
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


class _Metadata:
    """What stands beside the weights, as JSON-ready values; what is too deep, long or strange becomes its type's name.

    Args:
        single_value: reads the value of a tensor that has one.
        skip: identities of the containers that hold the weights.
    """

    def __init__(self, single_value: Callable[[Tensor], Any], skip: set[int]) -> None:
        self._single_value = single_value
        self._skip = skip
        self._room = _MAX_PLAIN_VALUES

    def plain(self, value: Any, depth: int = 0) -> Any:
        """Return a value for JSON."""
        self._room -= 1
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return value if abs(value) < 1 << 63 else "int"
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, str):
            return value[:_MAX_PLAIN_TEXT].encode("utf-8", "replace").decode()
        if isinstance(value, Tensor):
            single = self._single_value(value)
            return "tensor" if single is None else self.plain(single)
        if isinstance(value, PickledObject):
            numbers = numpy_array_values(value)
            if numbers is not None:
                return self.plain(numbers, depth)
            value = value.attributes or value
        if depth < _MAX_PLAIN_DEPTH and self._room > 0:
            if isinstance(value, PickledDict) and not isinstance(value, PickledObject):
                if len(value.pairs) <= _MAX_PLAIN_ITEMS:
                    return {self._key(k): self.plain(v, depth + 1) for k, v in value.pairs}
            elif isinstance(value, (list, tuple)) and len(value) <= _MAX_PLAIN_ITEMS:
                return [self.plain(item, depth + 1) for item in value]
        return _type_name(value)

    def unread(self, value: Any) -> str | None:
        """Return what a value beside the weights is, where it is not (or not all) read; None where it is."""
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
        return value.name[:_MAX_PLAIN_TEXT]
    return "dict" if isinstance(value, PickledDict) else type(value).__name__
