"""Run a conversion over an existing folder many times, and end each run at another step. Run this as a program.

    python crash_points.py FIRST.pth SECOND.pth OUT_DIR SIGNAL EXCHANGE

Steps are the audit events of the interpreter (open, rename, remove, ...). Every run is a fork that sends
itself SIGNAL (a name) at its step. Then the folder must be complete, and the conversion of either checkpoint. Prints
the count of each as JSON. EXCHANGE is 0 to try a file system that can't swap folders in one step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch

from mobile_vla_inference.policy.convert import convert
from mobile_vla_inference.policy.storage.checksums import verify_folder
from mobile_vla_inference.policy.storage.conversion import folder_swap

_FILE_EVENTS = ("open", "os.", "shutil.", "ctypes.dlsym")
_DENSE_STEPS = 26  # the last ones: publishing, and removing the old folder
_SPARSE_EVERY = 5


def main() -> None:
    """Try the steps and print the counts."""
    first, second, out = (Path(argument) for argument in sys.argv[1:4])
    number = getattr(signal, sys.argv[4])
    if sys.argv[5] == "0":
        folder_swap._exchange = lambda new, old: False
    torch.ones(1)
    convert(first, out)
    sources = {_source(out): "first"}
    steps = _run_fork(second, out, None, number)
    sources[_source(out)] = "second"
    outcomes: Counter[str] = Counter()
    for step in range(1, steps + 1):
        if step < steps - _DENSE_STEPS and step % _SPARSE_EVERY:
            continue
        if sources[_source(out)] == "second":
            convert(first, out, force=True)  # cleans up, too
            assert _siblings(out) == [], _siblings(out)
        _run_fork(second, out, step, number)
        if number == signal.SIGINT:
            assert _siblings(out) == [], (step, _siblings(out))
        if not out.exists():
            assert sys.argv[5] == "0", step
            outcomes["restored"] += 1
            with folder_swap.StagedFolder(out):  # the next run
                assert sources[_source(out)] == "first", step
        found = verify_folder(out)
        assert found.passed, (step, found)
        outcomes[sources[_source(out)]] += 1
    print(json.dumps(outcomes))


def _run_fork(source: Path, out: Path, last_step: int | None, number: int) -> int:
    """Convert in a fork that ends itself at a step; return the steps of one that doesn't."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        steps = 0

        def count(event: str, _: tuple) -> None:
            nonlocal steps
            if event.startswith(_FILE_EVENTS) and event != "os.kill":
                steps += 1
                if steps == last_step:
                    os.kill(os.getpid(), number)

        sys.addaudithook(count)
        try:
            convert(source, out, force=True)
        except KeyboardInterrupt:
            os._exit(130)
        os.write(writing, str(steps).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        steps = int(pipe.read() or 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 130, -number), code
    return steps


def _source(out: Path) -> str:
    return json.loads((out / "config.json").read_text())["source"]["sha256"]


def _siblings(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]


if __name__ == "__main__":
    main()
