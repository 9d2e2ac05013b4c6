"""Progress of long work: one line for each phase on stderr, on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

#: Shorter phases show no bar, seconds.
_DELAY_S = 1.0


def progress_bar(phase: str, unit: str, total: int | None = None, *, done: int = 0) -> tqdm:
    """Return a bar: a context manager with `update()`.

    Args:
        phase: what is being done.
        unit: what is counted; `B` for bytes.
        total: how many; None: unknown.
        done: how many were done before, by an interrupted run.
    """
    return tqdm(desc=phase, unit=unit, unit_scale=unit == "B", total=total, initial=done, delay=_DELAY_S, disable=None)


@contextmanager
def progress(phase: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function that shows how many are done, of how many: what most functions take as their `progress`."""
    with progress_bar(phase, unit) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the present stage in words; the line disappears at the end."""
    with tqdm(bar_format="{desc}", leave=False, disable=None) as line:
        yield line.set_description_str
