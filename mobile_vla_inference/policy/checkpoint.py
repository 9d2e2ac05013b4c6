"""Open a checkpoint (what it is, without torch) and load it (as a module, within a memory budget).

Loading maps the file and casts tensor by tensor into the place where it is used: the module is built on the meta
device, nothing is initialised, and no second copy of the weights ever exists. No pickle is run: the tensor index
already says where each tensor lies, so the optimizer, lm_head and anything else that is dead is never touched.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.outside_files import read_json
from mobile_vla_inference.policy.storage.config import HybridConfig, PolicySettings
from mobile_vla_inference.policy.storage.fingerprint import fingerprint
from mobile_vla_inference.policy.storage.hash_cache import disk_state
from mobile_vla_inference.policy.storage.layout import (
    check_trained_cell_depth,
    infer_config,
    is_block_matrix,
    is_token_embedding,
    solve_fusion_features,
)
from mobile_vla_inference.policy.storage.number_types import ITEM_BYTES
from mobile_vla_inference.policy.storage.settings_file import load_settings, settings_path
from mobile_vla_inference.policy.storage.tensor_index import SCALE_SUFFIX, TensorEntry, TensorIndex, read_index
from mobile_vla_inference.units import MIB

if TYPE_CHECKING:
    import torch

    from mobile_vla_inference.policy.architecture import HybridModel

#: Called with the bytes of the file's tensors done so far and in all.
Progress = Callable[[int, int], None]

#: Number types that weights can have in a file.
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")

#: Number types, by how their names begin, that weights can't have: nothing here computes with them as they are, and
#: what they stand for (a scale, the half of a pair) is not in the tensor.
_FOREIGN_TYPES = ("float8", "float4", "uint", "complex", "q", "bits")


#: What a converted folder is, in that folder.
CONFIG_FILE = "config.json"
MODEL_TYPE = "mobile_vla"

#: Anonymous memory that loading takes beside the weights: the module tree, buffers and allocator slack.
LOAD_MARGIN_BYTES = 128 * MIB

#: Largest config.json of a converted folder.
_MAX_CONFIG_BYTES = 4 * MIB

_READ_AHEAD_BYTES = 256 * MIB
_CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that fits the family, with what is known about it.

    Attributes:
        path: its file or folder.
        index: where its tensors lie.
        config: its sizes, read from the shapes.
        settings: those of its file (settings_file.py); all assumed where it has none that was confirmed for it.
        fingerprint: which checkpoint this is, by its content (fingerprint.py).
        settings_file: where the settings are from; None: the defaults.
        settings_note: why a file with settings doesn't count as confirmed, and what to do; None: it does.
        disk_states: what each file was like when it was opened (hash_cache.disk_state).
        conversion: content of a converted folder's config.json; None for what training wrote.
    """

    path: Path
    index: TensorIndex
    config: HybridConfig
    settings: PolicySettings
    fingerprint: str
    settings_file: Path | None = None
    settings_note: str | None = None
    disk_states: dict[Path, str] = field(default_factory=dict)
    conversion: dict[str, Any] | None = None

    @property
    def quantization(self) -> str | None:
        """`int8` where weights are quantised, else None."""
        return "int8" if self.index.scales else None

    @property
    def kept_layers(self) -> dict[str, dict[str, int]]:
        """Towers that have lost layers to `convert --keep-layers`: how many are `kept`, `of` how many."""
        return {} if self.conversion is None else self.conversion["keep_layers"]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know before trusting this policy, a sentence each."""
        shortened = tuple(
            f"{tower} has only the first {layers['kept']} of its {layers['of']} layers (convert --keep-layers); nobody "
            f"trained this policy, so evaluate it before a robot drives by it"
            for tower, layers in self.kept_layers.items()
        )
        return shortened if self.settings_note is None else (*shortened, self.settings_note)

    @property
    def fusion_features(self) -> tuple[str, ...]:
        """Names of the features that the fusion layer (or the cell, in the pure variant) reads, in order."""
        return solve_fusion_features(self.config, self.settings)

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a file was written to or replaced since it was opened."""
        for path, state in self.disk_states.items():
            if _disk_state(path) != state:
                raise CheckpointError(f"{path} was changed while it was loaded, expected it unchanged; load it again")

    def check_action_axes(self) -> None:
        """Raise CheckpointError unless the settings name an axis for each action."""
        axes = self.settings.action_axes
        if len(axes) != self.config.num_actions:
            raise CheckpointError(
                f"{self.path} has {self.config.num_actions} actions, but the setting action_axes names {len(axes)} "
                f"axes; correct {self.settings_file or settings_path(self.path)}"
            )


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint file or folder without reading its tensors, and check that it is one of the family.

    Raises:
        CheckpointError: it can't be read, is no member (with the misfit table), or its features can't be told.
    """
    path = Path(path)
    index = read_index(path)
    _check_number_types(path, index)
    config = infer_config(index.shapes, str(path))
    check_trained_cell_depth(config, index.optimizer_shapes, index.metadata.get("args"), str(path))
    _check_dtypes(path, index)
    conversion = _read_conversion(path, config)
    if conversion is not None:
        index = replace(index, metadata=conversion["training"])
    states = {file: _disk_state(file) for file in {entry.file for entry in index.stored.values()}}
    mark = fingerprint(index)
    stored = load_settings(path, mark)
    try:
        solve_fusion_features(config, stored.settings)
    except CheckpointError as error:
        whose = "" if stored.note is None else " (not confirmed for this checkpoint)"
        raise CheckpointError(f"{stored.file or settings_path(path)}{whose}: {error}") from error
    return Checkpoint(path, index, config, stored.settings, mark, stored.file, stored.note, states, conversion)


def _disk_state(path: Path) -> str:
    try:
        return disk_state(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} is not there any more ({error.strerror}), expected it unchanged; load it again"
        ) from error


def _check_number_types(path: Path, index: TensorIndex) -> None:
    """Raise CheckpointError, before the shapes are looked at, for number types that no checkpoint of the family has."""
    for name, entry in index.tensors.items():
        if entry.dtype.startswith(_FOREIGN_TYPES):
            raise CheckpointError(
                f"{path}: {name[:100]} is {entry.dtype}, expected {', '.join(WEIGHT_DTYPES)}; "
                f"save it again in one of these, with any scale multiplied in"
            )


def _check_dtypes(path: Path, index: TensorIndex) -> None:
    """Raise CheckpointError for weights that are neither of a floating type nor int8 as convert writes it."""
    for name, entry in index.tensors.items():
        if entry.dtype in WEIGHT_DTYPES:
            continue
        scale = index.scales.get(name)
        if scale is None or not is_block_matrix(name):
            raise CheckpointError(
                f"{path}: {name} is {entry.dtype}, expected {', '.join(WEIGHT_DTYPES)}; give the unquantised file"
            )
        if (scale.dtype, scale.shape) != ("float32", entry.shape[:1]):
            raise CheckpointError(
                f"{path}: {name}{SCALE_SUFFIX} is {scale.dtype} {list(scale.shape)}, expected float32 "
                f"{list(entry.shape[:1])}, a scale for each row; convert the checkpoint again"
            )


def is_converted(file: Path) -> bool:
    """Tell whether a config.json is of convert; raise CheckpointError where it can't be read."""
    content = read_json(file, "what convert wrote", _MAX_CONFIG_BYTES, error=CheckpointError)
    return isinstance(content, dict) and content.get("model_type") == MODEL_TYPE


def _read_conversion(path: Path, config: HybridConfig) -> dict[str, Any] | None:
    """Return a converted folder's config.json; None where there is none, or one of another program.

    Raises:
        CheckpointError: it is damaged, or describes another member than the tensors are.
    """
    file = path / CONFIG_FILE
    if not path.is_dir() or not os.path.lexists(file):  # a link to nothing is a lost file
        return None
    try:
        conversion = read_json(file, "what convert wrote", _MAX_CONFIG_BYTES, error=CheckpointError)
        if not isinstance(conversion, dict) or conversion.get("model_type") != MODEL_TYPE:
            return None
        described = HybridConfig.from_json(conversion["architecture"], str(file))
        layers = [layers[key] for layers in conversion["keep_layers"].values() for key in ("kept", "of")]
        if not isinstance(conversion["training"], dict) or not all(isinstance(count, int) for count in layers):
            raise ValueError("training or keep_layers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} can't be read ({type(error).__name__}: {error}), expected what convert wrote; "
            f"copy the folder again, or convert again"
        ) from error
    if described != config:
        raise CheckpointError(
            f"{file} describes another member of the family than the tensors beside it are, expected the shards of one "
            f"conversion; copy the folder again (mobile_vla verify names what differs)"
        )
    return conversion


def load_model(
    checkpoint: Checkpoint | Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    settings: PolicySettings | None = None,
    progress: Progress | None = None,
    force: bool = False,
    check_finite: bool = False,
) -> HybridModel:
    """Load a checkpoint as a module in eval mode, on a device, in a number type. The file must stay as it is meanwhile.

    Weights that are int8 in the file stay so, in modules of quantize.Int8Linear; `dtype` is for the others. A 16-bit
    file as float32 on the CPU: its matrices stay mapped too, and are widened as they are used (quantize.py).

    On the CPU, tensors that already have the type stay mapped: they are not copied, and the kernel can drop their
    pages and read them again. Otherwise peak memory is that of the new weights and one tensor.

    Args:
        checkpoint: an opened one, or its path.
        device: where the weights go.
        dtype: their type; None: as in the file.
        settings: instead of those beside the file.
        progress: called after each tensor.
        force: load even where the memory seems too small.
        check_finite: look for NaN and Inf in tensors that stay mapped too, which reads all of them (copied ones are
            always checked).

    Raises:
        CheckpointError: it can't be read or fits no member, memory is too small, or a weight is not finite.
    """
    import torch

    from mobile_vla_inference.policy.architecture import HybridModel
    from mobile_vla_inference.policy.engines.quantize import use_int8_linears, use_widening_modules

    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    device = torch.device(device)
    if not force:
        check_memory(checkpoint, device, dtype)
    with torch.device("meta"):
        model = HybridModel(checkpoint.config, settings or checkpoint.settings)
        dtype_name = None if dtype is None else _dtype_name(dtype)
        stored = checkpoint.index.stored
        use_int8_linears(model, checkpoint.index.scales)
        use_widening_modules(model, (n for n, e in stored.items() if _is_widened(n, e, device.type, dtype_name)))
    weights = {}
    done, total = 0, sum(entry.nbytes for entry in stored.values())

    def is_copied(name: str, entry: TensorEntry) -> bool:
        return not _stays_mapped(name, entry, device.type, dtype_name)

    for name, entry, mapped in _mapped_tensors(stored, is_copied):
        loaded_dtype = getattr(torch, _loaded_dtype(name, entry, device.type, dtype_name))
        weights[name] = _place(checkpoint, name, mapped, device, loaded_dtype, check_finite)
        if weights[name] is not mapped.tensor:
            mapped.drop_pages()
        done += entry.nbytes
        if progress is not None:
            progress(done, total)
    model.load_state_dict(weights, strict=True, assign=True)
    model.materialize_buffers(device)
    return model.eval().requires_grad_(False)


def copied_bytes(checkpoint: Checkpoint, device_type: str, dtype: str | None) -> tuple[int, int]:
    """Return the bytes that loading allocates for weights, and those of the largest tensor among them.

    Args:
        checkpoint: what is loaded.
        device_type: `cpu` or `cuda`.
        dtype: type of the weights by torch's name; None: as in the file.
    """
    sizes = [
        math.prod(entry.shape) * ITEM_BYTES[_loaded_dtype(name, entry, device_type, dtype)]
        for name, entry in checkpoint.index.stored.items()
        if not _stays_mapped(name, entry, device_type, dtype)
    ]
    return sum(sizes), max(sizes, default=0)


def available_bytes() -> int:
    """Return the memory that this process can still take before the kernel kills it: the machine's or its cgroup's."""
    available = psutil.virtual_memory().available
    for limit, used in _cgroup_limits():
        available = min(available, max(limit - used, 0))
    return available


def _loaded_dtype(name: str, entry: TensorEntry, device_type: str, dtype: str | None) -> str:
    """Return the type of a tensor once it is loaded: quantised weights, their scales and widened ones keep theirs."""
    is_quantized = entry.dtype == "int8" or name.endswith(f".weight{SCALE_SUFFIX}")
    is_kept = dtype is None or is_quantized or _is_widened(name, entry, device_type, dtype)
    return entry.dtype if is_kept else dtype


def _is_widened(name: str, entry: TensorEntry, device_type: str, dtype: str | None) -> bool:
    """Tell whether a weight stays in the 16 bits of the file although the arithmetic is in fp32."""
    widens = device_type == "cpu" and dtype == "float32" and entry.dtype in ("float16", "bfloat16")
    return widens and (is_block_matrix(name) or is_token_embedding(name))


def _stays_mapped(name: str, entry: TensorEntry, device_type: str, dtype: str | None) -> bool:
    is_kept = _loaded_dtype(name, entry, device_type, dtype) == entry.dtype
    return device_type == "cpu" and is_kept and entry.offset % ITEM_BYTES[entry.dtype] == 0


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- memory ---


def check_memory(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raise CheckpointError where loading would need more memory than there is."""
    import torch

    dtype_name = None if dtype is None else _dtype_name(dtype)
    weights, largest = copied_bytes(checkpoint, device.type, dtype_name)
    if device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated:
        free, _ = torch.cuda.mem_get_info(device)
        _refuse_if_short(checkpoint.path, weights + largest, free, "GPU memory")
        weights = 0  # the host only holds the tensor that is being cast
    _refuse_if_short(checkpoint.path, weights + largest + LOAD_MARGIN_BYTES, available_bytes(), "memory")


def _refuse_if_short(path: Path, need: int, available: int, what: str) -> None:
    if need > available:
        raise CheckpointError(
            f"loading {path} needs {need / MIB:.0f} MiB of {what}, but {available / MIB:.0f} MiB is available, "
            f"expected at least as much; close other programs, take a smaller dtype, or load it anyway "
            f"(--force; for vla_node the parameter force_load)"
        )


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Yield the memory limit and the use that can't be reclaimed of each cgroup around this process (v2 and v1)."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # no Linux, no cgroups
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, names = (
            (_CGROUP_ROOT / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
            if controllers
            else (_CGROUP_ROOT, ("memory.max", "memory.current", ""))
        )
        folder = root / group.lstrip("/")
        for ancestor in (folder, *folder.parents):
            if ancestor == root.parent:
                break
            limit = _read_cgroup(ancestor, *names)
            if limit is not None:
                yield limit


def _read_cgroup(folder: Path, limit_file: str, usage_file: str, prefix: str) -> tuple[int, int] | None:
    try:
        limit = (folder / limit_file).read_text().strip()
        usage = int((folder / usage_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None  # a container that sees its own group at the root, or a group without the controller
    if limit == "max":
        return None
    file_pages = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return int(limit), usage - file_pages


# --- mapped tensors ---


class MappedTensor:
    """A tensor whose values are pages of the file."""

    def __init__(self, mapping: mmap.mmap, entry: TensorEntry) -> None:
        import torch

        self._mapping = mapping
        self._entry = entry
        dtype = getattr(torch, entry.dtype)
        strides = entry.strides
        count = math.prod(entry.shape)
        if strides is not None:
            count = 1 + sum((length - 1) * stride for length, stride in zip(entry.shape, strides))
        flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=entry.offset)
        self.tensor = flat.view(entry.shape) if strides is None else flat.as_strided(entry.shape, strides)

    def drop_pages(self) -> None:
        """Give the pages back to the kernel's cache: their values have been copied."""
        _advise(self._mapping, self._entry, mmap.MADV_DONTNEED)


def _mapped_tensors(
    stored: dict[str, TensorEntry], is_copied: Callable[[str, TensorEntry], bool]
) -> Iterator[tuple[str, TensorEntry, MappedTensor]]:
    """Yield each tensor, mapped, in the order of the file; the kernel reads ahead of those that will be copied."""
    mappings = {file: map_file(file) for file in {entry.file for entry in stored.values()}}
    ordered = sorted(stored.items(), key=lambda item: (item[1].file, item[1].offset))
    upcoming, announced_bytes = 0, 0
    for position, (name, entry) in enumerate(ordered):
        while upcoming < len(ordered) and (upcoming <= position or announced_bytes < _READ_AHEAD_BYTES):
            upcoming_name, following = ordered[upcoming]
            _check_whole(mappings[following.file], following)
            if is_copied(upcoming_name, following):
                _advise(mappings[following.file], following, mmap.MADV_WILLNEED)
            announced_bytes += following.nbytes
            upcoming += 1
        yield name, entry, MappedTensor(mappings[entry.file], entry)
        announced_bytes -= entry.nbytes


def _check_whole(mapping: mmap.mmap, entry: TensorEntry) -> None:
    if entry.offset + entry.nbytes > len(mapping):
        raise CheckpointError(f"{entry.file} was cut while it was read, expected it unchanged; load it again")


def _advise(mapping: mmap.mmap, entry: TensorEntry, advice: int) -> None:
    """Tell the kernel about the pages that hold a tensor, those that it shares with its neighbours left out."""
    start = -(-entry.offset // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (entry.offset + entry.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        mapping.madvise(advice, start, end - start)


def map_file(path: Path) -> mmap.mmap:
    """Map a file; raise CheckpointError where that fails."""
    try:
        with path.open("rb") as file:
            # Copy on write: torch wants a writable buffer; nothing writes to it.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be mapped ({error}), expected it unchanged; load it again") from error


def _place(
    checkpoint: Checkpoint,
    name: str,
    mapped: MappedTensor,
    device: torch.device,
    dtype: torch.dtype,
    check_finite: bool,
) -> torch.Tensor:
    """Return a tensor on its device in its type: a cast copy, or the mapped one where nothing changes."""
    source = mapped.tensor
    placed = source.to(device=device, dtype=dtype)
    if placed is source and source.data_ptr() % source.element_size():
        placed = source.clone()
    if (placed is not source or check_finite) and placed.is_floating_point():
        require_finite(checkpoint, name, placed)
    return placed


def require_finite(checkpoint: Checkpoint, name: str, values: torch.Tensor) -> None:
    """Raise CheckpointError, with the tensor's name, for NaN or Inf, also where a cast overflowed."""
    import torch

    if values.numel() == 0:
        return
    low, high = torch.aminmax(values)  # passes NaN on; many times faster than isfinite on 16-bit types
    if math.isfinite(low) and math.isfinite(high):
        return
    count = values.numel() - int(torch.isfinite(values).sum())
    original = checkpoint.index.stored[name].dtype
    dtype = _dtype_name(values.dtype)
    cast = "" if dtype == original else f" as {dtype} (the file has {original}: try bfloat16 or float32)"
    raise CheckpointError(
        f"{checkpoint.path}: {name} has {count} values that are NaN or Inf{cast}, expected finite weights; "
        f"take an earlier checkpoint of the same training"
    )
