"""What a checkpoint records about its training, and which images of a drive that training saw.

A checkpoint of `mobile_vla train` holds the options of its training: the name of the episodes, and `--steps` and
`--validate-steps` where they were given. It holds no fingerprint of an image: a drive is recognised by its name only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.outside_files import read_json
from mobile_vla_inference.policy.storage.formats.recognition import read_index

_MAX_CONFIG_BYTES = 64 << 20
_SUFFIXES = (".mcap", ".db3", ".h5", ".hdf5")


@dataclass(frozen=True)
class TrainingRecord:
    """The options of a training, as far as a checkpoint records them.

    Attributes:
        episodes: name of the file or folder with the episodes, or `world` for the simulated world.
        steps: steps of each episode that were trained on, (first, end); None: not recorded.
        validate_steps: those that were validated on; None: not recorded.
    """

    episodes: str
    steps: tuple[int, int] | None = None
    validate_steps: tuple[int, int] | None = None


@dataclass(frozen=True)
class SeenFrames:
    """Which images of a drive training saw.

    Attributes:
        sentence: what is known, for people.
        seen: one value per image; None: not recorded.
    """

    sentence: str
    seen: tuple[bool, ...] | None = None


def read_training_record(checkpoint: Path) -> TrainingRecord | None:
    """Read what a checkpoint file or folder records; None where it records no training or can't be read."""
    try:
        if checkpoint.is_dir():
            config = read_json(
                checkpoint / "config.json", "the configuration", _MAX_CONFIG_BYTES, error=CheckpointError
            )
            metadata = config.get("training") if isinstance(config, Mapping) else None
        else:
            metadata = read_index(checkpoint).metadata
    except (CheckpointError, OSError, ValueError):
        return None
    args = metadata.get("args") if isinstance(metadata, Mapping) else None
    if not isinstance(args, Mapping) or not isinstance(args.get("episodes"), str):
        return None
    return TrainingRecord(_name(args["episodes"]), _span(args.get("steps")), _span(args.get("validate_steps")))


def seen_frames(record: TrainingRecord | None, bag: Path, count: int) -> SeenFrames:
    """Return which of the `count` images of a bag training saw: those at `steps`, where the names are the same."""
    if record is None:
        return SeenFrames("Not recorded: the checkpoint doesn't name the episodes that it was trained on.")
    trained = f"The checkpoint was trained on “{record.episodes}”"
    if record.episodes != _name(str(bag)):
        return SeenFrames(
            f"Not recorded for this drive. {trained}; whether images of “{bag.name}” were among them is not recorded."
        )
    if record.steps is None:
        return SeenFrames(
            f"Not recorded. {trained}, but without --steps: which steps were used for training is not stored."
        )
    first, end = record.steps
    seen = tuple(first <= index < end for index in range(count))
    rest = "" if record.validate_steps is None else " and validated on {} to {}".format(*_closed(record.validate_steps))
    return SeenFrames(
        "{}, steps {} to {}{}. This drive has the same name, so its images at these positions count as seen; the "
        "images themselves were not compared.".format(trained, *_closed(record.steps), rest),
        seen,
    )


def _closed(span: tuple[int, int]) -> tuple[int, int]:
    return span[0], span[1] - 1


def _name(path: str) -> str:
    name = Path(path).name
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


def _span(value: Any) -> tuple[int, int] | None:
    """Return (first, end) where a file has two whole numbers, else None."""
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(type(each) is int for each in value):
        return None
    return value[0], value[1]
