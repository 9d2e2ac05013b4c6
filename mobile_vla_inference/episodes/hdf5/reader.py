"""Read episodes from HDF5 files, one image in memory at a time. layout.py describes what a file contains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mobile_vla_inference.episodes.episode import Episode, EpisodeError, SimulationRecord
from mobile_vla_inference.episodes.hdf5.bounded import (
    dataset,
    h5py,
    member,
    number_attribute,
    opened,
    read_rows,
    read_small,
    readable,
    rows_at_once,
    text_attribute,
    text_of,
)
from mobile_vla_inference.episodes.hdf5.layout import (
    AUXILIARY_TARGETS,
    REQUIRED,
    layout_error,
    place,
    shape_advice,
    type_name,
)
from mobile_vla_inference.episodes.scenario_instructions import SCENARIO_INSTRUCTIONS, scenario_in
from mobile_vla_inference.errors import InstructionError
from mobile_vla_inference.frames import MAX_FRAME_SIDE_PX
from mobile_vla_inference.instructions import check_instruction

#: Longest episode: 9 hours at 30 Hz.
MAX_STEPS = 1_000_000

#: Most episodes in a file.
MAX_EPISODES = 100_000

#: Longest name of an episode or scenario, bytes of UTF-8: it becomes the name of a file.
_MAX_NAME_BYTES = 200


@dataclass(frozen=True)
class Hdf5Episode(Episode):
    """An episode in an HDF5 file.

    Attributes:
        group: its place in the file, `/` for the root.
        channel_order: of its images in the file, one of layout.CHANNEL_ORDERS.
    """

    group: str
    channel_order: str

    @property
    def where(self) -> str:
        """The file, and the group where the file holds several episodes."""
        return place(self.path, self.group)

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the images in order as uint8 RGB [height, width, 3]; raise EpisodeError where one can't be read."""
        with opened(self.path) as file:
            group = member(file, self.group, self.where)
            images = dataset(group, "images", self.where) if isinstance(group, h5py.Group) else None
            width, height = self.size_px
            if images is None or images.shape != (len(self.commands), height, width, 3) or images.dtype != np.uint8:
                raise EpisodeError(
                    f"{self.where} was changed while it was read, expected it to stay the same; read it again"
                )
            rows = rows_at_once(images, "images", self.where)
            for start in range(0, len(images), rows):
                with readable(f"{self.where}: image {start}"):
                    block = read_rows(images, start, min(start + rows, len(images)), "images", self.where)
                for image in block:
                    yield np.ascontiguousarray(image[..., ::-1]) if self.channel_order == "bgr" else image

    def stamps_s(self) -> np.ndarray | None:
        """Return `stamps_s`, float64 [steps]; None where the file has none."""
        steps = len(self.commands)
        with opened(self.path) as file:
            stored = dataset(member(file, self.group, self.where), "stamps_s", self.where)
            if stored is None:
                return None
            if list(stored.shape or ()) != [steps] or stored.dtype.kind not in "iuf":
                raise EpisodeError(
                    f"{self.where} has stamps_s {stored.dtype} {list(stored.shape or ())}, expected [{steps}] numbers, "
                    "seconds; record it again"
                )
            return read_small(stored, "stamps_s", self.where).astype(np.float64)

    def simulation(self) -> SimulationRecord:
        """Return the attributes `seed` and `outcome`, and the data set of auxiliary targets."""
        with opened(self.path) as file:
            group = member(file, self.group, self.where)
            seed = number_attribute(group, "seed", self.where)
            targets = dataset(group, AUXILIARY_TARGETS, self.where)
            if seed is not None and not (seed.is_integer() and abs(seed) < 1 << 53):
                raise EpisodeError(f"{self.where}: the attribute seed is {seed:g}, expected a whole number; correct it")
            if targets is not None:
                shape = targets.shape or ()
                if len(shape) != 2 or shape[0] != len(self.commands) or targets.dtype.kind != "f":
                    raise EpisodeError(
                        f"{self.where} has {AUXILIARY_TARGETS} {type_name(targets)} {list(shape)}, expected float32 "
                        f"[{len(self.commands)}, numbers]; record it again"
                    )
                targets = read_small(targets, AUXILIARY_TARGETS, self.where).astype(np.float32)
            outcome = text_attribute(group, "outcome", self.where)
            return SimulationRecord(None if seed is None else int(seed), outcome, targets)


def episodes_in(
    path: Path,
    channel_order: str = "rgb",
    instruction: str | None = None,
    instructions: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Hdf5Episode]:
    """Yield the episodes of one file. find_episodes explains the arguments, and limits the time that this takes."""
    with opened(path) as file:
        if any(file.id.links.exists(name.encode()) for name in REQUIRED):
            groups = ["/"]
        elif len(file) > MAX_EPISODES:
            raise EpisodeError(f"{path} contains {len(file)} groups, expected at most {MAX_EPISODES}; split it")
        else:
            groups = [f"/{name}" for name in sorted(file)]
        if not groups:
            raise EpisodeError(f"{path} is empty, expected {' and '.join(REQUIRED)}; copy it again")
        if groups != ["/"] and not _holds_episodes(file):
            raise layout_error(path, str(path), file, REQUIRED)
        for group in groups:
            found = member(file, group, place(path, group)) if group != "/" else file
            yield _episode(path, group, found, channel_order, instruction, instructions)


def _holds_episodes(file: h5py.File) -> bool:
    """Return whether a file has a group with images or actions; True where the reader has to report damage."""
    for name in file:
        try:
            group = member(file, name, name)
            if isinstance(group, h5py.Group) and any(
                isinstance(member(group, each, name), h5py.Dataset) for each in REQUIRED
            ):
                return True
        except EpisodeError:
            return True
    return False


def _episode(
    path: Path,
    group_name: str,
    group: h5py.Group | h5py.Dataset | None,
    channel_order: str,
    given_instruction: str | None,
    instructions: Mapping[str, str],
) -> Hdf5Episode:
    """Check a group and return its episode."""
    where = place(path, group_name)
    found = {name: dataset(group, name, where) if isinstance(group, h5py.Group) else None for name in REQUIRED}
    missing = [name for name, data in found.items() if data is None]
    if missing:
        raise layout_error(path, where, group, missing)
    commands = _commands(found["images"], found["actions"], where)
    rows_at_once(found["images"], "images", where)
    stem = path.stem if group_name == "/" else group_name.rpartition("/")[2]
    name = _label(text_attribute(group, "episode_name", where) or stem, "episode_name", where)
    scenario = _label(text_attribute(group, "scenario", where) or scenario_in(name, path.stem), "scenario", where)
    text = given_instruction or instructions.get(scenario) or text_attribute(group, "instruction", where)
    try:
        text = check_instruction(text or SCENARIO_INSTRUCTIONS.get(scenario, ""))
    except InstructionError as error:
        raise EpisodeError(f"{where}: {error}") from error
    duration_s = number_attribute(group, "total_duration", where)
    if duration_s is not None and duration_s < 0.0:
        raise EpisodeError(f"{where}: total_duration is {duration_s:g} s, expected 0 or more; correct it")
    return Hdf5Episode(
        path=path,
        name=name,
        scenario=scenario,
        instruction=text,
        commands=commands,
        events=_events(group, len(commands), where),
        size_px=(found["images"].shape[2], found["images"].shape[1]),
        duration_s=duration_s,
        group=group_name,
        channel_order=channel_order,
    )


def _commands(images: h5py.Dataset, actions: h5py.Dataset, where: str) -> np.ndarray:
    """Return the actions, float64 [steps, 3], after a check that images and actions belong together."""
    sizes, numbers = images.shape or (), actions.shape or ()
    if len(sizes) != 4 or images.dtype != np.uint8 or sizes[3] != 3 or numbers != (sizes[0], 3) or not sizes[0]:
        if len(sizes) == 4 and sizes[0] and len(numbers) == 2 and numbers[0] and numbers[0] != sizes[0]:
            found = f"{sizes[0]} images but {numbers[0]} actions (images"
            closing = "), expected one action for each image:"
        else:
            found, closing = "images", ", expected"
        raise EpisodeError(
            f"{where} has {found} {type_name(images)} {list(sizes)} and actions {list(numbers)}{closing} uint8 "
            f"[steps, height, width, 3] and [steps, 3]; {shape_advice(images, sizes, numbers)}"
        )
    steps, height, width, _ = sizes
    if not (1 <= height <= MAX_FRAME_SIDE_PX and 1 <= width <= MAX_FRAME_SIDE_PX) or steps > MAX_STEPS:
        raise EpisodeError(
            f"{where} has {steps} images of {width} x {height} pixels, expected at most {MAX_STEPS}, of 1 to "
            f"{MAX_FRAME_SIDE_PX} pixels per side; split or reduce it"
        )
    if actions.dtype.kind not in "fiu":
        raise EpisodeError(
            f"{where} has actions of type {type_name(actions)}, expected numbers [steps, 3] (m/s, m/s, rad/s); "
            f"convert them"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        commands = read_small(actions, "actions", where).astype(np.float64)
    if not np.isfinite(commands).all():
        raise EpisodeError(f"{where} has actions that are NaN or Inf, expected finite numbers; leave it out")
    return commands


def _events(group: h5py.Group, steps: int, where: str) -> tuple[str, ...]:
    """Return `action_event_types`, empty where there is none."""
    name = "action_event_types"
    data = dataset(group, name, where)
    if data is None:
        return ()
    is_text = h5py.check_string_dtype(data.dtype) is not None and data.dtype.itemsize <= _MAX_NAME_BYTES
    if data.shape != (steps,) or not (is_text or data.dtype.kind in "iu"):
        raise EpisodeError(
            f"{where} has {name} {type_name(data)} {list(data.shape or ())}, expected short texts [{steps}]; correct it"
        )
    # One by one: many elements can point to the same long text.
    return tuple(_label(text_of(data[index], name, where), name, where) for index in range(steps))


def _label(text: str, what: str, where: str) -> str:
    """Return a short name as UTF-8; raise EpisodeError where it is too long, or means a folder."""
    text = text.encode("utf-8", errors="replace").decode()  # a file's name need not be UTF-8
    if len(text.encode()) > _MAX_NAME_BYTES or text in (".", ".."):
        raise EpisodeError(
            f"{where}: {what} is {text[:40]!r}, expected a name of 1 to {_MAX_NAME_BYTES} bytes; correct it"
        )
    return text
