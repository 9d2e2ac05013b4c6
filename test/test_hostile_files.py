"""Every file from outside is read or refused in one sentence, in 10 s and 1 GB, whatever is in it.

A small part of the files is read here; MOBILE_VLA_HOSTILE=all reads all of them (a few minutes).
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import hostile_reader
import pytest
from hostile_files import REFUSED, Case, cases
from hostile_reader import TIME_LIMIT_S, Maker

#: Of the files, every so many-th is read unless all are asked for.
_SAMPLE = 1 if os.environ.get("MOBILE_VLA_HOSTILE") == "all" else 9

_START_LIMIT_S = 120.0

#: Rows of a table that follows a sentence begin so.
_TABLE_ROW = "  "


class Reader:
    """A child process that reads one file after the other; started again where one of them ended it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen | None = None

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Run `mobile_vla` with arguments; return its status, what it wrote to standard error, and the seconds."""
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, hostile_reader.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert self._answer(_START_LIMIT_S) == b"ready\n"
        self._child.stdin.write(json.dumps(list(arguments)).encode() + b"\n")
        self._child.stdin.flush()
        line = self._answer(TIME_LIMIT_S)
        if line is None:
            self.close()
            return {"status": f"hangs for more than {TIME_LIMIT_S:g} s", "said": ""}
        if not line:
            status = self._child.wait()
            self.close()
            return {"status": f"ends the process ({status})", "said": ""}
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _answer(self, limit_s: float) -> bytes | None:
        ready, _, _ = select.select([self._child.stdout], [], [], limit_s)
        return self._child.stdout.readline() if ready else None


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def maker(tmp_path_factory) -> Maker:
    return Maker(tmp_path_factory.mktemp("hostile"))


def test_there_are_two_hundred_of_them():
    names = [case.id for case in cases()]
    assert len(names) >= 200
    assert len(set(names)) == len(names)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", cases()[::_SAMPLE], ids=lambda case: case.id)
def test_a_hostile_file_gets_a_sentence(case: Case, reader: Reader, maker: Maker):
    found = reader.read(maker.make(case))
    assert found["status"] in case.allowed, found
    assert "Traceback" not in found["said"]
    if found["status"] == REFUSED:
        first, *others = found["said"].strip().splitlines()
        assert first.startswith("mobile_vla: error: "), found
        assert all(line.startswith(_TABLE_ROW) for line in others), found
