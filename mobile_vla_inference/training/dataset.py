"""Episodes in memory for training: frames reduced to the policy's size.

They come from files that the package `episodes` reads, or from a folder with images/ and actions.csv. Episodes of the
simulated world also have the seed of their world, an outcome and auxiliary targets; many of them share an HDF5 file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobile_vla_inference.bags.step_period import StepPeriod, period_of_stamps
from mobile_vla_inference.episodes.frames_folder import FULL_ANGULAR_RADPS, FULL_LINEAR_MPS, read_frames_folder
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.frames import read_image, reduce_frame
from mobile_vla_inference.instructions import check_instruction

if TYPE_CHECKING:
    from mobile_vla_inference.episodes.episode import Episode


class TrainingError(MobileVlaError):
    """Something can't be trained, or trained on."""


@dataclass(frozen=True)
class TrainingEpisode:
    """One drive to learn from.

    Attributes:
        frames: uint8 RGB [steps, side, side, 3].
        commands: the labels: linear x, linear y (m/s), angular z (rad/s) to learn at each step, float32 [steps, 3].
        instruction: what the robot was instructed to do.
        scenario: its name; empty where there is none.
        seed: of the simulated world; -1 where there is none.
        outcome: how the episode ended; empty where it wasn't judged.
        auxiliary_targets: float32 [steps, numbers], NaN where a number is unknown; None without a map of the world.
        period: the time between steps, from the recording; None where it gives none.
        where: the recording, for messages.
        recorded_instruction: the instruction that the recording itself gives.
    """

    frames: np.ndarray
    commands: np.ndarray
    instruction: str
    scenario: str = ""
    seed: int = -1
    outcome: str = ""
    auxiliary_targets: np.ndarray | None = None
    period: StepPeriod | None = None
    where: str = ""
    recorded_instruction: str = ""

    def steps(self, first: int, end: int | None) -> TrainingEpisode:
        """Return the steps from `first` up to, and without, `end`."""
        targets = None if self.auxiliary_targets is None else self.auxiliary_targets[first:end]
        return replace(
            self, frames=self.frames[first:end], commands=self.commands[first:end], auxiliary_targets=targets
        )


def read_training_episodes(
    source: Path | str,
    side_px: int,
    instruction: str | None = None,
    *,
    channel_order: str = "rgb",
    full_speeds: tuple[float, float] = (FULL_LINEAR_MPS, FULL_ANGULAR_RADPS),
) -> list[TrainingEpisode]:
    """Read a file, a folder of files, or a folder with images/ and actions.csv.

    Args:
        source: the file or folder.
        side_px: side that frames are reduced to.
        instruction: what the robot is instructed, in place of the episodes' own instructions.
        channel_order: of the images in HDF5 files, `rgb` or `bgr`.
        full_speeds: for a folder with actions.csv: m/s at full throttle, rad/s at full steering.

    Raises:
        TrainingError: an episode has no instruction, or a command that is not a finite float32.
        MobileVlaError: nothing is there, or it is not an episode.
    """
    source = Path(source)
    if not source.exists():
        raise TrainingError(
            f"{source} does not exist, expected episodes (.h5, .hdf5 or a folder of them), a folder with images/ "
            "and actions.csv, or the word world; check the path"
        )
    if (source / "actions.csv").is_file():
        return [_from_frames_folder(source, side_px, instruction, full_speeds)]
    from mobile_vla_inference.episodes.find import find_episodes

    episodes = find_episodes(source, channel_order=channel_order)
    return [_from_episode(episode, side_px, instruction) for episode in episodes]


def write_training_episodes(path: Path | str, episodes: Iterable[TrainingEpisode]) -> None:
    """Write an HDF5 file with a group for each episode; the file appears when all of it is written."""
    from mobile_vla_inference.episodes.hdf5.bounded import h5py
    from mobile_vla_inference.episodes.hdf5.layout import AUXILIARY_TARGETS
    from mobile_vla_inference.episodes.hdf5.writer import write_commands, write_stamps

    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with h5py.File(part, "w") as file:
            for index, episode in enumerate(episodes):
                group = file.create_group(f"episode_{index:05d}")
                group["images"] = episode.frames
                write_commands(group, episode.commands)
                if episode.auxiliary_targets is not None:
                    group[AUXILIARY_TARGETS] = episode.auxiliary_targets
                if episode.period is not None:
                    write_stamps(group, np.arange(len(episode.frames)) * episode.period.period_s)
                for name in ("instruction", "scenario", "seed", "outcome"):
                    group.attrs[name] = getattr(episode, name)
        part.replace(path)
    except OSError as error:
        raise TrainingError(f"{path} can't be written ({error}), expected space on the disk; free some") from error
    finally:
        part.unlink(missing_ok=True)


def _from_episode(episode: Episode, side_px: int, instruction: str | None) -> TrainingEpisode:
    """Read all images of an episode, with its instruction or the one that is given."""
    text = check_instruction(instruction or "") or episode.instruction
    if not text:
        raise _no_instruction(episode.path)
    period, simulation = episode.period(), episode.simulation()
    return TrainingEpisode(
        frames=np.stack([reduce_frame(frame, side_px) for frame in episode.frames()]),
        commands=_float32(episode.commands, episode.where),
        instruction=text,
        scenario=episode.scenario,
        seed=-1 if simulation.seed is None else simulation.seed,
        outcome=simulation.outcome,
        auxiliary_targets=simulation.auxiliary_targets,
        period=period,
        where=episode.where,
        recorded_instruction=episode.instruction,
    )


def _from_frames_folder(
    folder: Path, side_px: int, instruction: str | None, full_speeds: tuple[float, float]
) -> TrainingEpisode:
    """Read throttle as linear x and steering, negated, as angular z, as make-bag does."""
    text = check_instruction(instruction or "")
    if not text:
        raise _no_instruction(folder)
    lines = read_frames_folder(folder)
    linear_mps, angular_radps = full_speeds
    commands = np.array([(line.throttle * linear_mps, 0.0, -line.steering * angular_radps) for line in lines])
    return TrainingEpisode(
        frames=np.stack([reduce_frame(read_image(line.image), side_px) for line in lines]),
        commands=_float32(commands, str(folder)),
        instruction=text,
        period=period_of_stamps([line.stamp_s for line in lines], str(folder)),
        where=str(folder),
    )


def _no_instruction(path: Path) -> TrainingError:
    return TrainingError(f"{path} has no instruction, expected what the robot was instructed to do; give --instruction")


def _float32(commands: np.ndarray, where: str) -> np.ndarray:
    """Return commands as float32, as training uses them; raise TrainingError where one is too large for that."""
    with np.errstate(over="ignore"):
        narrow = commands.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise TrainingError(f"{where} has actions that are NaN or too large, expected m/s and rad/s; leave it out")
    return narrow
