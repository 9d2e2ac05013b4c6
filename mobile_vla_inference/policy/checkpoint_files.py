"""Where the files that belong to a checkpoint are: its settings and its processors. Names only, nothing is read."""

from __future__ import annotations

from pathlib import Path

from mobile_vla_inference.policy.fingerprint import SETTINGS_FILE

__all__ = ["SETTINGS_FILE", "processor_places", "settings_path"]


def settings_path(checkpoint: Path) -> Path:
    """Return where the settings of a checkpoint file or a converted folder are written."""
    if checkpoint.is_dir():
        return checkpoint / SETTINGS_FILE
    return checkpoint.with_name(f"{checkpoint.name}.{SETTINGS_FILE}")


def processor_places(checkpoint: Path) -> tuple[Path, ...]:
    """Return where the processor folder of a checkpoint file or a converted folder is looked for; the first wins."""
    if checkpoint.is_dir():
        return (checkpoint / "processors",)
    return checkpoint.with_suffix(".processors"), checkpoint.with_name("processors")
