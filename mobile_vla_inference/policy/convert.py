"""Convert a checkpoint to a folder that loads at once: `mobile_vla convert`.

The folder holds only what inference uses: the weights in sharded safetensors of the requested data type, aligned so
that they can be mapped; config.json (the architecture, and the source of the weights); policy.json; the processors; and
sha256sums.txt with the hashes of all files.

Tensors stream from the mapped source to the disk a few megabytes at a time. A thread that reads just ahead computes the
source's hash, so that a disk delivers each byte once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.engines.quantize import quantize, row_scales
from mobile_vla_inference.policy.finite_weights import is_finite, require_finite
from mobile_vla_inference.policy.mapped_tensors import MappedTensor, map_file
from mobile_vla_inference.policy.storage.checkpoint import Checkpoint, open_checkpoint
from mobile_vla_inference.policy.storage.checkpoint_files import (
    PROCESSORS_FOLDER,
    ProcessorFolders,
    find_processors,
    processor_folders,
)
from mobile_vla_inference.policy.storage.checksums import CHECKSUMS_FILE, sha256_of, write_checksums
from mobile_vla_inference.policy.storage.config import TOWERS, HybridConfig, with_layers
from mobile_vla_inference.policy.storage.conversion.folder_swap import StagedFolder
from mobile_vla_inference.policy.storage.conversion.plan import Output, plan_shards
from mobile_vla_inference.policy.storage.conversion.record import CONFIG_FILE, conversion_record, is_converted
from mobile_vla_inference.policy.storage.conversion.safetensors_writer import write_safetensors
from mobile_vla_inference.policy.storage.conversion.source_digest import SourceDigest
from mobile_vla_inference.policy.storage.formats.shards import SHARD_INDEX_FILE
from mobile_vla_inference.policy.storage.settings_file import save_settings

#: Called with the bytes of the source done so far and in all.
Progress = Callable[[int, int], None]

_CHUNK_VALUES = 2 << 20
_DISK_MARGIN_BYTES = 16 << 20  # headers, JSON and the file system
_WEIGHT_SUFFIXES = (".bin", ".safetensors", ".pth", ".pt", ".h5", ".msgpack", ".onnx", ".ckpt", ".gguf", ".ot")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        folder: the new folder.
        weight_bytes: bytes of all tensors in it.
        shards: number of safetensors files.
        warnings: sentences for its user.
    """

    folder: Path
    weight_bytes: int
    shards: int
    warnings: tuple[str, ...]


def convert(
    source: Checkpoint | Path | str,
    out: Path | str,
    *,
    dtype: str = "float16",
    keep_layers: Mapping[str, int] | None = None,
    processors: Path | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint as a converted folder. `out` is complete, or it is not changed.

    Args:
        source: the checkpoint, opened or its path; its files must not change during the call.
        out: the new folder; with `force` it may be a converted folder, which is replaced as a whole.
        dtype: data type of the weights, one of conversion.plan.DTYPES.
        keep_layers: number of first layers to keep, by towers of TOWERS. Nobody trained the result.
        processors: folder with the two tokenizer folders; None: next to the checkpoint.
        force: replace an existing converted folder.
        progress: called as the source is read.

    Raises:
        CheckpointError: the source can't be used or has weights that are not finite, `out` exists or can't be
            written, or the disk is too full.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"{checkpoint.path} is {checkpoint.quantization} already, expected weights of a floating type; "
            f"convert the checkpoint that it was made from"
        )
    # Symbolic links are followed: a link to the folder stays, and points to the new content.
    target = Path(out).resolve()
    _check_target(target, checkpoint.path.resolve(), force)
    job = _Job(checkpoint, dtype, _shortened_towers(checkpoint, keep_layers or {}))
    folders, warnings = _find_processors(checkpoint, processors)
    _check_space(target.parent, job.weight_bytes, folders)
    try:
        with StagedFolder(target) as staged:
            job.write(staged.path, target, folders, progress)
            staged.publish()
    except OSError as error:
        raise CheckpointError(_disk_sentence(error, target, job.weight_bytes)) from error
    warnings += tuple(open_checkpoint(target).warnings)
    return Conversion(target, job.weight_bytes, len(job.shards), warnings)


# --- checks ---


def _check_target(target: Path, source: Path, force: bool) -> None:
    """Raise CheckpointError unless `target` does not exist, or is a converted folder that may be replaced."""
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is not a folder, expected one to write {target.name} to; make it first")
    if target == source or target in source.parents:
        raise CheckpointError(f"{target} holds the source itself, expected another folder; choose one")
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not _is_converted(target)):
        raise CheckpointError(
            f"{target} is not a converted folder, expected one or a new name, because nothing else is replaced; "
            f"choose another name"
        )
    if not force and any(target.iterdir()):
        raise CheckpointError(f"{target} already exists, expected a new folder; choose another name or give --force")


def _is_converted(folder: Path) -> bool:
    try:
        return is_converted(folder / CONFIG_FILE)
    except CheckpointError:
        return (folder / CHECKSUMS_FILE).exists() and (folder / SHARD_INDEX_FILE).exists()


def _shortened_towers(checkpoint: Checkpoint, keep_layers: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return `keep_layers` of config.json: the towers that are shortened now, or were by an earlier conversion."""
    layers = dict(checkpoint.kept_layers)
    for name, kept in keep_layers.items():
        tower = getattr(checkpoint.config, name, None) if name in TOWERS else None
        if tower is None:
            present = [known for known in TOWERS if getattr(checkpoint.config, known) is not None]
            raise CheckpointError(f"--keep-layers names {name!r}, expected one of {', '.join(present)}; correct it")
        if not 1 <= kept <= tower.num_layers:
            raise CheckpointError(
                f"--keep-layers keeps {kept} layers of {name}, expected 1 to {tower.num_layers}; correct it"
            )
        before = layers.get(name, {"of": tower.num_layers})["of"]
        if kept < before:
            layers[name] = {"kept": kept, "of": before}
    return layers


def _find_processors(
    checkpoint: Checkpoint, processors: Path | str | None
) -> tuple[ProcessorFolders | None, tuple[str, ...]]:
    """Return the tokenizer folders and no warning, or None and a warning; raise if the named folder lacks them."""
    try:
        return processor_folders(find_processors(checkpoint.path, processors), checkpoint.config), ()
    except CheckpointError as error:
        if processors is not None:
            raise
        return None, (f"the converted folder has no processors, which a policy needs to read instructions: {error}",)


def _check_space(parent: Path, weight_bytes: int, folders: ProcessorFolders | None) -> None:
    status = os.statvfs(parent)
    free = status.f_bavail * status.f_frsize
    copied = [path for _, path in _processor_files(folders)]
    needed = weight_bytes + sum(path.stat().st_size for path in copied) + _DISK_MARGIN_BYTES
    if free < needed:
        raise CheckpointError(
            f"{parent} has {free / 1e9:.2f} GB free, expected at least {needed / 1e9:.2f} GB for the converted folder; "
            f"free some or choose another disk"
        )


def _disk_sentence(error: OSError, target: Path, weight_bytes: int) -> str:
    if error.errno in _DISK_FULL:
        status = os.statvfs(target.parent)
        return (
            f"the disk of {target.parent} became full while converting, expected {weight_bytes / 1e9:.2f} GB for "
            f"{target.name} ({status.f_bavail * status.f_frsize / 1e9:.2f} GB are free now); nothing was "
            f"written: free some or choose another disk"
        )
    return (
        f"{target} can't be written ({error.strerror or error}), expected a folder that this account may write to on a "
        f"sound disk; nothing was written: check both"
    )


# --- what is written ---


@dataclass
class _Job:
    """One conversion: the plan, and writing it."""

    checkpoint: Checkpoint
    dtype: str
    kept_layers: dict[str, dict[str, int]]
    config: HybridConfig = field(init=False)
    shards: list[list[Output]] = field(init=False)

    def __post_init__(self) -> None:
        kept = {name: layers["kept"] for name, layers in self.kept_layers.items()}
        self.config = with_layers(self.checkpoint.config, kept)
        self.shards = plan_shards(self.checkpoint.index, self.config, self.dtype)

    @property
    def weight_bytes(self) -> int:
        return sum(output.spec.nbytes for shard in self.shards for output in shard)

    def write(self, folder: Path, target: Path, processors: ProcessorFolders | None, progress: Progress | None) -> None:
        """Write every file of the converted folder that will be `target`."""
        hashes: dict[str, str] = {}
        with SourceDigest(self.checkpoint, progress) as digest:
            names = [f"model-{i:05d}-of-{len(self.shards):05d}.safetensors" for i in range(1, len(self.shards) + 1)]
            for name, shard in zip(names, self.shards):
                specs = [output.spec for output in shard]
                hashes[name] = write_safetensors(folder / name, specs, self._chunks(shard, digest))
            source_sha256 = digest.finish()
        weight_map = {output.spec.name: name for name, shard in zip(names, self.shards) for output in shard}
        index = {"metadata": {"total_size": self.weight_bytes}, "weight_map": weight_map}
        _write_json(folder / SHARD_INDEX_FILE, index)
        record = conversion_record(
            self.checkpoint.index,
            self.config,
            dtype=self.dtype,
            quantized_tensors=sum(output.is_scale for shard in self.shards for output in shard),
            keep_layers=self.kept_layers,
            source_sha256=source_sha256,
        )
        _write_json(folder / CONFIG_FILE, record)
        for name, path in _processor_files(processors):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        others = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        hashes |= {name: sha256_of(folder / name) for name in others if name not in hashes}
        write_checksums(folder, hashes)
        if self.checkpoint.settings_file is not None:
            save_settings(folder, self.checkpoint.settings, name=target.name)

    def _chunks(self, shard: list[Output], digest: SourceDigest) -> Iterator[memoryview]:
        """Yield the values of a shard's tensors as bytes.

        Raises:
            CheckpointError: a weight is not finite, in the source or in the new type.
        """
        mappings = {file: map_file(file) for file in {output.entry.file for output in shard}}
        for output in shard:
            mapped = MappedTensor(mappings[output.entry.file], output.entry)
            for start, rows in _row_blocks(mapped.tensor):
                digest.advance(output.entry, start + rows.shape[0])
                values = self._converted(output, rows)
                if values.is_floating_point() and not is_finite(values):
                    require_finite(self.checkpoint, output.source_name, mapped.tensor)
                    cast = mapped.tensor.to(getattr(torch, output.spec.dtype))
                    require_finite(self.checkpoint, output.source_name, cast)
                yield memoryview(values.reshape(-1).view(torch.uint8).numpy())
            mapped.drop_pages()

    def _converted(self, output: Output, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of a tensor of the source in the form of the new file."""
        if output.is_scale:
            return row_scales(rows)
        if output.spec.dtype == "int8":
            return quantize(rows, row_scales(rows))
        return rows.to(getattr(torch, output.spec.dtype)).contiguous()


def _row_blocks(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield a tensor in blocks of rows (of values, if it has one dimension), each with the index of its first."""
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    count = max(_CHUNK_VALUES // max(math.prod(tensor.shape[1:]), 1), 1)
    for start in range(0, tensor.shape[0], count):
        yield start, tensor[start : start + count]


def _processor_files(folders: ProcessorFolders | None) -> list[tuple[str, Path]]:
    """Return the files of the tokenizer folders to copy: name in the new folder, and path.

    A downloaded model folder can hold weights too; they are not copied.
    """
    files = []
    for folder in () if folders is None else (folders.kosmos, folders.clip):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file() and path.suffix not in _WEIGHT_SUFFIXES and not path.name.startswith("."):
                files.append((f"{PROCESSORS_FOLDER}/{folder.name}/{path.name}", path))
    return files


def _write_json(path: Path, data: object) -> None:
    write_text_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
