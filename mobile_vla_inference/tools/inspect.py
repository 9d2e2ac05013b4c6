"""`mobile_vla inspect`: show what a checkpoint is, which settings are assumed, and what it needs. No torch.

Of a `.pth` file and a converted folder, the index and 64 MiB are read; of other files, all bytes (fingerprint.py).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_vla_inference.action import AXES, AXIS_UNITS
from mobile_vla_inference.policy.description import describe
from mobile_vla_inference.policy.storage.checkpoint import Checkpoint, open_checkpoint
from mobile_vla_inference.policy.storage.checksums import CHECKSUMS_FILE
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.storage.settings_file import confirm_command, save_settings
from mobile_vla_inference.tools.arguments import add_json_argument, add_processors_argument, check_output
from mobile_vla_inference.tools.results import write_json

#: Names of the parts for people; JSON has the names of the tensors.
_PARTS = {
    "kosmos_model.text_model": "Kosmos-2 text decoder",
    "kosmos_model.vision_model": "Kosmos-2 vision tower",
    "kosmos_model.image_to_text_projection": "Kosmos-2 image resampler",
    "clip_model.text_model": "CLIP text tower",
    "clip_model.vision_model": "CLIP vision tower",
    "clip_model.text_projection": "CLIP text projection",
    "clip_model.visual_projection": "CLIP image projection",
    "clip_model.logit_scale": "CLIP logit scale",
    "feature_fusion": "feature fusion",
    "rnn": "recurrent network",
    "actions": "action head",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="CK", help="a .pth or safetensors file, or a folder of them")
    add_processors_argument(parser)
    add_json_argument(parser, "description")
    parser.add_argument(
        "--confirm",
        action="store_true",
        help="confirm every setting as shown, for this checkpoint only; a robot moves with confirmed settings only",
    )


def run(args: argparse.Namespace) -> int:
    """Print the description; return the exit status."""
    check_output(args.json, args.checkpoint, args.processors)
    checkpoint = open_checkpoint(args.checkpoint)
    description = describe(checkpoint, args.processors)
    write_json(args.json, description)
    console = Console(soft_wrap=True, highlight=False)
    _print(console, checkpoint, description)
    if args.confirm:
        _confirm(console, checkpoint)
    return 0


def _print(console: Console, checkpoint: Checkpoint, description: dict[str, Any]) -> None:
    console.print(
        f"{checkpoint.path}: {description['variant']}, {description['parameters']:,} parameters, "
        f"{description['dtype']}, {_size(description['file_size_bytes'])} ({description['format']})",
        markup=False,
    )
    # Not in the table below, which would break a long path in two.
    console.print(f"checkpoint id: {description['checkpoint_id']}", markup=False)
    console.print(
        f"settings: {description['settings']['file'] or 'defaults, because there is no settings file'} "
        f"({_standing(description)})",
        markup=False,
    )
    console.print(f"processors: {description['processors']['folder'] or 'missing'}", markup=False)
    for line in _motion(checkpoint.settings):
        console.print(line, markup=False)
    for table in (_settings(checkpoint), _parts(description), _facts(description), _needs(description)):
        console.print()
        console.print(table)
    console.print()
    for warning in _warnings(checkpoint, description):
        console.print(f"warning: {warning}", markup=False)
    if description["assumed"]:
        console.print(
            f"assumed, not read: {', '.join(description['assumed'])}. The robot doesn't move while a setting is "
            f"assumed; check them and run {confirm_command(checkpoint.path)}",
            markup=False,
        )


def _motion(settings: PolicySettings) -> list[str]:
    """Return what a wrong setting would make a robot do wrong: speeds, axes and step period, each if assumed."""
    axes = []
    for axis, scale, offset in zip(settings.action_axes, settings.action_scale, settings.action_offset):
        shift = f" {offset:+g}" if offset else ""
        axes.append(f"{axis} {scale:g}{shift} {AXIS_UNITS[AXES.index(axis)]}")
    assumed = [name for name in ("action_axes", "action_scale", "action_offset") if name in settings.assumed]
    mark = f" (assumed: {', '.join(assumed)})" if assumed else " (confirmed)"
    period = "assumed" if "step_period_s" in settings.assumed else "confirmed"
    return [
        f"an action of 1 drives: {', '.join(axes)}{mark}",
        f"step period: {settings.step_period_s:g} s ({period})",
    ]


def _settings(checkpoint: Checkpoint) -> Table:
    """Return every setting with its value, as `--confirm` would write it, and whether it is confirmed."""
    table = Table("setting", "value", "", box=None)
    for name, entry in _as_confirmed(checkpoint).to_json().items():
        value = json.dumps(entry["value"], ensure_ascii=False)
        table.add_row(name, escape(value), "assumed" if name in checkpoint.settings.assumed else "confirmed")
    return table


def _as_confirmed(checkpoint: Checkpoint) -> PolicySettings:
    """Return the settings with the features that the widths give, and none assumed."""
    return replace(checkpoint.settings, fusion_features=checkpoint.fusion_features, assumed=())


def _parts(description: dict[str, Any]) -> Table:
    table = Table(box=None)
    table.add_column("part", no_wrap=True)
    table.add_column("sizes, as read from the tensors")
    table.add_column("parameters", justify="right")
    for name, part in description["parts"].items():
        table.add_row(_PARTS.get(name, name), part["sizes"], f"{part['parameters']:,}")
    return table


def _facts(description: dict[str, Any]) -> Table:
    fusion = description["fusion"]
    features = " + ".join(f"{feature['name']} {feature['width']}" for feature in fusion["features"])
    origin = "assumed" if fusion["assumed"] else "confirmed"
    dead = {name: part for name, part in description["dead_weight"].items() if part["bytes"]}
    not_loaded = ", ".join(f"{name} {_size(part['bytes'])}" for name, part in dead.items())
    facts = {
        "epoch": _text(description["epoch"]),
        "validation MAE": f"{_text(description['val_mae'])} (normalised)",
        "fusion input": f"{fusion['input']} = {features} ({origin})",
        "not loaded": not_loaded or "-",
        **({"not read": "; ".join(description["skipped"])} if description["skipped"] else {}),
        "wrapper, prefix": f"{_text(description['wrapper'])}, {description['prefix'] or '-'}",
    }
    table = Table("fact", "value", box=None)
    for name, value in facts.items():
        table.add_row(name, escape(value))
    return table


def _needs(description: dict[str, Any]) -> Table:
    table = Table("memory", box=None)
    table.add_column("to load", justify="right")
    table.add_column("to run", justify="right")
    table.add_column(f"of {description['available_mib']:,.0f} MiB available")
    for name, need in description["needs"].items():
        fits = "fits" if need["load_mib"] <= description["available_mib"] else "does not fit"
        table.add_row(name, f"{need['load_mib']:,.0f} MiB", f"{need['run_mib']:,.0f} MiB", fits)
    return table


def _warnings(checkpoint: Checkpoint, description: dict[str, Any]) -> list[str]:
    warnings = list(description["warnings"])
    if description["settings"]["edited"]:
        warnings.insert(
            0,
            f"{description['settings']['file']} was changed after it was listed in {CHECKSUMS_FILE}; if a person "
            f"changed it, check the values and run {confirm_command(checkpoint.path)}; otherwise copy it again",
        )
    missing = description["processors"]["missing"]
    return warnings if missing is None else [missing, *warnings]


def _standing(description: dict[str, Any]) -> str:
    """Return whether the settings are confirmed."""
    assumed, count = len(description["assumed"]), len(description["settings"]["values"])
    if not assumed:
        edited = description["settings"]["edited"]
        return "changed since it was confirmed" if edited else "confirmed for this checkpoint"
    return "assumed" if assumed == count else f"{assumed} of {count} assumed"


def _size(size_bytes: int) -> str:
    """Return a size in a unit in which it has at least one digit before the point."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes} bytes"


def _text(value: Any) -> str:
    """Return a value for people: numbers are rounded, what is missing is a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _confirm(console: Console, checkpoint: Checkpoint) -> None:
    """Write every setting, with the features that the widths give, as confirmed for this checkpoint; print them."""
    checkpoint.check_action_axes()
    settings = _as_confirmed(checkpoint)
    console.print("confirmed:")
    for name, entry in settings.to_json().items():
        was = " (was assumed)" if name in checkpoint.settings.assumed else ""
        console.print(f"  {name} = {json.dumps(entry['value'], ensure_ascii=False)}{was}", markup=False)
    path = save_settings(checkpoint.path, settings, checkpoint.fingerprint)
    console.print(f"written to {path}", markup=False)
