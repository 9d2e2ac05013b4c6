"""Open a checkpoint: find out what it is, without torch and without reading its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.checkpoint_files import settings_path
from mobile_vla_inference.policy.storage.config import HybridConfig
from mobile_vla_inference.policy.storage.conversion.record import read_conversion
from mobile_vla_inference.policy.storage.fingerprint import fingerprint
from mobile_vla_inference.policy.storage.formats.recognition import read_index
from mobile_vla_inference.policy.storage.fusion import solve_fusion_features
from mobile_vla_inference.policy.storage.hash_cache import disk_state
from mobile_vla_inference.policy.storage.layout import is_block_matrix
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.storage.settings_file import load_settings
from mobile_vla_inference.policy.storage.shape_inference import check_recurrent_layers, infer_config
from mobile_vla_inference.policy.storage.tensor_index import SCALE_SUFFIX, TensorIndex

#: Number types that weights can have in a file.
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")

#: Beginnings of the names of data types that weights can't have: their values need a scale or a second tensor.
_FOREIGN_TYPES = ("float8", "float4", "uint", "complex", "q", "bits")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a known architecture.

    Attributes:
        path: its file or folder.
        index: where its tensors are.
        config: its sizes, read from the shapes.
        settings: those of its settings file (settings_file.py); all assumed without a file that was confirmed for it.
        fingerprint: which checkpoint this is, by its content (fingerprint.py).
        settings_file: source of the settings; None: the defaults.
        settings_note: why the settings file doesn't count as confirmed, and what to do; None if it does.
        disk_states: state of each file when it was opened (hash_cache.disk_state).
        conversion: content of a converted folder's config.json; None if it was not converted.
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
        """`int8` if weights are quantised, else None."""
        return "int8" if self.index.scales else None

    @property
    def kept_layers(self) -> dict[str, dict[str, int]]:
        """Towers that `convert --keep-layers` shortened: how many layers are `kept`, `of` how many."""
        return {} if self.conversion is None else self.conversion["keep_layers"]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person must know before this policy drives, one sentence each."""
        shortened = tuple(
            f"{tower} has only the first {layers['kept']} of its {layers['of']} layers (convert --keep-layers); nobody "
            f"trained this policy, so evaluate it before it drives a robot"
            for tower, layers in self.kept_layers.items()
        )
        return shortened if self.settings_note is None else (*shortened, self.settings_note)

    @property
    def fusion_features(self) -> tuple[str, ...]:
        """Names of the features that the fusion layer (or the LSTM, in the pure variant) reads, in order."""
        return solve_fusion_features(self.config, self.settings)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file was written to or replaced since it was opened."""
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
    """Open a checkpoint file or folder without reading its tensors, and check that its architecture is known.

    Raises:
        CheckpointError: it can't be read, fits no architecture variant (with a table of what differs), or the features
            of its fusion layer are ambiguous.
    """
    path = Path(path)
    index = read_index(path)
    _check_number_types(path, index)
    config = infer_config(index.shapes, str(path))
    check_recurrent_layers(config, index.optimizer_shapes, index.metadata.get("args"), str(path))
    _check_dtypes(path, index)
    conversion = read_conversion(path, config)
    if conversion is not None:
        index = replace(index, metadata=conversion["training"])
    states = {file: _disk_state(file) for file in {entry.file for entry in index.stored.values()}}
    mark = fingerprint(index)
    stored = load_settings(path, mark)
    try:
        solve_fusion_features(config, stored.settings)
    except CheckpointError as error:
        standing = "" if stored.note is None else " (not confirmed for this checkpoint)"
        raise CheckpointError(f"{stored.file or settings_path(path)}{standing}: {error}") from error
    return Checkpoint(path, index, config, stored.settings, mark, stored.file, stored.note, states, conversion)


def _disk_state(path: Path) -> str:
    try:
        return disk_state(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} does not exist any more ({error.strerror}), expected it unchanged; load it again"
        ) from error


def _check_number_types(path: Path, index: TensorIndex) -> None:
    """Raise CheckpointError for data types that no policy has; their shapes would be misleading."""
    for name, entry in index.tensors.items():
        if entry.dtype.startswith(_FOREIGN_TYPES):
            raise CheckpointError(
                f"{path}: {name[:100]} is {entry.dtype}, expected {', '.join(WEIGHT_DTYPES)}; "
                f"save it again in one of these, with any scale multiplied in"
            )


def _check_dtypes(path: Path, index: TensorIndex) -> None:
    """Raise CheckpointError for weights that are neither floating numbers nor int8 with scales as convert writes."""
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
