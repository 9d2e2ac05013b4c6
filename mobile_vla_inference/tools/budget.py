"""`mobile_vla budget`: whether a policy fits a board whose CPU and GPU share one memory, item by item.

What the policy needs comes from its tensors; what surrounds it is a figure that can be replaced by one's own, and each
is marked as measured or assumed. docs/memory.md says how to measure them on a board.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
from mobile_vla_inference.tools.arguments import check_output
from mobile_vla_inference.tools.inspect import memory_needs
from mobile_vla_inference.units import MIB

HELP = "tell whether a policy fits a board of 8 or 16 GB, item by item"

#: A board of so many GB has a little less: firmware and the kernel keep some.
_MIB_PER_BOARD_GB = 1e9 / MIB

#: Option, MiB and where the figure is from; the policy itself is added.
_SURROUNDINGS = {
    "node": (100.0, "measured on x86-64"),
    "cuda_context": (700.0, "assumed"),
    "ros_and_camera": (300.0, "assumed"),
    "system": (1200.0, "assumed"),
    "desktop": (1000.0, "assumed; 0 without one"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="CK", help="checkpoint file or folder")
    parser.add_argument("--board-gb", type=float, default=16.0, metavar="GB", help="memory of the board (default 16)")
    for name, (default_mib, source) in _SURROUNDINGS.items():
        option = f"--{name.replace('_', '-')}-mib"
        parser.add_argument(
            option, type=float, default=default_mib, metavar="MIB", help=f"default {default_mib:g} ({source})"
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the budget to this file")


def run(args: argparse.Namespace) -> int:
    """Print the budget; return 0 where some number type fits, 1 where none does."""
    check_output(args.json, args.checkpoint)
    surroundings = {name: getattr(args, f"{name}_mib") for name in _SURROUNDINGS}
    for name, value in {"board-gb": args.board_gb, **surroundings}.items():
        if not 0.0 <= value < 1e6:
            raise MobileVlaError(f"--{name.replace('_', '-')} is {value:g}, expected 0 or more; correct it")
    budget = make_budget(memory_needs(open_checkpoint(args.checkpoint)), surroundings, args.board_gb)
    _print(budget)
    if args.json is not None:
        write_text_atomically(args.json, json.dumps(budget, indent=2) + "\n")
    return 0 if any(column["fits"] for column in budget["dtypes"].values()) else 1


def make_budget(needs: dict[str, dict[str, float]], surroundings: dict[str, float], board_gb: float) -> dict[str, Any]:
    """Return what each number type takes while it loads, when it takes the most, against the board's memory, in MiB."""
    board_mib = board_gb * _MIB_PER_BOARD_GB
    around_mib = sum(surroundings.values())
    dtypes = {}
    for dtype, need in needs.items():
        total_mib = need["load_mib"] + around_mib
        dtypes[dtype] = {
            "policy_load_mib": need["load_mib"],
            "policy_run_mib": need["run_mib"],
            "total_mib": round(total_mib, 1),
            "left_mib": round(board_mib - total_mib, 1),
            "fits": total_mib <= board_mib,
        }
    return {"board_mib": round(board_mib, 1), "surroundings_mib": surroundings, "dtypes": dtypes}


def _print(budget: dict[str, Any]) -> None:
    dtypes = budget["dtypes"]
    table = Table(title=f"MiB of a board with {budget['board_mib']:,.0f} MiB, while the policy loads")
    for heading in ("", *dtypes, "from"):
        table.add_column(heading, justify="left" if heading in ("", "from") else "right")
    loads = (f"{column['policy_load_mib']:,.0f}" for column in dtypes.values())
    table.add_row("policy and its libraries", *loads, "its tensors; libraries measured on x86-64")
    for name, value_mib in budget["surroundings_mib"].items():
        default_mib, source = _SURROUNDINGS[name]
        values = [f"{value_mib:,.0f}"] * len(dtypes)
        table.add_row(name.replace("_", " "), *values, source if value_mib == default_mib else "given")
    table.add_row("left", *(f"{column['left_mib']:,.0f}" for column in dtypes.values()), "")
    table.add_row("", *("fits" if column["fits"] else "too large" for column in dtypes.values()), "")
    Console().print(table)
