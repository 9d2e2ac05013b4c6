"""Find the episodes below a path, and read them with the reader of their format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mobile_vla_inference.episodes.episode import Episode, EpisodeError
from mobile_vla_inference.episodes.hdf5.layout import SUFFIXES, shortened
from mobile_vla_inference.episodes.hdf5.reader import episodes_in
from mobile_vla_inference.episodes.hdf5.survey import survey

#: Suffixes of a bag's files.
_BAG_SUFFIXES = (".mcap", ".db3")


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
        instruction: what the robot is instructed in all of them; None: by file or scenario.
        instructions: scenario -> text, in place of SCENARIO_INSTRUCTIONS and of what the files contain.

    Raises:
        EpisodeError: there is no episode, or one can't be read.
    """
    source = Path(source)
    if not source.exists():
        raise EpisodeError(f"{source} does not exist, expected episodes ({', '.join(SUFFIXES)}); check the path")
    files = sorted(file for file in source.rglob("*") if _is_hdf5(file)) if source.is_dir() else [source]
    if not files or source.suffix in _BAG_SUFFIXES:
        raise EpisodeError(f"{source} {_no_episodes(source)}")
    survey(files)
    return [episode for path in files for episode in episodes_in(path, channel_order, instruction, instructions or {})]


def _is_hdf5(file: Path) -> bool:
    return file.suffix in SUFFIXES and not file.is_dir() and not file.name.startswith(".")


def _no_episodes(source: Path) -> str:
    """Return the rest of a message about a path without episodes: what it is, and how to make episodes of it."""
    expected = f"expected episodes ({', '.join(SUFFIXES)})"
    entries = sorted(entry.name for entry in source.iterdir()) if source.is_dir() else [source.name]
    if any(name == "metadata.yaml" or name.endswith(_BAG_SUFFIXES) for name in entries):
        return f"is a bag, {expected}; convert it with `mobile_vla bag-to-episodes {source} OUT_DIR`"
    if "actions.csv" in entries:
        return (
            f"is a folder with actions.csv, {expected}; convert it with `mobile_vla make-bag {source} BAG`, then "
            "`mobile_vla bag-to-episodes BAG OUT_DIR`"
        )
    if not entries:
        return f"is an empty folder, {expected}; check the path"
    return f"contains no {' or '.join(SUFFIXES)} file, only {shortened(entries)}, {expected}; check the path"
