"""Small HDF5 episodes, and changes that make them impossible, too large or dependent on other files."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 12, 16, 3), dtype=np.uint8)
ACTIONS = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)

#: Changes an episode that is open for writing.
Change = Callable[[h5py.File], Any]


def write_episode(path: Path, change: Change = lambda file: None) -> Path:
    """Write a good episode of 6 steps, change it, and return its path."""
    with h5py.File(path, "w") as file:
        file["images"], file["actions"] = IMAGES, ACTIONS
        file.attrs["instruction"] = "go"
        change(file)
    return path


def replaced(name: str, make: Callable[[h5py.File], Any]) -> Change:
    """Remove a data set; if `make` returns a value, it takes the data set's place."""

    def change(file: h5py.File) -> None:
        file.pop(name, None)
        value = make(file)
        if value is not None:
            file[name] = value

    return change


def attribute(name: str, value: Any) -> Change:
    """Set an attribute of the file."""
    return lambda file: file.attrs.__setitem__(name, value)


def declared(name: str, shape: tuple[int, ...], dtype: Any = None, **options: Any) -> Change:
    """Replace a data set by one of a shape and type without values."""
    dtype = dtype or (np.uint8 if name == "images" else np.float32)
    return replaced(name, lambda file: file.create_dataset(name, shape, dtype, **options) and None)


def circle(file: h5py.File) -> None:
    """Make the images a link to a link to them."""
    del file["images"]
    file["images"], file["there"] = h5py.SoftLink("/there"), h5py.SoftLink("/images")


def virtual(file: h5py.File) -> None:
    """Make the images a view of another file, which does not exist."""
    del file["images"]
    layout = h5py.VirtualLayout(IMAGES.shape, np.uint8)
    layout[:] = h5py.VirtualSource("moved_away.h5", "images", IMAGES.shape)
    file.create_virtual_dataset("images", layout)


def another_filter(file: h5py.File) -> None:
    """Store the images with a filter (zstd) that h5py does not include."""
    del file["images"]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1, *IMAGES.shape[1:]))
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple(IMAGES.shape)
    images = h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, plist)
    for step, picture in enumerate(IMAGES):
        images.write_direct_chunk((step, 0, 0, 0), picture.tobytes())


def bomb(steps: int, unpacked_mib: int) -> Change:
    """Store images in small chunks that gzip unpacks to `unpacked_mib` each, which is more than the chunk's size."""

    def change(file: h5py.File) -> None:
        del file["images"]
        shape = (steps, 512, 1024, 3)
        images = file.create_dataset("images", shape, np.uint8, chunks=(1, *shape[1:]), compression="gzip")
        packer = zlib.compressobj(9)
        packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(unpacked_mib)) + packer.flush()
        for step in range(steps):
            images.id.write_direct_chunk((step, 0, 0, 0), packed)
        del file["actions"]
        file["actions"] = ACTIONS[:steps]

    return change
