"""What is learned from: episodes in memory, frames reduced to the policy's size.

They come from the HDF5 files that the package `episodes` describes, or from a folder with images/ and actions.csv.
Episodes of the simulated world carry more than the original's: attributes `seed` and `outcome`, and `sight` [steps,
numbers], what there was to see. Many episodes share a file, in a group each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mobile_vla_inference.bags.frames_folder import read_frames_folder
from mobile_vla_inference.border import MobileVlaError, check_instruction, read_image, reduce_frame


class TrainingError(MobileVlaError):
    """Something can't be trained, or trained on."""


@dataclass(frozen=True)
class Lesson:
    """One drive to learn from.

    Attributes:
        frames: uint8 RGB [steps, side, side, 3].
        commands: linear x, linear y (m/s), angular z (rad/s) that were right at each step, float32 [steps, 3].
        instruction: what the robot was told.
        scenario: its name; empty where there is none.
        seed: of the world; -1 where it is none.
        outcome: how it ended; empty where nobody judged.
        sight: what there was to see, float32 [steps, numbers], NaN where there is nothing to tell; None without a map.
    """

    frames: np.ndarray
    commands: np.ndarray
    instruction: str
    scenario: str = ""
    seed: int = -1
    outcome: str = ""
    sight: np.ndarray | None = None

    def steps(self, first: int, end: int | None) -> Lesson:
        """Return the part from one step to before another."""
        sight = None if self.sight is None else self.sight[first:end]
        return replace(self, frames=self.frames[first:end], commands=self.commands[first:end], sight=sight)


def read_lessons(source: Path | str, side_px: int, instruction: str | None = None) -> list[Lesson]:
    """Read a file, a folder of files, or a folder with images/ and actions.csv.

    Args:
        source: where.
        side_px: side that frames are reduced to.
        instruction: what the robot is told, in place of what the episodes say.

    Raises:
        TrainingError: an episode tells no instruction.
        MobileVlaError: nothing is there, or it is no episode.
    """
    source = Path(source)
    if (source / "actions.csv").is_file():
        return [_from_frames_folder(source, side_px, instruction)]
    from mobile_vla_inference.episodes.files import find_episodes, read_world

    lessons = []
    for episode in find_episodes(source, instruction=instruction):
        if not episode.instruction:
            raise TrainingError(f"{episode.path} tells no instruction, expected what was told; give --instruction")
        frames = np.stack([reduce_frame(frame, side_px) for frame in episode.frames()])
        seed, outcome, sight = read_world(episode)
        seed = -1 if seed is None else seed
        commands = episode.commands.astype(np.float32)
        lessons.append(Lesson(frames, commands, episode.instruction, episode.scenario, seed, outcome, sight))
    return lessons


def write_lessons(path: Path | str, lessons: Iterable[Lesson]) -> None:
    """Write a file with a group for each lesson; it appears when all of it is written."""
    import h5py

    from mobile_vla_inference.episodes.files import EVENT_ACTION, EVENT_START, EVENT_STOP

    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with h5py.File(part, "w") as file:
            for index, lesson in enumerate(lessons):
                group = file.create_group(f"episode_{index:05d}")
                events = [EVENT_ACTION if command.any() else EVENT_STOP for command in lesson.commands]
                events[0] = EVENT_START
                group["images"] = lesson.frames
                group["actions"] = lesson.commands.astype(np.float32)
                group.create_dataset("action_event_types", data=events, dtype=h5py.string_dtype())
                if lesson.sight is not None:
                    group["sight"] = lesson.sight
                group.attrs["num_frames"] = len(lesson.frames)
                for name in ("instruction", "scenario", "seed", "outcome"):
                    group.attrs[name] = getattr(lesson, name)
        part.replace(path)
    except OSError as error:
        raise TrainingError(f"{path} can't be written ({error}), expected room on the disk; free some") from error
    finally:
        part.unlink(missing_ok=True)


def _from_frames_folder(folder: Path, side_px: int, instruction: str | None) -> Lesson:
    """Read throttle as linear x and steering, negated, as angular z: full is 1 m/s and 1 rad/s, as make-bag has it."""
    if instruction is None:
        raise TrainingError(f"{folder} tells no instruction, expected what was told; give --instruction")
    lines = read_frames_folder(folder)
    frames = np.stack([reduce_frame(read_image(line.image), side_px) for line in lines])
    commands = np.array([(line.throttle, 0.0, -line.steering) for line in lines], dtype=np.float32)
    return Lesson(frames, commands, check_instruction(instruction))
