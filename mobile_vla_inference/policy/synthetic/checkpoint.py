"""Make a synthetic checkpoint in the published layout: `mobile_vla make-checkpoint`."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

from mobile_vla_inference.atomic import remove_folder
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.config import STOCK_HEAD_DIM, TOWERS, HybridConfig
from mobile_vla_inference.policy.storage.fusion import solve_fusion_features
from mobile_vla_inference.policy.storage.layout import tensor_shapes
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.storage.settings_file import save_settings
from mobile_vla_inference.policy.synthetic.archive import ArchiveContents, Progress, trained_shapes, write_archive
from mobile_vla_inference.policy.synthetic.processors import write_processors
from mobile_vla_inference.policy.synthetic.weights import centred_last_layer

_DISK_MARGIN = 16 << 20  # bytes for the pickle, the zip directory and the processors
_MIN_HEADS = 4
_CENTRED_BELOW = 50_000_000  # parameters; above, centring the last layer would need the model in memory


def synthetic_settings(config: HybridConfig) -> PolicySettings:
    """Return confirmed settings for a synthetic checkpoint; narrow towers get four heads instead of width / 64."""
    widths = {name: getattr(config, name).hidden_size for name in TOWERS if getattr(config, name) is not None}
    heads = {name: _MIN_HEADS for name, width in widths.items() if width // STOCK_HEAD_DIM < _MIN_HEADS}
    return PolicySettings(attention_heads=heads, fusion_features=solve_fusion_features(config))


def make_checkpoint(
    out: Path | str,
    config: HybridConfig,
    seed: int,
    *,
    settings: PolicySettings | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PolicySettings:
    """Write a synthetic checkpoint, its settings and its processors. The same seed gives the same bytes.

    Args:
        out: the `.pth` to write; the other files are next to it (`X.pth.policy.json`, `X.processors/`).
        config: sizes of the architecture.
        seed: of the weights, 0 or more.
        settings: to write, as confirmed; None: `synthetic_settings(config)`.
        force: overwrite an existing file.
        progress: called as tensors are written.

    Returns:
        The settings written.

    Raises:
        CheckpointError: the file exists, its folder doesn't, the disk is too full, or the features
            of the fusion layer are ambiguous.
    """
    out = Path(out)
    settings = synthetic_settings(config) if settings is None else settings
    shapes = tensor_shapes(config)
    _check_target(out, _tensor_bytes(shapes), force)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        write_processors(work / "processors", config)
        replaced = {}
        if sum(map(math.prod, shapes.values())) < _CENTRED_BELOW:
            replaced = centred_last_layer(config, settings, seed, work / "processors")
        write_archive(work / "checkpoint", ArchiveContents(config, shapes, seed, replaced), progress)
        processors = out.with_suffix(".processors")
        if processors.exists():
            shutil.rmtree(processors)
        (work / "processors").rename(processors)
        (work / "checkpoint").replace(out)
        save_settings(out, settings)
    finally:
        remove_folder(work)
    return settings


def _tensor_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the bytes of all tensors in the file: the model's, and Adam's three for each trained one."""
    trained = trained_shapes(shapes).values()
    return 4 * (sum(map(math.prod, shapes.values())) + sum(2 * math.prod(shape) + 1 for shape in trained))


def _check_target(out: Path, tensor_bytes: int, force: bool) -> None:
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent} is not a folder, expected one to write {out.name} to; make it first")
    if out.is_dir():
        raise CheckpointError(f"{out} is a folder, expected the name of a file to write; choose another")
    if out.exists() and not force:
        raise CheckpointError(f"{out} already exists, expected a new file; choose another name or give --force")
    free = shutil.disk_usage(out.parent).free
    needed = tensor_bytes + _DISK_MARGIN
    if free < needed:
        raise CheckpointError(
            f"{out.parent} has {free / 1e9:.1f} GB free, expected at least {needed / 1e9:.1f} GB for this checkpoint; "
            f"free some or choose another disk"
        )
