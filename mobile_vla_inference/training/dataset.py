"""What is learned from: episodes in memory, frames reduced to the policy's size.

They come from the HDF5 files that the package `episodes` describes, or from a folder with images/ and actions.csv.
Episodes of the simulated world carry more than the original's: attributes `seed` and `outcome`, and `sight` [steps,
numbers], what there was to see. Many episodes share a file, in a group each. The time from step to step comes from
`stamps_s`, else from `total_duration`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mobile_vla_inference.bags.step_period import StepPeriod, period_of_stamps
from mobile_vla_inference.episodes.frames_folder import FULL_ANGULAR_RADPS, FULL_LINEAR_MPS, read_frames_folder
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.frames import read_image, reduce_frame
from mobile_vla_inference.instructions import check_instruction


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
        period: the time from step to step, as the recording tells it; None where it doesn't.
        where: the recording, for messages.
        recorded_instruction: what the recording itself tells of what was told.
    """

    frames: np.ndarray
    commands: np.ndarray
    instruction: str
    scenario: str = ""
    seed: int = -1
    outcome: str = ""
    sight: np.ndarray | None = None
    period: StepPeriod | None = None
    where: str = ""
    recorded_instruction: str = ""

    def steps(self, first: int, end: int | None) -> Lesson:
        """Return the part from one step to before another."""
        sight = None if self.sight is None else self.sight[first:end]
        return replace(self, frames=self.frames[first:end], commands=self.commands[first:end], sight=sight)


def read_lessons(
    source: Path | str,
    side_px: int,
    instruction: str | None = None,
    *,
    channel_order: str = "rgb",
    full_speeds: tuple[float, float] = (FULL_LINEAR_MPS, FULL_ANGULAR_RADPS),
) -> list[Lesson]:
    """Read a file, a folder of files, or a folder with images/ and actions.csv.

    Args:
        source: where.
        side_px: side that frames are reduced to.
        instruction: what the robot is told, in place of what the episodes say.
        channel_order: of the images in HDF5 files, `rgb` or `bgr`.
        full_speeds: of a folder with actions.csv: m/s at full throttle, rad/s at full steering.

    Raises:
        TrainingError: an episode tells no instruction, or its values can't be what they should be.
        MobileVlaError: nothing is there, or it is no episode.
    """
    source = Path(source)
    if not source.exists():
        raise TrainingError(
            f"{source} does not exist, expected episodes (.h5, .hdf5 or a folder of them), a folder with images/ "
            "and actions.csv, or the word world; check the path"
        )
    if (source / "actions.csv").is_file():
        return [_from_frames_folder(source, side_px, instruction, full_speeds)]
    from mobile_vla_inference.episodes.files import find_episodes, read_world
    from mobile_vla_inference.episodes.step_period import episode_period, named

    lessons = []
    for episode in find_episodes(source, channel_order=channel_order):
        told = check_instruction(instruction or "") or episode.instruction
        if not told:
            raise TrainingError(f"{episode.path} tells no instruction, expected what was told; give --instruction")
        period = episode_period(episode)
        frames = np.stack([reduce_frame(frame, side_px) for frame in episode.frames()])
        seed, outcome, sight = read_world(episode)
        lessons.append(
            Lesson(
                frames,
                _float32(episode.commands, named(episode)),
                told,
                episode.scenario,
                -1 if seed is None else seed,
                outcome,
                sight,
                period,
                named(episode),
                episode.instruction,
            )
        )
    return lessons


def _float32(commands: np.ndarray, where: str) -> np.ndarray:
    """Return commands as they are trained on; raise TrainingError where one is too large for that."""
    with np.errstate(over="ignore"):
        narrow = commands.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise TrainingError(f"{where} has actions that are NaN or too large, expected m/s and rad/s; leave it out")
    return narrow


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
                if lesson.period is not None:
                    stamps_s = np.arange(len(lesson.frames)) * lesson.period.period_s
                    group["stamps_s"] = stamps_s
                    group.attrs["total_duration"] = stamps_s[-1]
                for name in ("instruction", "scenario", "seed", "outcome"):
                    group.attrs[name] = getattr(lesson, name)
        part.replace(path)
    except OSError as error:
        raise TrainingError(f"{path} can't be written ({error}), expected room on the disk; free some") from error
    finally:
        part.unlink(missing_ok=True)


def _from_frames_folder(
    folder: Path, side_px: int, instruction: str | None, full_speeds: tuple[float, float]
) -> Lesson:
    """Read throttle as linear x and steering, negated, as angular z, as make-bag has it."""
    told = check_instruction(instruction or "")
    if not told:
        raise TrainingError(f"{folder} tells no instruction, expected what was told; give --instruction")
    lines = read_frames_folder(folder)
    frames = np.stack([reduce_frame(read_image(line.image), side_px) for line in lines])
    linear_mps, angular_radps = full_speeds
    commands = np.array([(line.throttle * linear_mps, 0.0, -line.steering * angular_radps) for line in lines])
    period = period_of_stamps([line.stamp_s for line in lines], str(folder))
    return Lesson(frames, _float32(commands, str(folder)), told, period=period, where=str(folder))
