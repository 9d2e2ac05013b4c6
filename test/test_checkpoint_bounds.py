"""Checkpoints that are made to take time or memory: each is refused in one sentence within 10 s and 1 GB."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mobile_vla_inference.policy.storage.formats.shards import SHARD_INDEX_FILE

_SECONDS = 10
_BYTES = 1 << 30

_PROGRAM = """
import resource, sys
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]),) * 2)
try:
    open_checkpoint(sys.argv[1])
except CheckpointError as error:
    print(str(error).splitlines()[0])
"""

#: A pickle's start with a storage of 4 values in the memo: `rebuild` and its first argument are pushed by _TENSOR.
_STORAGE = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00"
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQq\x0100"
)


def _tensor(shape: bytes, strides: bytes, offset: bytes = b"K\x00") -> bytes:
    return b"h\x00(h\x01" + offset + shape + strides + b"\x89NtR"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _pth(path: Path, description: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", description)
        for name, data in {"0": bytes(16), **records}.items():
            archive.writestr(f"a/data/{name}", data)
    return path


def _described(body: bytes) -> Callable[[Path], Path]:
    """Return the maker of a file with a pickle: the memo has `rebuild` at 0 and the storage at 1."""
    # The two that _STORAGE leaves on the stack stay under the value that is read.
    return lambda folder: _pth(folder / "a.pth", _STORAGE.removesuffix(b"00") + body + b".")


def _many_records(folder: Path) -> Path:
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    count = 600_000
    directory = entry * count
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(directory), 4, 0)
    (folder / "a.pth").write_bytes(b"PK\x03\x04" + directory + end)
    return folder / "a.pth"


def _overlapping(folder: Path) -> Path:
    path = _pth(folder / "a.pth", _STORAGE + b"}.", **{"1": bytes(64)})
    data = bytearray(path.read_bytes())
    entries = [place for place in range(len(data)) if data[place : place + 4] == b"PK\x01\x02"]
    data[entries[2] + 42 : entries[2] + 46] = data[entries[1] + 42 : entries[1] + 46]
    path.write_bytes(data)
    return path


def _beyond_the_file(folder: Path) -> Path:
    path = _pth(folder / "a.pth", _STORAGE + b"}.")
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<2L", 1 << 31, 1 << 31)
    path.write_bytes(data)
    return path


def _safetensors(folder: Path, header: bytes, length: int | None = None, size: int = 0) -> Path:
    path = folder / "a.safetensors"
    with path.open("wb") as file:
        file.write((length or len(header)).to_bytes(8, "little") + header)
        file.truncate(max(size, file.tell()))
    return path


def _f32(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def _index(folder: Path, content: bytes) -> Path:
    (folder / SHARD_INDEX_FILE).write_bytes(content)
    return folder


def _index_is(make: Callable[[Path], None]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        make(folder / SHARD_INDEX_FILE)
        return folder

    return build


def _fifo_for_a_shard(folder: Path) -> Path:
    os.mkfifo(folder / "a.safetensors")
    return _index(folder, json.dumps({"weight_map": {"w": "a.safetensors"}}).encode())


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "a.pth")
    return folder / "a.pth"


_HUGE = b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85"
_DOUBLED = b"K\x01" + b"".join(b"q" + bytes((10 + i,)) + b"h" + bytes((10 + i,)) + b"\x86" for i in range(100))
_COLLIDING = b"".join(b"\x8a\x18" + (k * (2**61 - 1)).to_bytes(24, "little") + b"N" for k in range(200_000))

#: By name: what makes the file or folder in an empty folder, and a word of its sentence.
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a directory of 600,000 records": (_many_records, "directory"),
    "overlapping records": (_overlapping, "overlaps|is not where"),
    "a record beyond the file": (_beyond_the_file, "damaged"),
    "10^12 values from one": (
        _described(b"}" + _text("w") + _tensor(_HUGE, b"K\x00\x85") + b"s"),
        "repeats",
    ),
    "10^12 values": (
        _described(b"}" + _text("w") + _tensor(_HUGE, b"K\x01\x85") + b"s"),
        "reaches value 999999999999 of 4",
    ),
    "a memo of 4 billion": (_described(b"}r\xfe\xff\xff\xff"), "no tensors"),
    "400,000 lists in each other": (_described(b"]" * 400_000 + b"a" * 399_999), "holds a list"),
    "half a million tuples in each other": (
        _described(b"}" + _text("m") + b"N" + b"\x85" * 500_000 + b"s"),
        "no tensors",
    ),
    "2^100 values by repetition": (_described(b"}" + _text("m") + _DOUBLED + b"s"), "no tensors"),
    "2^100 values as a key": (_described(b"}" + _DOUBLED + b"Ns"), "no tensors"),
    "a set of 2^100 values": (
        _described(b"}" + _text("m") + b"cbuiltins\nset\n(]" + _DOUBLED + b"atRs"),
        "no tensors",
    ),
    "keys that collide": (_described(b"}(" + _COLLIDING + b"u"), "no tensors"),
    "a dict that holds itself": (_described(b"}q\x05" + _text("m") + b"h\x05s"), "no tensors"),
    "900,000 dicts": (_described(b"](" + b"}" * 900_000 + b"e"), "holds a list"),
    "a pickle without end": (_described(b"N" * 60_000_000), "more than 1000000 values"),
    "a text of 60 MB": (_described(b"}" + _text("m" * 60_000_000) + b"Ns"), "no tensors"),
    "200,000 tensors": (
        _described(
            _tensor(b"K\x04\x85", b"K\x01\x85")
            + b"q\x02}("
            + b"".join(_text(f"kosmos_model.{i}") + b"h\x02" for i in range(200_000))
            + b"u"
        ),
        "at most 20000",
    ),
    "200 x 200 x 200 items of metadata, 1,000 times": (
        _described(
            b"]("
            + b"K\x01" * 200
            + b"eq\x02]("
            + b"h\x02" * 200
            + b"eq\x03]("
            + b"h\x03" * 200
            + b"eq\x04}("
            + b"".join(_text(f"m{i}") + b"h\x04" for i in range(1000))
            + _text("w")
            + _tensor(b"K\x04\x85", b"K\x01\x85")
            + b"u"
        ),
        "fits no architecture variant",
    ),
    "a header of 10^9 bytes": (lambda f: _safetensors(f, b"{", 10**9, 10**9 + 100), "header of 1000000000 bytes"),
    "a header of 10^18 bytes": (lambda f: _safetensors(f, b"{", 10**18), "cut off"),
    "JSON 2 million levels deep": (lambda f: _safetensors(f, b'{"a":' + b"[" * 2_000_000), "deep"),
    "a header of 4 MB of lists": (lambda f: _safetensors(f, b'{"a":[' + b"[]," * 1_300_000 + b"1]}"), "damaged"),
    "overlapping offsets": (
        lambda f: _safetensors(f, json.dumps({"a": _f32(0, 8), "b": _f32(4, 12)}).encode(), size=500),
        "but the tensor before it ends",
    ),
    "a tensor that is there twice": (
        lambda f: _safetensors(f, b'{"a":%b,"a":%b}' % ((json.dumps(_f32(0, 8)).encode(),) * 2)),
        "twice",
    ),
    "an endless index": (_index_is(lambda path: path.symlink_to("/dev/zero")), "a device"),
    "a pipe for the index": (_index_is(os.mkfifo), "a named pipe"),
    "an index of 1 GB": (
        _index_is(lambda path: path.touch() or os.truncate(path, 1 << 30)),
        "larger",
    ),
    "an index of 100,000 shards": (
        lambda f: _index(f, json.dumps({"weight_map": {f"w{i}": f"{i}.safetensors" for i in range(100_000)}}).encode()),
        "at most 10000",
    ),
    "a pipe for a shard": (_fifo_for_a_shard, "lacks"),
    "a pipe": (_fifo, "not a regular file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_gives_one_sentence_within_its_bounds(tmp_path: Path, name: str) -> None:
    make, word = HOSTILE[name]
    path = make(tmp_path)
    command = [sys.executable, "-c", _PROGRAM, str(path), str(_BYTES)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, capture_output=True, text=True, timeout=6 * _SECONDS, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor: the machine may be busy. What waits for ever runs into the timeout.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("\n") == 1, result.stdout
    assert any(part in result.stdout for part in word.split("|")), result.stdout
    assert "expected" in result.stdout and len(result.stdout) < 1500, result.stdout
    assert seconds < _SECONDS, f"{seconds:.1f} s"
