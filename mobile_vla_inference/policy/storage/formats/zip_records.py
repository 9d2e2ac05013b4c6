"""The records of the zip archive that torch.save writes: the directory, and where each record's data begins. No torch."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.formats.damage import DAMAGED
from mobile_vla_inference.policy.storage.tensor_names import shown_name

MAX_DESCRIPTION_BYTES = 64 << 20  # the published file's data.pkl has 0.2 MB
_MAX_DIRECTORY_BYTES = 16 << 20  # the published file's has 0.1 MB
_BOMB_RATIO = 100
_FOLDER_ATTRIBUTE = 0x10  # of a zip entry, as MS-DOS has it
_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")

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


def read_directory(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """Return the records of a checkpoint's archive by name, and the name of its one folder."""
    try:
        with _BoundedReads(io.FileIO(file.fileno(), closefd=False)) as bounded, zipfile.ZipFile(bounded) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except DAMAGED as error:
        detail = "" if str(error) == _NO_ZIP else f" ({reason(error)})"
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
            f"{path} is damaged: its record {shown_name(folder)} is marked as a folder, expected a file; copy the file again"
        )
    if wrong is not None:
        raise CheckpointError(
            f"{path} is damaged: its record {shown_name(wrong)} overlaps another or is named twice, expected records one "
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


def read_record(
    path: Path, file: BinaryIO, info: zipfile.ZipInfo, size: int, max_bytes: int = MAX_DESCRIPTION_BYTES
) -> bytes:
    if info.file_size > max_bytes:
        raise CheckpointError(
            f"{path} has a record {info.filename} of {info.file_size} bytes, expected at most {max_bytes}; "
            f"give the file that training wrote"
        )
    data = os.pread(file.fileno(), info.file_size, record_offset(path, file, info, size))
    if zlib.crc32(data) != info.CRC:
        raise CheckpointError(
            f"{path}: {info.filename} doesn't match its checksum, expected an undamaged archive; copy the file again"
        )
    return data


def record_offset(path: Path, file: BinaryIO, info: zipfile.ZipInfo, size: int) -> int:
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


def reason(error: Exception) -> str:
    text = str(error)[:120]
    return text if text and text.isprintable() else type(error).__name__
