"""A checkpoint described: what `mobile_vla inspect --json` writes, and the memory that the policy needs. No torch."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.checkpoint import Checkpoint
from mobile_vla_inference.policy.storage.checkpoint_files import find_processors, processor_folders
from mobile_vla_inference.policy.storage.config import HybridConfig, TextTower, VisionTower
from mobile_vla_inference.policy.storage.layout import is_block_matrix, parameter_counts
from mobile_vla_inference.policy.storage.memory_budget import LOAD_MARGIN_BYTES, available_bytes
from mobile_vla_inference.policy.storage.number_types import ITEM_BYTES
from mobile_vla_inference.policy.storage.settings_file import edited_since_listed
from mobile_vla_inference.units import MIB

#: Anonymous memory of a process that has imported torch and transformers, measured on x86-64 with torch 2.13.
_LIBRARIES_BYTES = 260 * MIB

_VAL_MAE_UNIT = "normalized"  # training divided commands by 2.0: the error in command units is twice as large


def describe(checkpoint: Checkpoint, processors: Path | None = None) -> dict[str, Any]:
    """Return a description, JSON-ready: sizes, parameters, metadata, dead weight, settings, warnings, memory needs.

    Args:
        checkpoint: an opened one.
        processors: its processor folder; None: the one that is found by its name.
    """
    index, config, settings = checkpoint.index, checkpoint.config, checkpoint.settings
    counts = parameter_counts(index.shapes)
    sizes = _sizes(config)
    widths = config.feature_widths
    if "clip_text" in widths and settings.clip_text_feature == "pooled":
        widths["clip_text"] = config.clip_text.hidden_size
    return {
        "path": str(checkpoint.path),
        "checkpoint_id": checkpoint.fingerprint,
        "format": index.format,
        "wrapper": index.wrapper,
        "prefix": index.prefix,
        "variant": config.variant,
        "parameters": sum(counts.values()),
        "parts": {name: {"parameters": count, "sizes": sizes.get(name, "")} for name, count in counts.items()},
        "config": config.to_json(),
        "dtype": _main_dtype(checkpoint),
        "file_size_bytes": index.file_size,
        "epoch": index.metadata.get("epoch"),
        "val_mae": index.metadata.get("val_mae"),
        "val_mae_unit": _VAL_MAE_UNIT,
        "args": index.metadata.get("args"),
        "skipped": list(index.skipped),
        "dead_weight": {name: {"bytes": size} for name, size in index.dead.items()},
        "fusion": {
            "input": config.cell.input_size if config.fusion_in is None else config.fusion_in,
            "features": [{"name": name, "width": widths[name]} for name in checkpoint.fusion_features],
            "assumed": "fusion_features" in settings.assumed,
        },
        "settings": {
            "file": None if checkpoint.settings_file is None else str(checkpoint.settings_file),
            "note": checkpoint.settings_note,
            "values": settings.to_json(),
            "edited": edited_since_listed(checkpoint.path),
        },
        "processors": _processors(checkpoint, processors),
        "assumed": list(settings.assumed),
        "warnings": list(checkpoint.warnings),
        "needs": memory_needs(checkpoint),
        "available_mib": round(available_bytes() / MIB, 1),
    }


def memory_needs(checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    """Return the MiB that loading and running take, by data type (`fp32`, `fp16`, `int8`), batch 1.

    run = libraries + weights + a margin for buffers and activations; load = run + the largest tensor, of which a
    second copy exists while it is cast. A file that has the type already is mapped instead of copied, but every step
    reads all of it, so its weights count, too. int8 is as convert writes it: one byte for each value of a block's
    matrix and a 32-bit scale for each row; all other tensors stay in 16 bits.
    """
    shapes = checkpoint.index.shapes
    sizes_by_type = {
        "fp32": [4 * math.prod(shape) for shape in shapes.values()],
        "fp16": [2 * math.prod(shape) for shape in shapes.values()],
        "int8": [_int8_bytes(name, shape) for name, shape in shapes.items()],
    }
    needs = {}
    for name, sizes in sizes_by_type.items():
        run_bytes = _LIBRARIES_BYTES + sum(sizes) + LOAD_MARGIN_BYTES
        needs[name] = {
            "load_mib": round((run_bytes + max(sizes)) / MIB, 1),
            "run_mib": round(run_bytes / MIB, 1),
        }
    return needs


def _int8_bytes(name: str, shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    return count + 4 * shape[0] if is_block_matrix(name) else 2 * count


def _processors(checkpoint: Checkpoint, folder: Path | None) -> dict[str, str | None]:
    """Return the processor folder that will be used, or what is missing."""
    try:
        found = find_processors(checkpoint.path, folder)
        processor_folders(found, checkpoint.config)
    except CheckpointError as error:
        return {"folder": None, "missing": str(error)}
    return {"folder": str(found), "missing": None}


def _main_dtype(checkpoint: Checkpoint) -> str:
    """Return the data type of most of the weights' bytes."""
    sizes: Counter[str] = Counter()
    for entry in checkpoint.index.tensors.values():
        sizes[entry.dtype] += math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
    return sizes.most_common(1)[0][0]


def _sizes(config: HybridConfig) -> dict[str, str]:
    """Return a line about the sizes of each part."""
    cell = config.cell
    head = ", ".join(
        f"{layer.index}: " + (f"{layer.in_features}-{layer.out_features}" if layer.kind == "linear" else "LayerNorm")
        for layer in config.head
    )
    lines = {
        "kosmos_model.image_to_text_projection": f"{config.latent_query_num} latents",
        "feature_fusion": f"{config.fusion_in} to {config.fusion_out}",
        "rnn": f"{cell.kind.upper()}, {cell.num_layers} layers, {cell.input_size} to {cell.hidden_size}",
        "actions": head,
    }
    for part, tower in (("kosmos_model", config.kosmos_text), ("clip_model", config.clip_text)):
        if tower is not None:
            positions = f", {tower.max_positions} positions" if tower.max_positions else ""
            lines[f"{part}.text_model"] = f"{_tower(tower)}, vocabulary {tower.vocab_size}{positions}"
    for part, tower in (("kosmos_model", config.kosmos_vision), ("clip_model", config.clip_vision)):
        if tower is not None:
            lines[f"{part}.vision_model"] = f"{_tower(tower)}, {tower.image_size} px in patches of {tower.patch_size}"
    if config.clip_text is not None:
        lines["clip_model.text_projection"] = f"{config.clip_text.hidden_size} to {config.clip_projection_dim}"
    if config.clip_vision is not None:
        lines["clip_model.visual_projection"] = f"{config.clip_vision.hidden_size} to {config.clip_projection_dim}"
    return lines


def _tower(tower: TextTower | VisionTower) -> str:
    return f"{tower.num_layers} layers, width {tower.hidden_size}, ffn {tower.intermediate_size}"
