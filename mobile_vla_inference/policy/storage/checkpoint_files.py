"""Where the files that belong to a checkpoint are: its settings and its processors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.config import HybridConfig
from mobile_vla_inference.policy.storage.fingerprint import SETTINGS_FILE

IMAGE_START = "<image>"
IMAGE_END = "</image>"
#: Kosmos-2's tag tokens, in the order of its vocabulary.
KOSMOS_TAGS = (
    "</doc>",
    IMAGE_START,
    IMAGE_END,
    "</chunk>",
    "</line>",
    "<phrase>",
    "</phrase>",
    "<object>",
    "</object>",
    "</delimiter_of_multi_objects/>",
    "<grounding>",
)
KOSMOS_FOLDER = "kosmos-2-patch14-224"
CLIP_FOLDER = "clip-vit-base-patch32"
PROCESSORS_FOLDER = "processors"
_OWNERS = {KOSMOS_FOLDER: "microsoft", CLIP_FOLDER: "openai"}


def settings_path(checkpoint: Path) -> Path:
    """Return the path of the settings of a checkpoint file or a converted folder."""
    if checkpoint.is_dir():
        return checkpoint / SETTINGS_FILE
    return checkpoint.with_name(f"{checkpoint.name}.{SETTINGS_FILE}")


def processor_places(checkpoint: Path) -> tuple[Path, ...]:
    """Return the possible processor folders of a checkpoint; the first that exists is used."""
    if checkpoint.is_dir():
        return (checkpoint / PROCESSORS_FOLDER,)
    return checkpoint.with_suffix(".processors"), checkpoint.with_name(PROCESSORS_FOLDER)


@dataclass(frozen=True)
class ProcessorFolders:
    """The two tokenizer folders of a processor folder."""

    kosmos: Path
    clip: Path


def find_processors(checkpoint: Path | str, processors_folder: Path | str | None = None) -> Path:
    """Return the processor folder of a checkpoint.

    It is `processors_folder` if given; else `processors/` inside a converted folder; else `X.processors/` or
    `processors/` next to `X.pth`.

    Raises:
        CheckpointError: there is none.
    """
    checkpoint = Path(checkpoint)
    candidates = processor_places(checkpoint) if processors_folder is None else (Path(processors_folder),)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise CheckpointError(
        f"no processor folder at {' or '.join(str(c) for c in candidates)}, expected one with {KOSMOS_FOLDER}/ and "
        f"{CLIP_FOLDER}/; copy the downloaded processors there or name their folder with --processors"
    )


def processor_folders(folder: Path | str, config: HybridConfig) -> ProcessorFolders:
    """Return the tokenizer folders that an architecture needs; raise CheckpointError if one is missing."""
    folder = Path(folder)
    kosmos, clip = (_named_folder(folder, name) for name in (KOSMOS_FOLDER, CLIP_FOLDER))
    needed = [kosmos] if config.clip_text is None else [kosmos, clip]
    for path in needed:
        if not path.is_dir():
            raise CheckpointError(
                f"{folder} has no folder {path.name}, expected the files of {_OWNERS[path.name]}/{path.name}; "
                f"copy the downloaded processor there"
            )
    return ProcessorFolders(kosmos, clip)


def _named_folder(folder: Path, name: str) -> Path:
    nested = folder / _OWNERS[name] / name
    return nested if nested.is_dir() else folder / name
