"""Write episodes as HDF5 files: one step at a time, or many whole episodes in one file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mobile_vla_inference.episodes.episode import EpisodeError
from mobile_vla_inference.episodes.hdf5.bounded import h5py
from mobile_vla_inference.episodes.hdf5.layout import event_types


class EpisodeWriter:
    """An episode that is being written, one step at a time; a context manager.

    The file gets its name only when it is whole: an interruption leaves nothing behind.
    """

    def __init__(
        self, path: Path, size_px: tuple[int, int], *, instruction: str = "", scenario: str = "", compress: bool = True
    ) -> None:
        """Prepare a file for images of `size_px` (width, height); raise EpisodeError where it can't be made."""
        if path.exists():
            raise EpisodeError(f"{path} already exists, expected a new file; choose another place or remove it")
        self._path = path
        self._size_px = size_px
        self._attributes = {"instruction": instruction, "scenario": scenario}
        self._compress = compress
        self._commands: list[Sequence[float]] = []
        self._stamps_s: list[float] = []

    def __enter__(self) -> EpisodeWriter:
        width, height = self._size_px
        try:
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            os.close(handle)
            self._part = Path(name)
            self._file = h5py.File(self._part, "w")
        except OSError as error:
            raise EpisodeError(f"{self._path} can't be written ({error}); choose another place") from error
        self._images = self._file.create_dataset(
            "images",
            shape=(0, height, width, 3),
            maxshape=(None, height, width, 3),
            chunks=(1, height, width, 3),
            dtype=np.uint8,
            compression="gzip" if self._compress else None,
            compression_opts=1 if self._compress else None,
        )
        return self

    def add(self, stamp_s: float, rgb: np.ndarray, command: Sequence[float]) -> None:
        """Add a step: its time, an image of the episode's size, and linear x, linear y (m/s), angular z (rad/s)."""
        index = len(self._commands)
        try:
            self._images.resize(index + 1, axis=0)
            self._images[index] = rgb
        except OSError as error:
            raise EpisodeError(f"{self._path} can't be written ({error}); free space on the disk") from error
        self._commands.append(command)
        self._stamps_s.append(stamp_s)

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self._finish()
            self._file.close()
            if kind is None:
                self._part.chmod(0o644)
                self._part.replace(self._path)
        finally:
            self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        write_commands(self._file, np.array(self._commands).reshape(-1, 3))
        write_stamps(self._file, np.array(self._stamps_s, dtype=np.float64))
        self._file.attrs["episode_name"] = self._path.stem
        for name, value in self._attributes.items():
            if value:
                self._file.attrs[name] = value


def write_commands(group: h5py.Group, commands: np.ndarray) -> None:
    """Write the commands [steps, 3] of an episode into its group, with their event types and their number."""
    actions = commands.astype(np.float32)
    group["actions"] = actions
    group.create_dataset("action_event_types", data=event_types(actions), dtype=h5py.string_dtype())
    group.attrs["num_frames"] = len(actions)


def write_stamps(group: h5py.Group, stamps_s: np.ndarray) -> None:
    """Write the times of the steps, seconds [steps], into an episode's group, with the duration."""
    group["stamps_s"] = stamps_s
    group.attrs["total_duration"] = stamps_s[-1] - stamps_s[0] if len(stamps_s) else 0.0
