"""Fingerprints: equal weights have the same one in every place, and other weights another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.convert import convert
from mobile_vla_inference.policy.storage import hash_cache
from mobile_vla_inference.policy.storage.checksums import CHECKSUMS_FILE
from mobile_vla_inference.policy.storage.fingerprint import FINGERPRINT, fingerprint
from mobile_vla_inference.policy.storage.formats.recognition import read_index


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """Return the file of a cache of this test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "mobile_vla" / "sha256.json"


def fingerprint_of(path: Path) -> str:
    return fingerprint(read_index(path))


def save(state: dict[str, torch.Tensor], path: Path, form: str) -> Path:
    """Save a state dict as `.pth`, as one safetensors file, or as a folder of two shards; return the path."""
    if form == "pth":
        torch.save(state, path.with_suffix(".pth"))
        return path.with_suffix(".pth")
    if form == "safetensors":
        save_file(state, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    path.mkdir()
    names = sorted(state)
    save_file({name: state[name] for name in names[::2]}, path / "a.safetensors")
    save_file({name: state[name] for name in names[1::2]}, path / "b.safetensors")
    return path


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(("pth", "safetensors", "shards")),
    sizes=st.lists(st.integers(1, 3000), min_size=2, max_size=4),
    data=st.data(),
)
def test_one_other_byte_among_the_weights_is_another_checkpoint(tmp_path_factory, form, sizes, data) -> None:
    folder = tmp_path_factory.mktemp("pair")
    state = {f"layer{i}.weight": torch.arange(size, dtype=torch.float32) for i, size in enumerate(sizes)}
    first = fingerprint_of(save(state, folder / "first", form))
    assert FINGERPRINT.fullmatch(first)
    assert fingerprint_of(save(state, folder / "again", form)) == first
    name = data.draw(st.sampled_from(sorted(state)))
    values = state[name].view(torch.uint8)
    place = data.draw(st.integers(0, len(values) - 1))
    values[place] ^= 1 << data.draw(st.integers(0, 7))
    assert fingerprint_of(save(state, folder / "flipped", form)) != first


def test_the_same_weights_under_other_names_or_in_another_shape_are_another_checkpoint(tmp_path) -> None:
    a, b = torch.ones(6), torch.zeros(6)
    states = (
        {"a": a, "b": b},
        {"a": b, "b": a},
        {"a": a, "c": b},
        {"a": a.view(2, 3), "b": b},
        {"a": a.half(), "b": b},
    )
    for form in ("pth", "safetensors"):
        found = [fingerprint_of(save(state, tmp_path / f"s{i}", form)) for i, state in enumerate(states)]
        assert len(set(found)) == len(states), form


def test_a_moved_copied_or_renamed_checkpoint_stays_the_same(tmp_path, tiny_checkpoint) -> None:
    folder = convert(tiny_checkpoint, tmp_path / "folder").folder
    shutil.copy(folder / "model-00001-of-00001.safetensors", tmp_path / "one.safetensors")
    for path, kind in ((tiny_checkpoint, "zip"), (folder, "folder"), (tmp_path / "one.safetensors", "bytes")):
        before = fingerprint_of(path)
        assert before.startswith(f"{kind}:")
        copied = tmp_path / f"renamed-{kind}{path.suffix}"
        shutil.copytree(path, copied) if path.is_dir() else shutil.copy(path, copied)
        copied.rename(tmp_path / f"again-{kind}{path.suffix}")
        assert fingerprint_of(tmp_path / f"again-{kind}{path.suffix}") == before


def test_a_file_without_checksums_has_the_hash_that_sha256sum_prints(tmp_path) -> None:
    path = save({"a": torch.ones(3)}, tmp_path / "a", "safetensors")
    assert fingerprint_of(path) == f"bytes:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_shards_copied_over_without_their_list_are_another_checkpoint(tmp_path, tiny_checkpoint) -> None:
    folder = convert(tiny_checkpoint, tmp_path / "folder").folder
    before, listed = fingerprint_of(folder), (folder / CHECKSUMS_FILE).read_bytes()
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    name = "actions.mlp.8.bias"
    save_file({**tensors, name: tensors[name] + 1}, shard)  # the smallest part of another training: one bias
    assert (folder / CHECKSUMS_FILE).read_bytes() == listed
    assert fingerprint_of(folder) != before


@pytest.mark.parametrize("form", ("pth", "folder"))
def test_a_byte_changed_in_place_is_another_checkpoint(tmp_path, tiny_checkpoint, form) -> None:
    """The file's own checksums or its list don't change."""
    path = tmp_path / "tiny.pth"
    shutil.copy(tiny_checkpoint, path)
    if form == "folder":
        path = convert(tiny_checkpoint, tmp_path / "folder").folder
    index = read_index(path)
    before = fingerprint(index)
    for name in sorted(index.stored)[::9]:
        entry = index.stored[name]
        place = entry.offset + entry.nbytes * 3 // 4
        with entry.file.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            assert fingerprint_of(path) != before, name
            file.seek(place)
            file.write(byte)
    assert fingerprint_of(path) == before


def test_no_more_than_some_blocks_of_a_large_checkpoint_are_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mobile_vla_inference.policy.storage.fingerprint._BLOCKS_BYTES", 4000)
    read, pread = [], os.pread
    state = {f"layer{i}.weight": torch.full((5000,), i / 10) for i in range(4)}
    index = read_index(save(state, tmp_path / "large", "pth"))
    monkeypatch.setattr(os, "pread", lambda handle, count, offset: read.append(count) or pread(handle, count, offset))
    before = fingerprint(index)
    assert read == [1000] * 4
    for name in state:  # another training, which also changes the checksums in the archive
        other = {**state, name: state[name] + 1}
        assert fingerprint_of(save(other, tmp_path / "other", "pth")) != before


def test_an_archive_without_checksums_is_hashed_as_a_whole(tmp_path, monkeypatch) -> None:
    path = save({"a": torch.ones(3)}, tmp_path / "a", "pth")
    infolist = zipfile.ZipFile.infolist

    def without(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        infos = infolist(archive)
        for info in infos:
            info.CRC = 0
        return infos

    index = read_index(path)
    monkeypatch.setattr(zipfile.ZipFile, "infolist", without)
    assert fingerprint(index) == f"bytes:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_list_without_one_of_the_shards_is_not_used(tmp_path, tiny_checkpoint) -> None:
    folder = convert(tiny_checkpoint, tmp_path / "folder").folder
    lines = (folder / CHECKSUMS_FILE).read_text().splitlines(keepends=True)
    (folder / CHECKSUMS_FILE).write_text("".join(line for line in lines if "safetensors\n" not in line))
    assert fingerprint_of(folder).startswith("bytes:")
    (folder / CHECKSUMS_FILE).write_text("no hash\n")
    with pytest.raises(CheckpointError, match=r"damaged in line 1"):
        fingerprint_of(folder)


# --- the cache of hashes ---


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """Return the list of files that are read for a hash."""
    read, real = [], hash_cache.sha256_of
    monkeypatch.setattr(hash_cache, "sha256_of", lambda path: read.append(path) or real(path))
    return read


def settle(path: Path) -> None:
    """Make a file old enough for the cache."""
    then_ns = time.time_ns() - 60_000_000_000
    os.utime(path, ns=(then_ns, then_ns))


@pytest.fixture
def settled(monkeypatch) -> None:
    """Let files that were just written count as settled: a status time can't be set back."""
    monkeypatch.setattr(hash_cache, "_SETTLED_NS", -1)


def test_a_large_file_is_read_once(tmp_path, hashed, settled, cache) -> None:
    path = save({"a": torch.ones(3)}, tmp_path / "a", "safetensors")
    first = fingerprint_of(path)
    assert fingerprint_of(path) == first and hashed == [path]
    assert cache.parent.stat().st_mode & 0o077 == 0


def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path, hashed, settled) -> None:
    path = save({"a": torch.ones(3)}, tmp_path / "a", "safetensors")
    settle(path)
    times = path.stat()
    first = fingerprint_of(path)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert fingerprint_of(path) != first and len(hashed) == 2


def test_a_file_that_was_just_written_is_not_kept(tmp_path, hashed, cache) -> None:
    path = save({"a": torch.ones(3)}, tmp_path / "a", "safetensors")
    fingerprint_of(path)
    fingerprint_of(path)
    assert len(hashed) == 2 and not cache.exists()


@pytest.mark.parametrize("content", (b"[", b"[]", b'{"1:2": "no hash"}', b"[" * 5000, b"\xff", b" " * (1 << 20)))
def test_a_damaged_cache_is_passed_over(tmp_path, settled, cache, content) -> None:
    path = save({"a": torch.ones(3)}, tmp_path / "a", "safetensors")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    cache.parent.mkdir()
    cache.write_bytes(content)
    assert fingerprint_of(path) == f"bytes:{expected}"
    assert expected in cache.read_text()


def test_a_cache_that_cannot_be_kept_costs_time_only(tmp_path, monkeypatch, settled) -> None:
    path = save({"a": torch.ones(3)}, tmp_path / "a", "safetensors")
    expected = f"bytes:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file, where no folder can be made
    assert fingerprint_of(path) == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert fingerprint_of(path) == expected


def test_the_cache_stays_small(tmp_path, settled, cache) -> None:
    path = tmp_path / "a"
    for number in range(203):
        path.write_bytes(bytes(number + 1))
        digest = hash_cache.cached_sha256(path)
    assert cache.stat().st_size < 64 << 10
    kept = json.loads(cache.read_text())
    assert len(kept) == 200 and digest in kept.values()
