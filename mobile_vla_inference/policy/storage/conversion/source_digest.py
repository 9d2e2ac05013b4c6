"""The hash of a checkpoint's files, computed while its tensors are read, so that a disk delivers each byte once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.checkpoint import Checkpoint
from mobile_vla_inference.policy.storage.tensor_index import TensorEntry

_HASH_BYTES = 4 << 20


class SourceDigest:
    """SHA-256 of a checkpoint's files, computed in a thread that stays just ahead of the tensors that are read.

    For a folder it is the hash of the list that `sha256sum *.safetensors` prints. Use it as a context manager.
    """

    def __init__(self, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None) -> None:
        self._progress = progress
        self._is_folder = checkpoint.path.is_dir()
        self._total = checkpoint.index.file_size
        self._files = {
            path: _HashedFile(path) for path in sorted({entry.file for entry in checkpoint.index.tensors.values()})
        }
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._hashing: Future[None] | None = None

    def __enter__(self) -> SourceDigest:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()

    def advance(self, entry: TensorEntry, rows: int) -> None:
        """Hash a file in the background, up to the end of the first `rows` rows of a tensor.

        Raises:
            CheckpointError: the file is shorter than it was.
        """
        whole = entry.strides is not None or not entry.shape
        end = entry.offset + (entry.nbytes if whole else entry.nbytes // entry.shape[0] * rows)
        self._wait()
        self._hashing = self._thread.submit(self._files[entry.file].hash_up_to, end)

    def finish(self) -> str:
        """Hash the rest of the files and return the hash in hexadecimal.

        Raises:
            CheckpointError: a file has changed since the start.
        """
        for file in self._files.values():
            while file.position < file.size:
                self._wait()
                self._hashing = self._thread.submit(file.hash_up_to, file.position + _HASH_BYTES)
            self._wait()
            file.check_unchanged()
        hashes = {path.name: file.digest.hexdigest() for path, file in self._files.items()}
        if not self._is_folder:
            return next(iter(hashes.values()))
        listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
        return hashlib.sha256(listed.encode()).hexdigest()

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None
        if self._progress is not None:
            self._progress(sum(file.position for file in self._files.values()), self._total)


class _HashedFile:
    """A file that is hashed in steps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = hashlib.sha256()
        self.position = 0
        self._file = path.open("rb", buffering=0)
        self._opened = os.fstat(self._file.fileno())

    @property
    def size(self) -> int:
        return self._opened.st_size

    def hash_up_to(self, end: int) -> None:
        while self.position < min(end, self.size):
            chunk = self._file.read(min(_HASH_BYTES, end - self.position))
            if not chunk:
                raise self._changed()
            self.digest.update(chunk)
            self.position += len(chunk)

    def check_unchanged(self) -> None:
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise self._changed()

    def close(self) -> None:
        self._file.close()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} was changed while it was read, expected it unchanged; convert again once it is whole"
        )
