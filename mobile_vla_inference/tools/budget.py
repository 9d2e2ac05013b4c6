"""`mobile_vla budget`: whether a policy fits a board whose CPU and GPU share one memory, item by item.

The policy's need is computed from its tensors. The other items are options with defaults, each marked as measured or
assumed; docs/memory.md shows how to measure them on a board.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mobile_vla_inference.policy.description import memory_needs
from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
from mobile_vla_inference.tools.arguments import add_json_argument, check_output, non_negative_number
from mobile_vla_inference.tools.results import write_json
from mobile_vla_inference.units import MIB

#: A board has this much of its nominal memory: firmware and the kernel reserve the rest.
_MIB_PER_BOARD_GB = 1e9 / MIB

#: What needs memory besides the policy: MiB, where the figure is from, and what the item is.
_SURROUNDINGS = {
    "node": (100.0, "measured on x86-64", "the node's own process"),
    "cuda_context": (700.0, "assumed", "the CUDA context"),
    "ros_and_camera": (300.0, "assumed", "the other ROS nodes and the camera driver"),
    "system": (1200.0, "assumed", "the operating system"),
    "desktop": (1000.0, "assumed; 0 without one", "the desktop"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="CK", help="checkpoint file or folder")
    parser.add_argument(
        "--board-gb", type=non_negative_number, default=16.0, metavar="GB", help="memory of the board, GB"
    )
    for name, (default_mib, source, item) in _SURROUNDINGS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}-mib",
            type=non_negative_number,
            default=default_mib,
            metavar="MIB",
            help=f"{item}, MiB (default: {default_mib:g}, {source})",
        )
    add_json_argument(parser, "budget")


def run(args: argparse.Namespace) -> int:
    """Print the budget; return 0 if a data type fits, 1 if none does."""
    check_output(args.json, args.checkpoint)
    surroundings = {name: getattr(args, f"{name}_mib") for name in _SURROUNDINGS}
    budget = make_budget(memory_needs(open_checkpoint(args.checkpoint)), surroundings, args.board_gb)
    write_json(args.json, budget)
    _print(budget)
    return 0 if any(column["fits"] for column in budget["dtypes"].values()) else 1


def make_budget(needs: dict[str, dict[str, float]], surroundings: dict[str, float], board_gb: float) -> dict[str, Any]:
    """Return the memory of each data type while the policy loads, its peak, against the board's memory, in MiB."""
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
    for heading in ("", *dtypes, "source"):
        table.add_column(heading, justify="left" if heading in ("", "source") else "right")
    loads = (f"{column['policy_load_mib']:,.0f}" for column in dtypes.values())
    table.add_row("policy and its libraries", *loads, "its tensors; libraries measured on x86-64")
    for name, value_mib in budget["surroundings_mib"].items():
        default_mib, source, item = _SURROUNDINGS[name]
        values = [f"{value_mib:,.0f}"] * len(dtypes)
        table.add_row(item.removeprefix("the "), *values, source if value_mib == default_mib else "given")
    table.add_row("remaining", *(f"{column['left_mib']:,.0f}" for column in dtypes.values()), "")
    table.add_row("", *("fits" if column["fits"] else "too large" for column in dtypes.values()), "")
    Console().print(table)
