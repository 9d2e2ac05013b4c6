"""`mobile_vla bench step`: one policy step, from the frame to the action: its time, its floor, its exactness.

The floor is the time to read the weights of a step once, at the bandwidth of a copy that is measured in the same run.
`--vs stock` also runs the stock modules of transformers, in the same type on the same frames; `--parity` compares the
actions with those of the fp32 modules.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mobile_vla_inference.policy.storage.config import SIZES, standard_config
from mobile_vla_inference.tools.arguments import add_loading_arguments, count
from mobile_vla_inference.tools.bench.machine import machine_line
from mobile_vla_inference.tools.progress import progress

HELP = "one policy step: time in total and by part, the time that memory bandwidth allows at best, memory, accuracy"
INPUTS = ("checkpoint", "frames", "reference", "processors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="CK", help="checkpoint file or converted folder")
    source.add_argument("--size", choices=tuple(SIZES), help="make a synthetic hybrid of this size for the run")
    add_loading_arguments(parser)
    parser.add_argument("--steps", type=count, default=200, metavar="N", help="number of timed steps (default: 200)")
    parser.add_argument("--vs", choices=("stock",), help="also time the unmodified modules of transformers")
    parser.add_argument(
        "--frames", type=Path, metavar="DIR", help="folder of images, in numeric order (default: synthetic images)"
    )
    parser.add_argument(
        "--parity",
        type=count,
        metavar="N",
        help="compare N steps with the fp32 modules, without a reset of the LSTM state",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="CK",
        help="checkpoint for the transformers and fp32 modules (default: the same)",
    )
    parser.add_argument(
        "--soak", type=count, metavar="N", help="run N steps with resets; check for drift and memory growth"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the report; raise MobileVlaError if an option, the checkpoint or the device can't be used."""
    from mobile_vla_inference.tools.bench.step_measure import measure_step  # torch: seconds

    with ExitStack() as cleanup:
        checkpoint = args.checkpoint
        if checkpoint is None:
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mobile_vla_bench.")))
            checkpoint = _make(folder / f"{args.size}.pth", args.size)
        return measure_step(args, checkpoint)


def passed(report: dict[str, Any]) -> bool:
    """Whether the actions are those of the fp32 modules and do not drift, as far as this was measured."""
    return all(report[name]["passed"] for name in ("parity", "soak") if name in report)


def _make(path: Path, size: str) -> Path:
    from mobile_vla_inference.policy.synthetic.checkpoint import make_checkpoint

    with progress("making the checkpoint", "B") as show:
        make_checkpoint(path, standard_config(size, "hybrid"), seed=0, progress=show)
    return path


# ---- printing --------------------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any]) -> None:
    """Print the figures."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(machine_line(report["machine"]))
    quantization = f", {report['quantization']}" if report["quantization"] else ""
    console.print(
        f"{report['checkpoint']}: {report['parameters']:,} parameters, {report['dtype']}{quantization}, engine "
        f"{report['engine']} on {report['device_name']}, torch {report['torch']}, {report['tokens']} tokens, frames "
        f"{report['frames']}"
    )
    if report["engine_fallback"]:
        console.print(f"not the preferred engine: {report['engine_fallback']}")
    table = Table(Column("frame to action, ms", no_wrap=True), "p50", "p95", "p99", "max", "ratio")
    _add_times(table, "this engine", report["step_ms"], None)
    if "stock" in report:
        stock = report["stock"]
        _add_times(table, "this engine, in turns with the stock modules", stock["own"], 1.0)
        _add_times(table, f"stock modules {stock['dtype']}, CLIP's text cached", stock["cached"], stock["ratio_cached"])
        _add_times(table, f"stock modules {stock['dtype']}", stock["uncached"], stock["ratio_uncached"])
    for name, part_ms in report.get("part_ms", {}).items():
        table.add_row(f"  {name} alone", f"{part_ms:.3f}")
    for name, change_ms in report["instruction_ms"].items():
        table.add_row(f"  instruction of {name}", f"{change_ms:.1f}")
    console.print(table)
    for line in _lines(report):
        console.print(line)


def _add_times(table: Any, name: str, times: dict[str, float], ratio: float | None) -> None:
    cells = [f"{times[key]:.3f}" for key in ("p50", "p95", "p99", "max")]
    table.add_row(name, *cells, "" if ratio is None else f"{ratio:.2f}")


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{report['gflop']:.1f} GFLOP a step: {report['gflop_per_s']:.0f} GFLOP/s; measured copy "
        f"{report['bandwidth_gbps']:.0f} GB/s"
    ]
    if report["floor_ms"] is not None:
        lines.append(
            f"weights read {report['weight_gb']:.3f} GB: floor {report['floor_ms']:.3f} ms, "
            f"p50 is {report['ratio_to_floor']:.2f} times the floor"
        )
    lines.append("memory, MiB: " + ", ".join(f"{name} {mib:.0f}" for name, mib in report["memory_mib"].items()))
    if "parity" in report:
        lines.append(_parity_line(report["parity"]))
    if "soak" in report:
        soaked = report["soak"]
        lines.append(
            f"{soaked['steps']} steps in {soaked['episodes']} episodes: largest change of an action "
            f"{soaked['largest_change']:.1e}, memory grew by {soaked['memory_growth_mib']:.1f} MiB: "
            f"{'passed' if soaked['passed'] else 'FAILED'}"
        )
    best = report["projection"]["best"]
    lines.append(
        f"projection, not a measurement: the limits of {report['projection']['of']} allow at best "
        + "; ".join(
            f"{name} {value['step_ms']:.0f} ms ({value['rate_hz']:.0f} Hz, by {value['limited_by']})"
            for name, value in best.items()
        )
    )
    return lines


def _parity_line(parity: dict[str, Any]) -> str:
    def percent(errors: list[float]) -> str:
        return ", ".join(f"{100 * error:.2f}" for error in errors)

    return (
        f"against the fp32 modules over {parity['frames']} frames, % of each axis' standard deviation: largest error "
        f"{percent(parity['largest_error'])} (limit {100 * parity['error_limit']:g}), rms "
        f"{percent(parity['rms_error'])}, frames shuffled {percent(parity['shuffled_error'])}; least cosine of the "
        f"features {parity['least_feature_cosine']:.6f}: {'passed' if parity['passed'] else 'FAILED'}"
    )
