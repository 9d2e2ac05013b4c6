"""Recognise the format of a checkpoint file or folder, and read its index; no tensor data is read.

Any other file is refused with a CheckpointError of one sentence: what it is, and what to do.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import shlex
import stat
from pathlib import Path
from typing import BinaryIO

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.formats.damage import DAMAGED
from mobile_vla_inference.policy.storage.formats.pickle_graph import read_graph
from mobile_vla_inference.policy.storage.formats.safetensors_file import looks_like_safetensors, read_safetensors
from mobile_vla_inference.policy.storage.formats.shards import read_folder
from mobile_vla_inference.policy.storage.formats.torch_archive import (
    MAX_DESCRIPTION_BYTES,
    read_torch_archive,
    refuse_commands,
)
from mobile_vla_inference.policy.storage.tensor_index import TensorIndex, policy_index

_HEAD_BYTES = 512
_LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # 0x1950a86a20f9469cfc6c, with which files of torch before 1.6 begin
_OTHER_FORMATS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (of recorded episodes?)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy array"),
)


def read_index(path: Path | str) -> TensorIndex:
    """Return where the tensors are in a `.pth`, a safetensors file, or a folder of safetensors shards.

    Raises:
        CheckpointError: it is missing, unreadable, damaged, unsafe, or not a checkpoint.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return read_folder(path)
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is not a regular file, expected a checkpoint; check the path")
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
        return read_torch_archive(path, file, size)
    if path.suffix == ".safetensors" or looks_like_safetensors(head, size):
        tensors, metadata = read_safetensors(path, file, size)
        return policy_index(path, "safetensors", size, tensors, metadata=metadata)
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
    return f"{size} bytes that begin with {head[:8].hex(' ')}, not the start of a checkpoint"


def _is_text(head: bytes) -> bool:
    """Return whether a file begins with UTF-8 text; `head` can end within a character."""
    text = codecs.getincrementaldecoder("utf-8-sig")("replace").decode(head)
    return not b"PK".startswith(head) and all(
        character.isprintable() or character in "\t\n\r\f" for character in text.replace("\ufffd", "\0")
    )


def _what_to_do(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "; run git lfs pull in the clone that it is from"
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
        f"save it again on a machine that has memory for the whole file: python3 -c {shlex.quote(resave)}"
    )


def _refuse_bare_pickle(path: Path, file: BinaryIO) -> None:
    """Raise for a pickle outside an archive: about an unsafe name in it, or else about its format."""
    with contextlib.suppress(*DAMAGED):  # cut off or damaged: the sentence below is right in any case
        read_graph(file.read(MAX_DESCRIPTION_BYTES), refuse_commands(path))
    raise CheckpointError(
        f"{path} is a bare pickle, expected a checkpoint as torch.save writes it (zip format); save it again that way"
    )
