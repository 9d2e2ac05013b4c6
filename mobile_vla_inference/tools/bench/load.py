"""`mobile_vla bench load`: how long a checkpoint takes to load and to act for the first time, and how much memory.

Each way of loading runs in its own process, whose memory is sampled from here every few milliseconds. So anonymous
memory and file-backed memory, which the kernel can reclaim, are distinguished for each stage.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.harness.processes import die_with, last_error
from mobile_vla_inference.policy.storage.checkpoint import Checkpoint, open_checkpoint
from mobile_vla_inference.policy_facts import ENGINES, FLOAT_DTYPES
from mobile_vla_inference.tools.bench import load_child
from mobile_vla_inference.tools.bench.machine import describe_machine, machine_line, read_memory_mib
from mobile_vla_inference.tools.bench.memory_cgroup import MemoryCgroup, memory_cgroup
from mobile_vla_inference.tools.bench.page_cache import cached_bytes, drop_from_cache
from mobile_vla_inference.units import MIB

HELP = "time and memory of loading a checkpoint, until its first action"
INPUTS = ("checkpoint",)

_SAMPLE_PERIOD_S = 0.005
#: A file counts as cold if less of it than this is still cached (by readahead of other readers).
_COLD_FRACTION = 0.01


@dataclass(frozen=True)
class Sample:
    """Resident memory of a process at one time, MiB; the time is on the steady clock."""

    time_s: float
    anonymous_mib: float
    file_mib: float


@dataclass(frozen=True)
class LoadFigures:
    """What one way of loading cost. Memory is that of the whole process, imports included; None: not reached.

    Attributes:
        outcome: `lived`, `refused` (by the loader), `oom_killed` or `failed`.
        message: why it did not live; empty if it did.
        import_s: from the start of the process until the libraries were imported.
        load_s: from there until the weights were ready for use.
        first_action_s: from there until the first action.
        start_to_action_s: from the start of the process until the first action.
        load_cpu_s: processor time of the load, over all threads; a busy machine hardly changes it.
        megabytes_per_s: the tensors' bytes in the file, in millions, by `load_s`.
        import_anonymous_mib: anonymous memory before the load.
        load_anonymous_mib: largest anonymous memory until the end of the load.
        load_file_mib: largest file-backed memory until the end of the load.
        anonymous_mib: largest anonymous memory until the end.
        file_mib: largest file-backed memory until the end.
        resident_mib: largest resident memory until the end, by the kernel's own count (VmHWM).
        gpu_mib: largest memory allocated on the GPU.
    """

    outcome: str
    message: str
    import_s: float | None = None
    load_s: float | None = None
    first_action_s: float | None = None
    start_to_action_s: float | None = None
    load_cpu_s: float | None = None
    megabytes_per_s: float | None = None
    import_anonymous_mib: float | None = None
    load_anonymous_mib: float | None = None
    load_file_mib: float | None = None
    anonymous_mib: float | None = None
    file_mib: float | None = None
    resident_mib: float | None = None
    gpu_mib: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="CK", help="a .pth, a safetensors file or a converted folder")
    parser.add_argument(
        "--dtype", choices=FLOAT_DTYPES, default="float16", help="data type of the weights (default: float16)"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="how a step is computed (default: auto; for 16 bits on a CPU: packed, which also repacks the weights)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of the weights (default: cpu)")
    parser.add_argument(
        "--naive",
        action="store_true",
        help="also measure plain PyTorch: torch.load, build the model, load_state_dict, cast",
    )
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
    parser.add_argument(
        "--memory-limit-mib",
        type=_positive,
        metavar="N",
        help="load in a memory cgroup with a limit of N MiB (page cache included), from a cold cache",
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each way of loading and return the report; raise MobileVlaError if the checkpoint can't be used."""
    checkpoint = open_checkpoint(args.checkpoint)
    if args.naive and checkpoint.index.format != "zip":
        raise MobileVlaError(
            f"{args.checkpoint} is not a .pth file, expected one for --naive, which measures torch.load; "
            "leave --naive out"
        )
    report = {"checkpoint": str(args.checkpoint), "dtype": args.dtype, "device": args.device, "engine": args.engine}
    report |= {"file_mib": checkpoint.index.file_size / MIB, "weights_mib": _weights_mib(checkpoint, args.dtype)}
    report |= {"memory_limit_mib": args.memory_limit_mib, "machine": describe_machine(), "ways": {}}
    for way in ("ours", "naive") if args.naive else ("ours",):
        cached_mib = _prepare_cache(checkpoint, args.cold or args.memory_limit_mib is not None)
        figures = measure_load(checkpoint, way, args.device, args.dtype, args.engine, args.memory_limit_mib)
        report["ways"][way] = {"cached_before_mib": cached_mib, **asdict(figures)}
    report["ratios"] = _ratios(report["ways"])
    return report


def passed(report: dict[str, Any]) -> bool:
    """Whether our own way of loading reached its end."""
    return report["ways"]["ours"]["outcome"] == "lived"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a size, expected MiB, 1 or more")
    return value


def _weights_mib(checkpoint: Checkpoint, dtype: str) -> float:
    """Return the size of the weights in a type; weights that are quantised in the file stay quantised."""
    width = 4 if dtype == "float32" else 2
    sizes = (
        entry.nbytes if name in checkpoint.index.scales else math.prod(entry.shape) * width
        for name, entry in checkpoint.index.tensors.items()
    )
    return sum(sizes) / MIB


def _prepare_cache(checkpoint: Checkpoint, cold: bool) -> float:
    """Drop the checkpoint's files from the page cache if `cold`; return the MiB that are cached then."""
    files = sorted({entry.file for entry in checkpoint.index.stored.values()})
    if cold:
        for file in files:
            drop_from_cache(file)
    cached = sum(cached_bytes(file) for file in files)
    total = sum(file.stat().st_size for file in files)
    if cold and cached > _COLD_FRACTION * total:
        print(
            f"mobile_vla: warning: {cached / MIB:.0f} of {total / MIB:.0f} MiB stay in the page cache (another "
            f"process maps them, or the file system is in memory), so this is not a cold load",
            file=sys.stderr,
        )
    return cached / MIB


# ---- one way of loading ----------------------------------------------------------------------------------------------


def measure_load(
    checkpoint: Checkpoint, way: str, device: str, dtype: str, engine: str, memory_limit_mib: int | None = None
) -> LoadFigures:
    """Load a checkpoint in a process of its own and return the figures.

    Args:
        checkpoint: the checkpoint.
        way: `ours` (VlaPolicy.load and a first action) or `naive` (load only).
        device: `cpu` or `cuda`.
        dtype: type of the weights.
        engine: of our own way, one of ENGINES.
        memory_limit_mib: limit of the memory cgroup that the process runs in; None: no group.

    Raises:
        MobileVlaError: the cgroup can't be made.
    """
    request = {"checkpoint": str(checkpoint.path), "way": way, "device": device, "dtype": dtype, "engine": engine}
    with ExitStack() as cleanup:
        group = None
        if memory_limit_mib is not None:
            group = cleanup.enter_context(memory_cgroup(memory_limit_mib * MIB))
        log = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mobile_vla_bench."))) / "log"
        show = cleanup.enter_context(_live_line(way))
        started_s = time.monotonic()
        child = cleanup.enter_context(_child(request, group, log))
        sampler = _Sampler(child.pid)
        answers = []
        for line in child.stdout:
            answers.append(json.loads(line))
            show(answers[-1].get("progress", ""))
        status = child.wait()
        samples, resident_mib = sampler.finish()
        figures = stage_figures(checkpoint, started_s, answers, samples, resident_mib)
        outcome, message = _outcome(status, answers, 0 if group is None else group.oom_kills, log)
    return LoadFigures(outcome, message, **figures)


@contextmanager
def _child(request: dict[str, Any], group: MemoryCgroup | None, log: Path) -> Iterator[subprocess.Popen]:
    """Run the process that loads, in a group if there is one; kill it at the end if it still runs."""
    parent_pid = os.getpid()

    def prepare() -> None:
        die_with(parent_pid)
        if group is not None:
            group.join()

    command = [sys.executable, "-m", load_child.__name__, json.dumps(request)]
    with log.open("wb") as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            preexec_fn=prepare,
        )
    try:
        yield child
    finally:
        child.kill()
        child.stdout.close()
        child.wait()


class _Sampler:
    """Read a process's memory every few milliseconds, from a thread, until it ends."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._samples: list[Sample] = []
        self._resident_mib = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory_sampler", daemon=True)
        self._thread.start()

    def finish(self) -> tuple[list[Sample], float]:
        """Stop; return the samples and the largest resident memory in MiB."""
        self._ended.set()
        self._thread.join()
        return self._samples, self._resident_mib

    def _run(self) -> None:
        while not self._ended.wait(_SAMPLE_PERIOD_S):
            memory = read_memory_mib(self._pid)
            if memory:
                self._samples.append(Sample(time.monotonic(), memory["anonymous"], memory["file"]))
                self._resident_mib = max(self._resident_mib, memory["peak"])


def stage_figures(
    checkpoint: Checkpoint, started_s: float, answers: list[dict[str, Any]], samples: list[Sample], resident_mib: float
) -> dict[str, float]:
    """Return the figures of the stages that were reached, by the fields of LoadFigures."""
    for answer in answers:
        memory = answer["memory"]
        samples.append(Sample(answer["time_s"], memory["anonymous"], memory["file"]))
        resident_mib = max(resident_mib, memory["peak"])
    stages = {answer["stage"]: answer for answer in answers if "stage" in answer}
    ends_s = {stage: answer["time_s"] for stage, answer in stages.items()}
    figures = {
        "anonymous_mib": max((sample.anonymous_mib for sample in samples), default=None),
        "file_mib": max((sample.file_mib for sample in samples), default=None),
        "resident_mib": resident_mib,
    }
    if "imported" in ends_s:
        figures["import_s"] = ends_s["imported"] - started_s
        figures["import_anonymous_mib"] = max(s.anonymous_mib for s in samples if s.time_s <= ends_s["imported"])
    if "loaded" in ends_s:
        nbytes = sum(entry.nbytes for entry in checkpoint.index.stored.values())
        figures["load_s"] = ends_s["loaded"] - ends_s["imported"]
        figures["load_cpu_s"] = stages["loaded"]["cpu_s"] - stages["imported"]["cpu_s"]
        figures["megabytes_per_s"] = nbytes / 1e6 / figures["load_s"]
        loading = [sample for sample in samples if sample.time_s <= ends_s["loaded"]]
        figures["load_anonymous_mib"] = max(sample.anonymous_mib for sample in loading)
        figures["load_file_mib"] = max(sample.file_mib for sample in loading)
        figures["gpu_mib"] = max(answer.get("gpu_mib", 0.0) for answer in answers)
    if "acted" in ends_s:
        figures["first_action_s"] = ends_s["acted"] - ends_s["loaded"]
        figures["start_to_action_s"] = ends_s["acted"] - started_s
    return figures


def _outcome(status: int, answers: list[dict[str, Any]], oom_kills: int, log: Path) -> tuple[str, str]:
    """Return how a process ended, and a sentence if it did not live."""
    if status == 0:
        return "lived", ""
    if oom_kills > 0:
        return "oom_killed", "the kernel killed it because the memory cgroup was full"
    refusals = [answer["refused"] for answer in answers if "refused" in answer]
    if refusals:
        return "refused", refusals[0]
    ending = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return "failed", f"it {ending}: {last_error(log)}"


# ---- what is shown ---------------------------------------------------------------------------------------------------


@contextmanager
def _live_line(way: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what the process is doing."""
    from rich.console import Console

    with Console(stderr=True).status(f"{way}: starting") as status:
        yield lambda text: status.update(f"{way}: {text}") if text else None


def _ratios(ways: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return how many times more the naive way takes, of the figures that both have."""
    if "naive" not in ways:
        return {}
    names = ("load_s", "load_cpu_s", "load_anonymous_mib")
    pairs = {name: (ways["naive"][name], ways["ours"][name]) for name in names}
    return {name: naive / ours for name, (naive, ours) in pairs.items() if naive is not None and ours}


_ROWS = {
    "import s": ("import_s", ".2f"),
    "load s": ("load_s", ".2f"),
    "load s of processor time": ("load_cpu_s", ".2f"),
    "first action s": ("first_action_s", ".2f"),
    "start to first action s": ("start_to_action_s", ".2f"),
    "load MB/s": ("megabytes_per_s", ".0f"),
    "anonymous MiB, imported": ("import_anonymous_mib", ".0f"),
    "anonymous MiB, load": ("load_anonymous_mib", ".0f"),
    "anonymous MiB, to the end": ("anonymous_mib", ".0f"),
    "file-backed MiB, load": ("load_file_mib", ".0f"),
    "file-backed MiB, to the end": ("file_mib", ".0f"),
    "resident MiB, to the end": ("resident_mib", ".0f"),
    "GPU MiB": ("gpu_mib", ".0f"),
    "cached before, MiB": ("cached_before_mib", ".0f"),
    "outcome": ("outcome", ""),
}


def print_report(report: dict[str, Any]) -> None:
    """Print the figures of each way."""
    from rich.console import Console
    from rich.table import Table

    ways = report["ways"]
    limit = "" if report["memory_limit_mib"] is None else f", memory cgroup of {report['memory_limit_mib']} MiB"
    table = Table("memory: peaks of the process", *ways, *(["ratio"] if report["ratios"] else []))
    for title, (name, spec) in _ROWS.items():
        cells = ["-" if figures[name] is None else format(figures[name], spec) for figures in ways.values()]
        ratio = report["ratios"].get(name)
        table.add_row(title, *cells, *(["" if ratio is None else f"{ratio:.1f}"] if report["ratios"] else []))
    console = Console(highlight=False, soft_wrap=True)
    console.print(machine_line(report["machine"]))
    console.print(
        f"{report['checkpoint']}: {report['file_mib']:.0f} MiB, {report['weights_mib']:.0f} MiB of weights in "
        f"{report['dtype']} on {report['device']}, engine {report['engine']}{limit}"
    )
    console.print(table)
    for way, figures in ways.items():
        if figures["message"]:
            console.print(f"{way}: {figures['message']}")
