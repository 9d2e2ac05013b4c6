"""Write hostile files and read them.

`Maker(folder).make(case)` writes a file and returns the command line of `mobile_vla` that reads it. Run as a program,
this reads command lines from standard input and runs each in this process, which may allocate MEMORY_BYTES of address
space in addition to the imports.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from hdf5_files import write_episode
from hostile_files import Case, png

#: Limits of reading one file.
MEMORY_BYTES = 1 << 30
TIME_LIMIT_S = 10.0


class Maker:
    """Writes cases into a folder of their own, with the other files that reading needs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self, case: Case) -> list[str]:
        """Write a case's file; return the arguments of `mobile_vla` that read it."""
        folder = self._folder / f"{case.kind}.{sum(1 for _ in self._folder.glob(f'{case.kind}.*'))}"
        folder.mkdir()
        return [str(argument) for argument in getattr(self, f"_{case.kind}")(folder, case.write)]

    @cached_property
    def _checkpoint(self) -> Path:
        from mobile_vla_inference.policy.storage.config import standard_config
        from mobile_vla_inference.policy.synthetic.checkpoint import make_checkpoint

        path = self._folder / "good" / "tiny.pth"
        path.parent.mkdir(exist_ok=True)
        make_checkpoint(path, standard_config("tiny", "hybrid"), seed=0)
        return path

    @cached_property
    def _converted(self) -> Path:
        from mobile_vla_inference.policy.convert import convert

        target = self._checkpoint.parent / "tiny-fp16"
        convert(self._checkpoint, target, dtype="float16")
        return target

    @cached_property
    def _episode(self) -> Path:
        return write_episode(self._checkpoint.parent / "good.h5")

    def _converted_without(self, folder: Path, name: str) -> Path:
        copy = folder / "model"
        shutil.copytree(self._converted, copy)
        (copy / name).unlink()
        return copy

    def _hdf5(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        write(folder / "e.h5")
        return ["episodes-to-bag", folder / "e.h5", folder / "out"]

    def _instructions(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        write(folder / "instructions.json")
        return ["episodes-to-bag", self._episode, folder / "out", "--instructions", folder / "instructions.json"]

    def _settings(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        os.link(self._checkpoint, folder / "tiny.pth")
        write(folder / "policy.json")
        return ["inspect", folder / "tiny.pth"]

    def _config(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        copy = self._converted_without(folder, "config.json")
        write(copy / "config.json")
        return ["inspect", copy]

    def _index(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        copy = self._converted_without(folder, "model.safetensors.index.json")
        write(copy / "model.safetensors.index.json")
        return ["inspect", copy]

    def _list(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        copy = self._converted_without(folder, "sha256sums.txt")
        write(copy / "sha256sums.txt")
        return ["verify", copy]

    def _tokenizer(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        from mobile_vla_inference.policy.storage.checkpoint_files import find_processors
        from mobile_vla_inference.policy.synthetic.processors import KOSMOS_FOLDER

        shutil.copytree(find_processors(self._checkpoint), folder / "processors")
        file = folder / "processors" / KOSMOS_FOLDER / "special_tokens_map.json"
        file.unlink()
        write(file)
        frames = folder / "frames"
        frames.mkdir()
        (frames / "0.png").write_bytes(png(8, 8, bytes(25 * 8)))
        arguments = ["--checkpoint", self._checkpoint, "--frames", frames, "--processors", folder / "processors"]
        return ["infer", *arguments, "--instruction", "go", "--device", "cpu", "--force"]

    def _safetensors(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        write(folder / "model.safetensors")
        return ["inspect", folder / "model.safetensors"]

    def _pth(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        write(folder / "policy.pth")
        return ["inspect", folder / "policy.pth"]

    def _db3(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        write(folder / "bag.db3")
        return ["bag-to-episodes", folder / "bag.db3", folder / "out"]

    def _mcap(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        write(folder / "bag.mcap")
        return ["bag-to-episodes", folder / "bag.mcap", folder / "out"]

    def _image(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        (folder / "images").mkdir()
        write(folder / "images" / "0.png")
        (folder / "actions.csv").write_text("stamp_s,image,steering,throttle\n0.0,images/0.png,0,0\n")
        return ["make-bag", folder, folder / "out"]

    def _table(self, folder: Path, write: Callable[[Path], Any]) -> list[Any]:
        write(folder / "actions.csv")
        return ["make-bag", folder, folder / "out"]


def _read_all() -> None:
    """Run the command lines on standard input, one JSON list a line; answer each with a line of JSON."""
    from mobile_vla_inference.tools import cli

    for module in (
        "policy.vla_policy",
        "policy.preprocess",
        "policy.engines.choice",
        "episodes.find",
        "bags.reader",
        "bags.writer",
    ):
        __import__(f"mobile_vla_inference.{module}")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    print("ready", file=answers)
    for line in sys.stdin:
        said, started_s = io.StringIO(), time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                status: Any = cli.main(json.loads(line))
            except SystemExit as ending:
                status = ending.code
            except BaseException as error:
                status = f"Traceback: {type(error).__name__}: {error}"
        answer = {"status": status, "said": said.getvalue(), "seconds": time.monotonic() - started_s}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    _read_all()
