"""The files of a training: a checkpoint in the published layout with its settings and processors, and the progress.

For `small.pth` these are `small.pth` itself (epoch, model_state_dict, optimizer_state_dict, val_mae, args),
`small.pth.policy.json` with its confirmed settings, `small.processors/` with the tokenizers, `small.loss.svg`, and,
until the training is done, `small.training` with everything that --resume needs.
"""

from __future__ import annotations

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mobile_vla_inference.atomic import replacing, write_text_atomically
from mobile_vla_inference.policy.storage.checkpoint_files import processor_places, settings_path
from mobile_vla_inference.policy.storage.settings_file import save_settings
from mobile_vla_inference.training.dataset import TrainingError
from mobile_vla_inference.training.trainer import Trainer

_PLOT_PX = (640, 320)
_MARGIN_PX = 46
_PLOT_POINTS = 400


def save_checkpoint(out: Path, trainer: Trainer, epoch: int, val_mae: float, args: Namespace) -> None:
    """Write the checkpoint, its settings and its plot, each atomically; its processors must be there already."""
    model = trainer.network.model
    content = {
        "epoch": epoch,
        "model_state_dict": {name: value.detach().cpu() for name, value in model.state_dict().items()},
        "optimizer_state_dict": trainer.optimizer_state(),
        "val_mae": val_mae,
        "args": args,
    }
    with replacing(out) as path:
        torch.save(content, path)
    save_settings(out, model.settings)
    write_text_atomically(_plot_path(out), loss_plot(trainer.losses))


def install_processors(source: Path, out: Path) -> None:
    """Copy the tokenizers of a training to the place where the checkpoint's loader looks for them."""
    target = processor_places(out)[0]
    if source.resolve() == target.resolve():
        return
    part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{target.name}."))
    shutil.copytree(source, part, dirs_exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    part.chmod(0o755)
    part.rename(target)


def training_path(out: Path) -> Path:
    """Return the file from which --resume continues."""
    return out.with_suffix(".training")


def episodes_path(out: Path) -> Path:
    """Return the folder with the episodes that a curriculum records, until it is done."""
    return out.with_suffix(".episodes")


def written_paths(out: Path, in_world: bool) -> tuple[Path, ...]:
    """Return every file and folder that a training replaces or removes; `in_world` for a curriculum."""
    paths = (out, settings_path(out), processor_places(out)[0], _plot_path(out), training_path(out))
    return (*paths, episodes_path(out)) if in_world else paths


def _plot_path(out: Path) -> Path:
    return out.with_suffix(".loss.svg")


def save_progress(out: Path, trainer: Trainer, extra: dict[str, Any]) -> None:
    """Write everything that is needed to continue, in one file."""
    state = {**trainer.state(), **extra}
    with replacing(training_path(out)) as path:
        torch.save(state, path)


def load_progress(out: Path) -> dict[str, Any]:
    """Read what `save_progress` wrote; raise TrainingError where there is no such file."""
    path = training_path(out)
    try:
        return torch.load(path, weights_only=True)
    except FileNotFoundError as error:
        raise TrainingError(
            f"{path} doesn't exist, expected the progress of an interrupted training; leave out --resume"
        ) from error


def loss_plot(losses: Sequence[float]) -> str:
    """Draw the loss over the updates as SVG, on a logarithmic scale, each point the mean of a few updates."""
    import numpy as np

    width, height = _PLOT_PX
    values = np.array(losses or [1.0])
    groups = np.array_split(values, min(len(values), _PLOT_POINTS))
    means = np.log10(np.maximum([group.mean() for group in groups], 1e-6))
    low, high = np.floor(means.min() * 5) / 5, np.ceil(means.max() * 5) / 5 + 1e-9
    xs = np.linspace(_MARGIN_PX, width - 12, len(means))
    ys = 12 + (high - means) / (high - low + 1e-9) * (height - 12 - _MARGIN_PX)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys))
    style = 'font-family="sans-serif" font-size="12" fill="#444"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n'
        f'<polyline points="{line}" fill="none" stroke="#2563b0" stroke-width="1.5"/>\n'
        f'<text x="4" y="20" {style}>{10**high:.3f}</text>\n'
        f'<text x="4" y="{height - _MARGIN_PX}" {style}>{10**low:.3f}</text>\n'
        f'<text x="{width // 2}" y="{height - 14}" text-anchor="middle" {style}>updates (to {len(values)})</text>\n'
        f'<text x="{width // 2}" y="16" text-anchor="middle" {style}>loss on the actions</text>\n'
        "</svg>\n"
    )
