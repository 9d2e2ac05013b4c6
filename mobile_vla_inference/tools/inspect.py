"""`mobile_vla inspect`: what a checkpoint is, what is assumed about it, and what it needs. No torch.

Of a `.pth` and a converted folder the index and 64 MiB are read, of other files all bytes, once (fingerprint.py).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.checkpoint import LOAD_MARGIN_BYTES, Checkpoint, available_bytes, open_checkpoint
from mobile_vla_inference.policy.storage.checkpoint_files import find_processors, processor_folders
from mobile_vla_inference.policy.storage.checksums import CHECKSUMS_FILE
from mobile_vla_inference.policy.storage.config import HybridConfig, PolicySettings, TextTower, VisionTower
from mobile_vla_inference.policy.storage.layout import is_block_matrix, parameter_counts
from mobile_vla_inference.policy.storage.number_types import ITEM_BYTES
from mobile_vla_inference.policy.storage.settings_file import confirm_command, edited_since_listed, save_settings
from mobile_vla_inference.tools.arguments import check_output
from mobile_vla_inference.units import MIB

HELP = "say what a checkpoint is, what is assumed about it, and what it needs; --confirm its settings"

#: Anonymous memory of a process that has imported torch and transformers, measured on x86-64 with torch 2.13.
_LIBRARIES_BYTES = 260 * MIB

_VAL_MAE_UNIT = "normalized"  # actions were divided by 2.0 in training: in command units it is twice that


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="FILE", help="a .pth or safetensors file, or a folder of them")
    parser.add_argument(
        "--processors", type=Path, metavar="DIR", help="processor folder to look at (default: by the checkpoint)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the description as JSON too")
    parser.add_argument(
        "--confirm",
        action="store_true",
        help="write every setting as shown, confirmed for this very checkpoint, so that the robot may move",
    )


def run(args: argparse.Namespace) -> int:
    """Print the description; return the exit status."""
    check_output(args.json, args.checkpoint, args.processors)
    checkpoint = open_checkpoint(args.checkpoint)
    description = describe(checkpoint, args.processors)
    console = Console(soft_wrap=True, highlight=False)
    _print(console, checkpoint, description)
    if args.json is not None:
        write_text_atomically(args.json, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    if args.confirm:
        _confirm(console, checkpoint)
    return 0


def describe(checkpoint: Checkpoint, processors: Path | None = None) -> dict[str, Any]:
    """Return what `--json` writes: sizes, parameters, metadata, dead weight, fusion, assumptions and memory needs.

    Args:
        checkpoint: what is described.
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


def _processors(checkpoint: Checkpoint, folder: Path | None) -> dict[str, str | None]:
    """Return the processor folder that will be used, or what is missing."""
    try:
        found = find_processors(checkpoint.path, folder)
        processor_folders(found, checkpoint.config)
    except CheckpointError as error:
        return {"folder": None, "missing": str(error)}
    return {"folder": str(found), "missing": None}


def memory_needs(checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    """Return the MiB that loading and running take, by number type (`fp32`, `fp16`, `int8`), batch 1.

    run = libraries + weights + a margin for buffers and activations; load = run + the largest tensor, which is in
    transit while it is cast. A file that has the type already is mapped instead of copied, but every step reads all
    of it, so its weights count too. int8 is as convert writes it: a byte per value of a block's matrix and a 32-bit
    scale per row; the rest stays in 16 bits.
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


def _main_dtype(checkpoint: Checkpoint) -> str:
    """Return the number type that most of the weights' bytes have."""
    sizes: Counter[str] = Counter()
    for entry in checkpoint.index.tensors.values():
        sizes[entry.dtype] += math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
    return sizes.most_common(1)[0][0]


def _print(console: Console, checkpoint: Checkpoint, description: dict[str, Any]) -> None:
    console.print(
        f"{checkpoint.path}: {description['variant']}, {description['parameters']:,} parameters, "
        f"{description['dtype']}, {description['file_size_bytes'] / 1e9:.3f} GB ({description['format']})",
        markup=False,
    )
    # Not in the table below, which would break a long path in two.
    console.print(f"checkpoint id: {description['checkpoint_id']}", markup=False)
    console.print(
        f"settings: {description['settings']['file'] or 'the defaults, no file has any'} ({_standing(description)})",
        markup=False,
    )
    missing = description["processors"]["missing"]
    console.print(f"processors: {description['processors']['folder'] or 'missing'}", markup=False)
    _print_settings(console, checkpoint)
    parts = Table(box=None)
    parts.add_column("part", no_wrap=True)
    parts.add_column("sizes, as read from the tensors")
    parts.add_column("parameters", justify="right")
    for name, part in description["parts"].items():
        parts.add_row(name, part["sizes"], f"{part['parameters']:,}")
    console.print(parts)
    facts = Table("fact", "value", box=None)
    for name, value in _facts(description):
        facts.add_row(name, escape(value))
    console.print(facts)
    needs = Table("memory", box=None)
    needs.add_column("to load", justify="right")
    needs.add_column("to run", justify="right")
    needs.add_column(f"of {description['available_mib']:,.0f} MiB available")
    for name, need in description["needs"].items():
        fits = "fits" if need["load_mib"] <= description["available_mib"] else "does not fit"
        needs.add_row(name, f"{need['load_mib']:,.0f} MiB", f"{need['run_mib']:,.0f} MiB", fits)
    console.print(needs)
    if missing is not None:
        console.print(f"warning: {missing}", markup=False)
    if description["settings"]["edited"]:
        console.print(
            f"warning: {description['settings']['file']} was changed after it was listed in {CHECKSUMS_FILE}; if "
            f"a person changed it, check the values and run {confirm_command(checkpoint.path)}; else copy it again",
            markup=False,
        )
    for warning in description["warnings"]:
        console.print(f"warning: {warning}", markup=False)
    if description["assumed"]:
        console.print(
            f"assumed, not read: {', '.join(description['assumed'])}. The robot doesn't move while a setting is "
            f"assumed; check them and run {confirm_command(checkpoint.path)}",
            markup=False,
        )


def _print_settings(console: Console, checkpoint: Checkpoint) -> None:
    """Print every setting with its value, as `--confirm` would write it, and whether somebody confirmed it."""
    shown = Table("setting", "value", "", box=None)
    for name, entry in _as_confirmed(checkpoint).to_json().items():
        value = json.dumps(entry["value"], ensure_ascii=False)
        shown.add_row(name, escape(value), "assumed" if name in checkpoint.settings.assumed else "confirmed")
    console.print(shown)


def _as_confirmed(checkpoint: Checkpoint) -> PolicySettings:
    """Return the settings with the solved features and none assumed."""
    return replace(checkpoint.settings, fusion_features=checkpoint.fusion_features, assumed=())


def _facts(description: dict[str, Any]) -> list[tuple[str, str]]:
    fusion = description["fusion"]
    features = " + ".join(f"{feature['name']} {feature['width']}" for feature in fusion["features"])
    origin = "assumed" if fusion["assumed"] else "confirmed"
    dead = ", ".join(f"{name} {part['bytes'] / 1e6:.1f} MB" for name, part in description["dead_weight"].items())
    return [
        ("epoch", _text(description["epoch"])),
        ("validation MAE", f"{_text(description['val_mae'])} ({description['val_mae_unit']} units)"),
        ("fusion input", f"{fusion['input']} = {features} ({origin})"),
        ("dead weight", f"{dead} (never loaded)"),
        *([("not read", "; ".join(description["skipped"]))] if description["skipped"] else []),
        ("wrapper, prefix", f"{_text(description['wrapper'])}, {description['prefix'] or '-'}"),
    ]


def _standing(description: dict[str, Any]) -> str:
    assumed, count = len(description["assumed"]), len(description["settings"]["values"])
    if not assumed:
        edited = description["settings"]["edited"]
        return "changed since it was confirmed" if edited else "confirmed for this checkpoint"
    return "assumed" if assumed == count else f"{assumed} of {count} assumed"


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


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _confirm(console: Console, checkpoint: Checkpoint) -> None:
    """Print every setting, with the solved features, and write them as confirmed for this checkpoint."""
    checkpoint.check_action_axes()
    settings = _as_confirmed(checkpoint)
    console.print("confirmed:")
    for name, entry in settings.to_json().items():
        was = " (was assumed)" if name in checkpoint.settings.assumed else ""
        console.print(f"  {name} = {json.dumps(entry['value'], ensure_ascii=False)}{was}", markup=False)
    path = save_settings(checkpoint.path, settings, checkpoint.fingerprint)
    console.print(f"written to {path}", markup=False)
