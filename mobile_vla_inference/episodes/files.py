"""Read and write episodes in the HDF5 format of the original data, one frame in memory at a time.

An episode is `images` [steps, height, width, 3] uint8, `actions` [steps, 3] float32 (linear x, linear y in m/s, angular
z in rad/s) and `action_event_types` [steps] strings, at the root of a file or in groups of it, with the attributes
`episode_name`, `num_frames` and `total_duration`. The original tells the scenario by the episode's name
(`episode_20250808_123136_1box_vert_left`) and the instruction by the scenario; the attributes `scenario` and
`instruction` say it outright.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_vla_inference.border import MobileVlaError, check_instruction

try:
    import h5py
except ImportError as missing:
    raise MobileVlaError(
        f"episodes can't be read without h5py ({missing}), expected what requirements/workbench.txt names; "
        "run `pip install -r requirements/workbench.txt`"
    ) from missing

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


class EpisodeError(MobileVlaError):
    """Episodes can't be read or written."""


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
        with _opened(self.path) as file:
            images = file[self.group]["images"]
            for index in range(len(images)):
                try:
                    image = images[index]
                except OSError as error:
                    raise EpisodeError(
                        f"{self.path}: image {index} can't be read ({error}), expected a whole file; copy it again"
                    ) from error
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
    if not files:
        raise EpisodeError(f"{source} holds no {' or '.join(SUFFIXES)} file, expected episodes; check the path")
    episodes = []
    for path in files:
        with _opened(path) as file:
            groups = ["/"] if "images" in file or "actions" in file else [f"/{name}" for name in sorted(file)]
            if not groups:
                raise EpisodeError(f"{path} is empty, expected {' and '.join(_DATASETS)}; copy it again")
            for group in groups:
                episodes.append(_describe(path, file[group], channel_order, instruction, instructions or {}))
    return episodes


def read_instructions(path: Path) -> dict[str, str]:
    """Read a JSON file {scenario: text}; raise EpisodeError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EpisodeError(f"{path} can't be read as JSON ({error}), expected scenario and text; correct it") from error
    if not isinstance(content, dict) or not all(isinstance(text, str) and text.strip() for text in content.values()):
        raise EpisodeError(f'{path} is no table of texts, expected {{"1box_vert_left": "go ..."}}; correct it')
    return {scenario: check_instruction(text) for scenario, text in content.items()}


def _is_episodes(file: Path) -> bool:
    return file.suffix in SUFFIXES and file.is_file() and not file.name.startswith(".")


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise EpisodeError(f"{path} can't be read as HDF5 ({error}); check the path, or copy it again") from error
    with file:
        yield file


def _describe(
    path: Path, group: h5py.Group, channel_order: str, told: str | None, instructions: Mapping[str, str]
) -> Episode:
    where = str(path) if group.name == "/" else f"{path}{group.name}"
    missing = [name for name in _DATASETS if not isinstance(group, h5py.Group) or name not in group]
    if missing:
        raise EpisodeError(f"{where} lacks {' and '.join(missing)}, expected an episode; leave it out")
    images, actions = group["images"], group["actions"]
    steps = len(images) if images.ndim else 0
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != 3 or actions.shape != (steps, 3) or not steps:
        raise EpisodeError(
            f"{where} has images {images.dtype} {list(images.shape)} and actions {list(actions.shape)}, expected uint8 "
            "[steps, height, width, 3] and [steps, 3]; record it again"
        )
    commands = actions[()].astype(np.float64)
    if not np.isfinite(commands).all():
        raise EpisodeError(f"{where} has actions that are NaN or Inf, expected finite ones; leave it out")
    attributes = group.attrs
    stem = path.stem if group.name == "/" else group.name.rpartition("/")[2]
    name = _text(attributes.get("episode_name", stem))
    scenario = _text(attributes.get("scenario", "")) or _scenario(name, path.stem)
    text = told or instructions.get(scenario) or _text(attributes.get("instruction", ""))
    duration_s = attributes.get("total_duration")
    return Episode(
        path,
        group.name,
        name,
        scenario,
        check_instruction(text or SCENARIO_INSTRUCTIONS.get(scenario, "")),
        commands,
        tuple(_text(event) for event in group["action_event_types"][()]) if "action_event_types" in group else (),
        (images.shape[2], images.shape[1]),
        None if duration_s is None else float(duration_s),
        channel_order,
    )


def _scenario(*names: str) -> str:
    for name in names:
        for scenario in SCENARIO_INSTRUCTIONS:
            if scenario in name:
                return scenario
    return NO_SCENARIO


def _text(value: object) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


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
