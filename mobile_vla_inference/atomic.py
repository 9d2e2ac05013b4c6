"""Write a file completely or not at all, and remove a folder even during Ctrl-C. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: Of a file's name, so many characters begin the name of its temporary file: both have to fit into NAME_MAX bytes.
_NAME_CHARACTERS = 50


@contextlib.contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield an empty file in the same folder to write to; it replaces `path` at the end, or is removed after an error.

    Args:
        path: the file to replace, or a new one.
        suffix: of the temporary file's name, where a library goes by it.
    """
    prefix = f".{path.name[:_NAME_CHARACTERS]}."
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=prefix, suffix=suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path | str, text: str) -> None:
    """Write a text file so that it contains either its old content or all of `text`, even after an interruption."""
    with replacing(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def remove_folder(folder: Path) -> None:
    """Remove a folder; a first Ctrl-C during the removal is raised only after it."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise
