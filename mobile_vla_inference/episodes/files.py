"""Read and write episodes in the HDF5 format of the original data, one frame in memory at a time.

An episode is `images` [steps, height, width, 3] uint8, `actions` [steps, 3] float32 (linear x, linear y in m/s, angular
z in rad/s) and `action_event_types` [steps] strings, at the root of a file or in groups of it, with the attributes
`episode_name`, `num_frames` and `total_duration`. The original tells the scenario by the episode's name
(`episode_20250808_123136_1box_vert_left`) and the instruction by the scenario; the attributes `scenario` and
`instruction` say it outright.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mobile_vla_inference.episodes.hdf5 import (
    EpisodeError,
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
from mobile_vla_inference.episodes.survey import survey
from mobile_vla_inference.errors import InstructionError
from mobile_vla_inference.frames import MAX_FRAME_SIDE_PX
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.outside_files import read_json

SUFFIXES = (".h5", ".hdf5")

#: Orders of an image's channels in a file: documented as RGB, but the original's camera said bgr8.
CHANNEL_ORDERS = ("rgb", "bgr")

#: What the robot was told in each scenario of the original data.
SCENARIO_INSTRUCTIONS = {
    "1box_vert_left": "박스를 왼쪽으로 돌아서 컵까지 가세요",
    "1box_vert_right": "박스를 오른쪽으로 돌아서 컵까지 가세요",
    "1box_hori_left": "박스를 왼쪽으로 피해서 컵까지 가세요",
    "1box_hori_right": "박스를 오른쪽으로 피해서 컵까지 가세요",
    "2box_vert_left": "두 박스 사이 왼쪽 경로로 컵까지 가세요",
    "2box_vert_right": "두 박스 사이 오른쪽 경로로 컵까지 가세요",
    "2box_hori_left": "두 박스를 왼쪽으로 우회해서 컵까지 가세요",
    "2box_hori_right": "두 박스를 오른쪽으로 우회해서 컵까지 가세요",
}

NO_SCENARIO = "no scenario"

#: Values of `action_event_types`.
EVENT_START, EVENT_ACTION, EVENT_STOP = "episode_start", "start_action", "stop_action"

_DATASETS = ("images", "actions")

#: What a bag's files are called.
_BAG_SUFFIXES = (".mcap", ".db3")

#: So many names of a file of another layout are looked at, so deep, and told.
_MAX_NAMES_SEEN, _MAX_NAMES_DEEP, _MAX_NAMES_TOLD = 200, 4, 8

#: Longest episode: 9 hours at 30 Hz.
MAX_STEPS = 1_000_000

#: Most episodes in a file.
MAX_EPISODES = 100_000

#: Largest table of instructions, bytes.
_MAX_TABLE_BYTES = 1 << 20

#: Longest name of an episode or scenario, bytes of UTF-8: it becomes the name of a file.
_MAX_NAME_BYTES = 200


@dataclass(frozen=True)
class Episode:
    """One drive; its images stay in the file until they are asked for.

    Attributes:
        path: the file.
        group: where in the file.
        name: its own name.
        scenario: such as `1box_vert_left`, or NO_SCENARIO.
        instruction: what the robot was told; empty where nothing tells it.
        commands: linear x, linear y (m/s), angular z (rad/s), float64 [steps, 3].
        events: `action_event_types`, one per step; empty where there are none.
        size_px: width and height of its images.
        duration_s: `total_duration`; None where it is not told.
        channel_order: of its images in the file, one of CHANNEL_ORDERS.
    """

    path: Path
    group: str
    name: str
    scenario: str
    instruction: str
    commands: np.ndarray
    events: tuple[str, ...]
    size_px: tuple[int, int]
    duration_s: float | None
    channel_order: str

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the images in order as uint8 RGB [height, width, 3]; raise EpisodeError where one can't be read."""
        with opened(self.path) as file:
            where = _where(self.path, self.group)
            group = member(file, self.group, where)
            images = dataset(group, "images", where) if isinstance(group, h5py.Group) else None
            width, height = self.size_px
            if images is None or images.shape != (len(self.commands), height, width, 3) or images.dtype != np.uint8:
                raise EpisodeError(f"{where} was changed while it was read, expected it to stay; read it again")
            rows = rows_at_once(images, "images", where)
            for start in range(0, len(images), rows):
                with readable(f"{where}: image {start}"):
                    block = read_rows(images, start, min(start + rows, len(images)), "images", where)
                for image in block:
                    yield np.ascontiguousarray(image[..., ::-1]) if self.channel_order == "bgr" else image


def find_episodes(
    source: Path | str,
    *,
    channel_order: str = "rgb",
    instruction: str | None = None,
    instructions: Mapping[str, str] | None = None,
) -> list[Episode]:
    """Return the episodes of a file, or of all files below a folder, in name order.

    Args:
        source: the file or folder.
        channel_order: of the images in the files.
        instruction: what the robot is told in all of them; None: as they say, or by scenario.
        instructions: scenario -> text, in place of SCENARIO_INSTRUCTIONS and of what the files say.

    Raises:
        EpisodeError: there is no episode, or one is not what it should be.
    """
    source = Path(source)
    if not source.exists():
        raise EpisodeError(f"{source} does not exist, expected episodes ({', '.join(SUFFIXES)}); check the path")
    files = sorted(file for file in source.rglob("*") if _is_episodes(file)) if source.is_dir() else [source]
    if not files or source.suffix in _BAG_SUFFIXES:
        raise EpisodeError(f"{source} {_no_episodes(source)}")
    survey(files)
    return [episode for path in files for episode in episodes_in(path, channel_order, instruction, instructions or {})]


def episodes_in(
    path: Path,
    channel_order: str = "rgb",
    instruction: str | None = None,
    instructions: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Episode]:
    """Yield the episodes of one file; find_episodes says what the arguments mean, and bounds the time that it takes."""
    with opened(path) as file:
        if any(file.id.links.exists(name.encode()) for name in _DATASETS):
            groups = ["/"]
        elif len(file) > MAX_EPISODES:
            raise EpisodeError(f"{path} holds {len(file)} groups, expected at most {MAX_EPISODES}; split it")
        else:
            groups = [f"/{name}" for name in sorted(file)]
        if not groups:
            raise EpisodeError(f"{path} is empty, expected {' and '.join(_DATASETS)}; copy it again")
        if groups != ["/"] and not _holds_episodes(file):
            raise _layout_error(path, str(path), file, _DATASETS)
        for group in groups:
            found = member(file, group, _where(path, group)) if group != "/" else file
            yield _describe(path, group, found, channel_order, instruction, instructions)


def read_world(episode: Episode) -> tuple[int | None, str, np.ndarray | None]:
    """Return what an episode of the simulated world carries beside the rest, None and empty where it does not.

    It is the seed of the world, how the drive ended, and what there was to see, float32 [steps, numbers].
    """
    with opened(episode.path) as file:
        where = _where(episode.path, episode.group)
        group = member(file, episode.group, where)
        seed, sight = number_attribute(group, "seed", where), dataset(group, "sight", where)
        if seed is not None and not (seed.is_integer() and abs(seed) < 1 << 53):
            raise EpisodeError(f"{where}: the attribute seed is {seed:g}, expected a whole number; correct it")
        if sight is not None:
            shape = sight.shape or ()
            if len(shape) != 2 or shape[0] != len(episode.commands) or sight.dtype.kind != "f":
                raise EpisodeError(
                    f"{where} has sight {_type_name(sight)} {list(shape)}, expected float32 "
                    f"[{len(episode.commands)}, numbers]; record it again"
                )
            sight = read_small(sight, "sight", where).astype(np.float32)
        return None if seed is None else int(seed), text_attribute(group, "outcome", where), sight


def read_instructions(path: Path) -> dict[str, str]:
    """Read a JSON file {scenario: text}; raise EpisodeError where it is none."""
    content = read_json(path, "scenarios and texts", _MAX_TABLE_BYTES, error=EpisodeError)
    if not isinstance(content, dict) or not all(isinstance(text, str) and text.strip() for text in content.values()):
        raise EpisodeError(f'{path} is no table of texts, expected {{"1box_vert_left": "go ..."}}; correct it')
    return {scenario: check_instruction(text) for scenario, text in content.items()}


def _holds_episodes(file: h5py.File) -> bool:
    """Whether a file has a group with images or actions; what can't be told is left to who reads it."""
    for name in file:
        try:
            group = member(file, name, name)
            if isinstance(group, h5py.Group) and any(
                isinstance(member(group, each, name), h5py.Dataset) for each in _DATASETS
            ):
                return True
        except EpisodeError:
            return True
    return False


def _is_episodes(file: Path) -> bool:
    return file.suffix in SUFFIXES and not file.is_dir() and not file.name.startswith(".")


def _no_episodes(source: Path) -> str:
    """Return the rest of a sentence about a path that is no episode: what it is, and what makes episodes of it."""
    expected = f"expected episodes ({', '.join(SUFFIXES)})"
    entries = sorted(entry.name for entry in source.iterdir()) if source.is_dir() else [source.name]
    if any(name == "metadata.yaml" or name.endswith(_BAG_SUFFIXES) for name in entries):
        return f"is a bag, {expected}; make them of it with `mobile_vla bag-to-episodes {source} OUT_DIR`"
    if "actions.csv" in entries:
        return (
            f"is a folder with actions.csv, {expected}; make a bag of it with `mobile_vla make-bag {source} BAG`, then "
            "`mobile_vla bag-to-episodes BAG OUT_DIR`"
        )
    if not entries:
        return f"is an empty folder, {expected}; check the path"
    return f"holds no {' or '.join(SUFFIXES)} file but {_shortened(entries)}, {expected}; check the path"


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES_TOLD
    return ", ".join(names[:_MAX_NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")


def _datasets_in(group: h5py.Group, where: str) -> dict[str, h5py.Dataset]:
    """Return the data sets below a group by their paths, as far as they can be read, of a bounded number of names."""
    found: dict[str, h5py.Dataset] = {}
    waiting, seen = [("", group, 0)], 0
    while waiting:
        prefix, each, depth = waiting.pop(0)
        for name in each:
            seen += 1
            if seen > _MAX_NAMES_SEEN:
                return found
            with contextlib.suppress(EpisodeError):
                there = member(each, name, where)
                if isinstance(there, h5py.Dataset):
                    found[f"{prefix}{name}"] = there
                elif isinstance(there, h5py.Group) and depth < _MAX_NAMES_DEEP:
                    waiting.append((f"{prefix}{name}/", there, depth + 1))
    return found


def _layout_error(
    path: Path, where: str, group: h5py.Group | h5py.Dataset | None, missing: Sequence[str]
) -> EpisodeError:
    """Return what to say about a group that is no episode: what it holds, and how that is copied."""
    there = _datasets_in(group, where) if isinstance(group, h5py.Group) else {}
    told = _shortened([f"{name} {_type_name(data)} {list(data.shape or ())}" for name, data in there.items()])
    holds = f" (it holds {told})" if told else ""
    pictures = [name for name, data in there.items() if len(data.shape or ()) == 4]
    advice = "leave it out, or copy its data to these names"
    if "images" in missing and pictures:
        place = f"{group.name.rstrip('/')}/{pictures[0]}"
        advice = (
            f"copy the images with `h5copy -i {path} -o OUT.h5 -s {place} -d /images`, and write the velocities as "
        )
        advice += "actions beside them"
    return EpisodeError(
        f"{where} lacks data sets that are called {' and '.join(missing)}{holds}, expected an episode: images uint8 "
        f"[steps, height, width, 3] and actions [steps, 3] (m/s, m/s, rad/s); {advice}"
    )


def _where(path: Path, group: str) -> str:
    return str(path) if group == "/" else f"{path}{group}"


def _describe(
    path: Path,
    place: str,
    group: h5py.Group | h5py.Dataset | None,
    channel_order: str,
    told: str | None,
    instructions: Mapping[str, str],
) -> Episode:
    where = _where(path, place)
    found = {name: dataset(group, name, where) if isinstance(group, h5py.Group) else None for name in _DATASETS}
    missing = [name for name, data in found.items() if data is None]
    if missing:
        raise _layout_error(path, where, group, missing)
    commands = _commands(found["images"], found["actions"], where)
    rows_at_once(found["images"], "images", where)
    stem = path.stem if place == "/" else place.rpartition("/")[2]
    name = _label(text_attribute(group, "episode_name", where) or stem, "episode_name", where)
    scenario = _label(text_attribute(group, "scenario", where) or _scenario(name, path.stem), "scenario", where)
    text = told or instructions.get(scenario) or text_attribute(group, "instruction", where)
    try:
        text = check_instruction(text or SCENARIO_INSTRUCTIONS.get(scenario, ""))
    except InstructionError as error:
        raise EpisodeError(f"{where}: {error}") from error
    duration_s = number_attribute(group, "total_duration", where)
    if duration_s is not None and duration_s < 0.0:
        raise EpisodeError(f"{where}: total_duration is {duration_s:g} s, expected 0 or more; correct it")
    return Episode(
        path,
        place,
        name,
        scenario,
        text,
        commands,
        _events(group, len(commands), where),
        (found["images"].shape[2], found["images"].shape[1]),
        duration_s,
        channel_order,
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
            f"{where} has {found} {_type_name(images)} {list(sizes)} and actions {list(numbers)}{closing} uint8 "
            f"[steps, height, width, 3] and [steps, 3]; {_shape_advice(images, sizes, numbers)}"
        )
    steps, height, width, _ = sizes
    if not (1 <= height <= MAX_FRAME_SIDE_PX and 1 <= width <= MAX_FRAME_SIDE_PX) or steps > MAX_STEPS:
        raise EpisodeError(
            f"{where} has {steps} images of {width} x {height} pixels, expected at most {MAX_STEPS}, of 1 to "
            f"{MAX_FRAME_SIDE_PX} pixels per side; split or reduce it"
        )
    if actions.dtype.kind not in "fiu":
        raise EpisodeError(
            f"{where} has actions of type {_type_name(actions)}, expected numbers [steps, 3] (m/s, m/s, rad/s); "
            f"convert them"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        commands = read_small(actions, "actions", where).astype(np.float64)
    if not np.isfinite(commands).all():
        raise EpisodeError(f"{where} has actions that are NaN or Inf, expected finite ones; leave it out")
    return commands


def _shape_advice(images: h5py.Dataset, sizes: Sequence[int], numbers: Sequence[int]) -> str:
    """Say how images and actions of other shapes or types become those of an episode."""
    ways = []
    if len(sizes) == 4 and sizes[3] != 3 and sizes[1] == 3:
        ways.append("transpose the images with numpy.moveaxis(images, 1, -1)")
    elif len(sizes) == 4 and sizes[3] == 4:
        ways.append("leave out the images' fourth channel, images[..., :3]")
    elif (len(sizes) == 4 and sizes[3] == 1) or len(sizes) == 3:
        ways.append("repeat the images' one channel three times")
    if images.dtype != np.uint8 and images.dtype.kind in "iuf":
        ways.append("convert the images to uint8, 0 to 255")
    if len(numbers) == 2 and numbers[1] > 3:
        ways.append(f"keep the 3 of {numbers[1]} columns that are linear x, linear y and angular z")
    elif len(numbers) == 2 and 0 < numbers[1] < 3:
        ways.append("add the columns that are not driven as zeros: linear x, linear y, angular z")
    elif len(numbers) == 1 and sizes and numbers[0] == 3 * sizes[0]:
        ways.append("reshape the actions to [steps, 3]")
    if sizes and numbers and sizes[0] and numbers[0] and sizes[0] != numbers[0] and not ways:
        ways.append("leave out the steps that have only one of the two")
    return ", and ".join(ways) or "record it again"


def _events(group: h5py.Group, steps: int, where: str) -> tuple[str, ...]:
    """Return `action_event_types`, empty where there is none."""
    name = "action_event_types"
    data = dataset(group, name, where)
    if data is None:
        return ()
    is_text = h5py.check_string_dtype(data.dtype) is not None and data.dtype.itemsize <= _MAX_NAME_BYTES
    if data.shape != (steps,) or not (is_text or data.dtype.kind in "iu"):
        raise EpisodeError(
            f"{where} has {name} {_type_name(data)} {list(data.shape or ())}, expected short texts [{steps}]; "
            f"correct it"
        )
    # One by one: many elements can name the same long text.
    return tuple(_label(text_of(data[index], name, where), name, where) for index in range(steps))


def _type_name(data: h5py.Dataset) -> str:
    return "text" if h5py.check_string_dtype(data.dtype) is not None else str(data.dtype)


def _label(text: str, what: str, where: str) -> str:
    """Return a name that is short; raise EpisodeError for another."""
    text = text.encode("utf-8", errors="replace").decode()  # a file's name need not be UTF-8
    if len(text.encode()) > _MAX_NAME_BYTES or text in (".", ".."):
        raise EpisodeError(
            f"{where}: {what} is {text[:40]!r}, expected a name of 1 to {_MAX_NAME_BYTES} bytes; correct it"
        )
    return text


def _scenario(*names: str) -> str:
    for name in names:
        for scenario in SCENARIO_INSTRUCTIONS:
            if scenario in name:
                return scenario
    return NO_SCENARIO


class EpisodeWriter:
    """An episode that is being written, one step at a time; a context manager.

    The file has its name only when it is whole: an interruption leaves nothing behind.
    """

    def __init__(
        self, path: Path, size_px: tuple[int, int], *, instruction: str = "", scenario: str = "", compress: bool = True
    ) -> None:
        """Prepare a file for images of `size_px` (width, height); raise EpisodeError where it can't be made."""
        if path.exists():
            raise EpisodeError(f"{path} exists already, expected a new file; choose another place or remove it")
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
            raise EpisodeError(f"{self._path} can't be written ({error}); make room on the disk") from error
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
        commands = np.array(self._commands, dtype=np.float32).reshape(-1, 3)
        self._file["actions"] = commands
        self._file["stamps_s"] = np.array(self._stamps_s, dtype=np.float64)
        events = [EVENT_ACTION if command.any() else EVENT_STOP for command in commands]
        events[:1] = [EVENT_START] * len(events[:1])
        self._file.create_dataset("action_event_types", data=events, dtype=h5py.string_dtype())
        self._file.attrs["episode_name"] = self._path.stem
        self._file.attrs["num_frames"] = len(commands)
        self._file.attrs["total_duration"] = self._stamps_s[-1] - self._stamps_s[0] if self._stamps_s else 0.0
        for name, value in self._attributes.items():
            if value:
                self._file.attrs[name] = value
