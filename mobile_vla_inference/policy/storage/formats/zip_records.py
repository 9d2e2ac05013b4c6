"""The records of the zip archive that torch.save writes, and where the data of each begins."""

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

_MAX_DIRECTORY_BYTES = 16 << 20  # the published file's directory has 0.1 MB
_BOMB_RATIO = 100
_FOLDER_ATTRIBUTE = 0x10  # of a zip entry, by MS-DOS
_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")

#: zipfile's message about a file without a directory.
_NO_ZIP = "File is not a zip file"


class _BoundedReads(io.BufferedReader):
    """A file of which one read returns at most the bytes that a zip directory can have."""

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = _MAX_DIRECTORY_BYTES + 1 if size is None or size < 0 else size  # zipfile reads to the end of the file
        data = super().read(min(wanted, _MAX_DIRECTORY_BYTES + 1))
        if len(data) > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of more than {_MAX_DIRECTORY_BYTES} bytes")
        return data


class ZipRecords:
    """The records of a checkpoint's archive. Every record is uncompressed and apart from the others.

    Args:
        path: the file.
        file: the same, opened; only read by position.
        size: its bytes.

    Raises:
        CheckpointError: it is damaged, or an archive of something else.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self._file, self._size = path, file, size
        infos, directory = self._read_directory()
        self._records = {info.filename: info for info in infos}
        self._root = self._find_root()
        _check_stored(path, infos)
        _check_apart(path, infos, directory)

    def find(self, name: str) -> zipfile.ZipInfo | None:
        """Return a record by its name in the archive's one folder; None if there is none."""
        return self._records.get(f"{self._root}/{name}")

    def read(self, info: zipfile.ZipInfo, max_bytes: int) -> bytes:
        """Return the data of a record.

        Raises:
            CheckpointError: it is damaged, or has more bytes than `max_bytes`.
        """
        if info.file_size > max_bytes:
            raise CheckpointError(
                f"{self.path} has a record {info.filename} of {info.file_size} bytes, expected at most {max_bytes}; "
                f"give the file that training wrote"
            )
        data = os.pread(self._file.fileno(), info.file_size, self.offset(info))
        if zlib.crc32(data) != info.CRC:
            raise CheckpointError(
                f"{self.path}: {info.filename} doesn't match its checksum, expected an undamaged archive; "
                f"copy the file again"
            )
        return data

    def offset(self, info: zipfile.ZipInfo) -> int:
        """Return where the data of a record begins in the file: after its local header, whose length varies.

        Raises:
            CheckpointError: there is no such header, or the file ends before the data.
        """
        header = os.pread(self._file.fileno(), _ZIP_LOCAL_HEADER.size, info.header_offset)
        if len(header) == _ZIP_LOCAL_HEADER.size:
            magic, name_bytes, extra_bytes = _ZIP_LOCAL_HEADER.unpack(header)
            offset = info.header_offset + len(header) + name_bytes + extra_bytes
            name = os.pread(self._file.fileno(), name_bytes, info.header_offset + len(header))
            is_same = name.decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace") == info.orig_filename
            if magic == b"PK\x03\x04" and is_same and offset + info.file_size <= self._size:
                return offset
        raise CheckpointError(
            f"{self.path} is damaged: record {info.filename} of {info.file_size} bytes is not where the zip directory "
            f"places it, expected a whole checkpoint; copy the file again"
        )

    def value_bytes(self, offset: int, count: int) -> bytes:
        """Return some bytes of the file."""
        return os.pread(self._file.fileno(), count, offset)

    def _read_directory(self) -> tuple[list[zipfile.ZipInfo], int]:
        """Return the entries of the directory, and where it begins."""
        try:
            with (
                _BoundedReads(io.FileIO(self._file.fileno(), closefd=False)) as bounded,
                zipfile.ZipFile(bounded) as archive,
            ):
                return archive.infolist(), archive.start_dir
        except DAMAGED as error:
            detail = "" if str(error) == _NO_ZIP else f" ({reason(error)})"
            raise CheckpointError(
                f"{self.path} is cut off or damaged: its {self._size} bytes have no zip directory at their end{detail}"
                f", expected a whole checkpoint; compare its size with the source and copy it again"
            ) from error

    def _find_root(self) -> str:
        """Return the name of the archive's one folder."""
        names = self._records
        ending = "/data.pkl"
        roots = [name.removesuffix(ending) for name in names if name.endswith(ending) and name.count("/") == 1]
        if len(roots) != 1:
            content = ", ".join(list(names)[:3]) or "nothing"
            raise CheckpointError(
                f"{self.path} is a zip archive of something else (it holds {content}), expected a checkpoint as "
                f"torch.save writes it; unpack it, or give the file that training wrote"
            )
        root = roots[0]
        if f"{root}/constants.pkl" in names or any(name.startswith(f"{root}/code/") for name in names):
            raise CheckpointError(
                f"{self.path} is a TorchScript program, expected a checkpoint with the tensors only; "
                f"save its state_dict() with torch.save"
            )
        return root


def reason(error: Exception) -> str:
    """Return what an exception about damage reports, for a message: short, and on one line."""
    text = str(error)[:120]
    return text if text and text.isprintable() else type(error).__name__


def _check_apart(path: Path, infos: list[zipfile.ZipInfo], directory: int) -> None:
    """Refuse records that overlap, and two entries for one record: values of one would be read as another's."""
    ordered = sorted(infos, key=lambda info: info.header_offset)
    ends = [info.header_offset + _ZIP_LOCAL_HEADER.size + len(info.orig_filename) + info.file_size for info in ordered]
    starts = [*(info.header_offset for info in ordered[1:]), directory]
    wrong = next((info.filename for info, end, start in zip(ordered, ends, starts) if end > start), None)
    if len({info.filename for info in infos}) < len(infos) or ordered[0].header_offset != 0:
        wrong = wrong or ordered[0].filename
    folder = next((info.filename for info in infos if info.external_attr & _FOLDER_ATTRIBUTE), None)
    if folder is not None:  # torch reads nothing of it, and returns uninitialised memory
        raise CheckpointError(
            f"{path} is damaged: its record {shown_name(folder)} is marked as a folder, expected a file; "
            f"copy the file again"
        )
    if wrong is not None:
        raise CheckpointError(
            f"{path} is damaged: its record {shown_name(wrong)} overlaps another or is named twice, expected records "
            f"one after the other, as torch.save writes them; copy the file again"
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
