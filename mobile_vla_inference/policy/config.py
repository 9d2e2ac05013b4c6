"""The sizes of a family member (HybridConfig) and what tensors can't tell (PolicySettings, policy.json).

Pure data, no torch: `inspect` and the node's side can read it. Sizes are read from tensor shapes (family.py)
or chosen by make-checkpoint; settings live in policy.json beside the checkpoint, each confirmed or assumed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mobile_vla_inference.border import CheckpointError, write_text_atomically
from mobile_vla_inference.policy.checksums import update_checksum

#: Every stock block of Kosmos-2 and CLIP has heads of this width; the count itself leaves no trace in the tensors.
STOCK_HEAD_DIM = 64

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

#: Names of the features that can feed the fusion layer, and where each comes from.
FUSION_FEATURES = ("kosmos_text", "kosmos_vision", "clip_text", "clip_image", "clip_vision_hidden")

#: Axes that a policy can drive, by REP-103: x forward, y left (m/s), z counter-clockwise (rad/s).
ACTION_AXES = ("linear.x", "linear.y", "angular.z")


@dataclass(frozen=True)
class TextTower:
    """Sizes of a transformer over tokens (the Kosmos-2 text decoder or the CLIP text encoder)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    #: Position embeddings in the file; None for Kosmos-2, whose sinusoids are computed.
    max_positions: int | None = None


@dataclass(frozen=True)
class VisionTower:
    """Sizes of a vision transformer (the Kosmos-2 or the CLIP one)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    image_size: int
    patch_size: int


@dataclass(frozen=True)
class Cell:
    """The recurrent cell, `rnn.*`: LSTM (4 gates), GRU (3) or RNN (1)."""

    kind: str  # "lstm", "gru" or "rnn"
    input_size: int
    hidden_size: int
    num_layers: int


@dataclass(frozen=True)
class HeadLayer:
    """One parameter pair of the action head, at `actions.mlp.<index>`."""

    index: int
    kind: str  # "linear" or "layer_norm"
    in_features: int
    out_features: int


@dataclass(frozen=True)
class HybridConfig:
    """Every size of one member of the family. Whatever is None is not part of it.

    `fusion_in` and `fusion_out` are the widths of `feature_fusion` (a Linear); both None in the pure variant, whose
    cell reads the pooled Kosmos-2 feature itself.
    """

    kosmos_text: TextTower
    kosmos_vision: VisionTower
    latent_query_num: int
    cell: Cell
    head: tuple[HeadLayer, ...]
    clip_text: TextTower | None = None
    clip_vision: VisionTower | None = None
    clip_projection_dim: int | None = None
    clip_logit_scale: bool = False
    fusion_in: int | None = None
    fusion_out: int | None = None

    @property
    def variant(self) -> str:
        """`hybrid` with a fusion layer, `pure` without."""
        return "pure" if self.fusion_in is None else "hybrid"

    @property
    def num_actions(self) -> int:
        """Width of the head's last Linear."""
        return self.head[-1].out_features

    @property
    def image_size(self) -> int:
        """Side of the square input frame, pixels."""
        return self.kosmos_vision.image_size

    @property
    def feature_widths(self) -> dict[str, int]:
        """Width of each feature that this member can compute, by its FUSION_FEATURES name."""
        widths = {"kosmos_text": self.kosmos_text.hidden_size, "kosmos_vision": self.kosmos_vision.hidden_size}
        if self.clip_text is not None:
            widths["clip_text"] = self.clip_projection_dim
        if self.clip_vision is not None:
            widths["clip_image"] = self.clip_projection_dim
            widths["clip_vision_hidden"] = self.clip_vision.hidden_size
        return widths

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str = "model config") -> HybridConfig:
        """Build a config from what `to_json` gave; raise CheckpointError where a field is missing or unknown."""
        parts = {
            "kosmos_text": TextTower,
            "kosmos_vision": VisionTower,
            "cell": Cell,
            "clip_text": TextTower,
            "clip_vision": VisionTower,
        }
        try:
            values = {k: parts[k](**v) if k in parts and v is not None else v for k, v in data.items()}
            values["head"] = tuple(HeadLayer(**layer) for layer in data["head"])
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{source} can't be read ({type(error).__name__}: {error}), expected the sizes of a family member; "
                f"convert the checkpoint again"
            ) from error


def _published_head() -> tuple[HeadLayer, ...]:
    return (
        HeadLayer(0, "linear", 1024, 512),
        HeadLayer(1, "layer_norm", 512, 512),
        HeadLayer(4, "linear", 512, 512),
        HeadLayer(5, "layer_norm", 512, 512),
        HeadLayer(8, "linear", 512, 2),
    )


def _scaled_head(head: tuple[HeadLayer, ...], hidden_size: int) -> tuple[HeadLayer, ...]:
    """Scale a published head (input 1024) to another cell width; the two actions stay two."""

    def width(features: int) -> int:
        return features if features == 2 else features * hidden_size // 1024

    return tuple(
        replace(layer, in_features=width(layer.in_features), out_features=width(layer.out_features)) for layer in head
    )


_PURE_HEAD = (
    HeadLayer(0, "linear", 1024, 1024),
    HeadLayer(2, "linear", 1024, 512),
    HeadLayer(4, "linear", 512, 256),
    HeadLayer(6, "linear", 256, 2),
)

_FULL = {
    "kosmos_text": TextTower(65037, 2048, 8192, 24),
    "kosmos_vision": VisionTower(1024, 4096, 24, 224, 14),
    "latent_query_num": 64,
    "clip_text": TextTower(49408, 512, 2048, 12, 77),
    "clip_vision": VisionTower(768, 3072, 12, 224, 32),
    "clip_projection_dim": 512,
    "cell": Cell("lstm", 2048, 1024, 4),
}
_SMALL = {
    "kosmos_text": TextTower(2048, 256, 1024, 4),
    "kosmos_vision": VisionTower(128, 512, 4, 112, 14),
    "latent_query_num": 16,
    "clip_text": TextTower(2048, 128, 512, 4, 77),
    "clip_vision": VisionTower(192, 768, 4, 112, 28),
    "clip_projection_dim": 128,
    "cell": Cell("lstm", 256, 256, 2),
}
_TINY = {
    "kosmos_text": TextTower(1024, 64, 256, 2),
    "kosmos_vision": VisionTower(64, 256, 2, 56, 14),
    "latent_query_num": 4,
    "clip_text": TextTower(1024, 64, 128, 2, 77),
    "clip_vision": VisionTower(64, 128, 2, 56, 28),
    "clip_projection_dim": 32,
    "cell": Cell("lstm", 64, 64, 2),
}
SIZES = {"tiny": _TINY, "small": _SMALL, "full": _FULL}


def family_member(size: str, variant: str, fusion_in: int | None = None) -> HybridConfig:
    """Return a member by name: size `tiny`, `small` or `full` (the published one), variant `hybrid` or `pure`.

    `fusion_in` is the fusion layer's input width; None takes Kosmos text + CLIP text (2560 at full size).
    """
    sizes = dict(SIZES[size])
    head = _published_head() if variant == "hybrid" else _PURE_HEAD
    sizes["head"] = _scaled_head(head, sizes["cell"].hidden_size)
    if variant == "pure":
        for name in ("clip_text", "clip_vision", "clip_projection_dim"):
            del sizes[name]
        return HybridConfig(**sizes)
    default_in = sizes["kosmos_text"].hidden_size + sizes["clip_projection_dim"]
    return HybridConfig(
        **sizes,
        clip_logit_scale=True,
        fusion_in=default_in if fusion_in is None else fusion_in,
        fusion_out=sizes["cell"].input_size,
    )


SETTINGS_FILE = "policy.json"
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class PolicySettings:
    """What tensors can't tell: the keys of policy.json, with the training project's likely values as defaults.

    Attributes:
        fusion_features: features of the fusion input in order; None: solved from the widths.
        kosmos_pooling: `mean` over valid positions, `last` token, or `image` positions.
        clip_text_feature: `projected`, `normalized` (projected, unit length) or `pooled` (before projection).
        attention_heads: heads by tower (`kosmos_text`, `kosmos_vision`, `clip_text`, `clip_vision`) unless width / 64.
        clip_eos_token_id: end-of-text id that CLIP's text tower pools at; None: from the tokenizer.
        head_activation: `relu`, `gelu` or `tanh` between the head's layers.
        head_tanh: final tanh; None: only for the head layout without LayerNorm (0/2/4/6).
        image_normalization: `imagenet` or `clip` mean and standard deviation.
        image_keep_aspect: crop the centred square before the resize, instead of squeezing.
        channel_order: order of the training images' channels, `rgb` or `bgr`.
        action_scale: command units (m/s, rad/s) per normalised unit, one per axis.
        action_offset: command units added after the scale, one per axis.
        action_axes: which axis of the Twist each action drives.
        step_period_s: seconds that one step of the cell stands for.
        prompt: what Kosmos-2 reads; `{instruction}` is replaced.
    """

    fusion_features: tuple[str, ...] | None = None
    kosmos_pooling: str = "mean"
    clip_text_feature: str = "projected"
    attention_heads: dict[str, int] = field(default_factory=dict)
    clip_eos_token_id: int | None = None
    head_activation: str = "relu"
    head_tanh: bool | None = None
    image_normalization: str = "imagenet"
    image_keep_aspect: bool = False
    channel_order: str = "rgb"
    action_scale: tuple[float, ...] = (2.0, 2.0)
    action_offset: tuple[float, ...] = (0.0, 0.0)
    action_axes: tuple[str, ...] = ("linear.x", "angular.z")
    step_period_s: float = 0.3
    prompt: str = "{instruction}"
    #: Names of the settings that nobody has confirmed; not a key of policy.json.
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that no policy of this family can have."""
        _check_choice("kosmos_pooling", self.kosmos_pooling, ("mean", "last", "image"))
        _check_choice("clip_text_feature", self.clip_text_feature, ("projected", "normalized", "pooled"))
        _check_choice("head_activation", self.head_activation, ("relu", "gelu", "tanh"))
        _check_choice("image_normalization", self.image_normalization, ("imagenet", "clip"))
        _check_choice("channel_order", self.channel_order, ("rgb", "bgr"))
        for feature in self.fusion_features or ():
            _check_choice("fusion_features", feature, FUSION_FEATURES)
        for axis in self.action_axes:
            _check_choice("action_axes", axis, ACTION_AXES)
        if len(set(self.action_axes)) != len(self.action_axes):
            raise CheckpointError(
                f"setting action_axes is {list(self.action_axes)}, expected each axis once; edit policy.json"
            )
        for name in ("action_scale", "action_offset"):
            values = getattr(self, name)
            if len(values) != len(self.action_axes) or not all(_is_finite(v) for v in values):
                raise CheckpointError(
                    f"setting {name} is {list(values)}, expected {len(self.action_axes)} finite numbers; edit it"
                )
        if not (_is_finite(self.step_period_s) and 0.001 <= self.step_period_s <= 10.0):
            raise CheckpointError(
                f"setting step_period_s is {self.step_period_s!r}, expected 0.001 to 10 s; edit policy.json"
            )
        if not isinstance(self.prompt, str) or self.prompt.count("{instruction}") != 1:
            raise CheckpointError(
                f"setting prompt is {self.prompt!r}, expected text with one {{instruction}}; edit policy.json"
            )

    @property
    def confirmed(self) -> bool:
        """Whether a person (or a calibration) has confirmed every setting."""
        return not self.assumed

    def to_json(self) -> dict[str, Any]:
        """Return the content of policy.json: each setting with its value and whether it is confirmed."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "assumed"}
        settings = {name: {"value": value, "confirmed": name not in self.assumed} for name, value in values.items()}
        return {"format": 1, "settings": settings}

    @classmethod
    def from_json(cls, data: Any, source: str) -> PolicySettings:
        """Read the content of policy.json; what is missing keeps its default and counts as assumed.

        Raises:
            CheckpointError: not the format, an unknown setting, or a value that can't be.
        """
        known = {f.name for f in fields(cls)} - {"assumed"}
        if not isinstance(data, dict) or not isinstance(data.get("settings"), dict):
            raise CheckpointError(
                f'{source} has no "settings" object, expected the format that inspect --confirm writes; write it again'
            )
        values, assumed = {}, set(known)
        for name, entry in data["settings"].items():
            if name not in known:
                raise CheckpointError(
                    f"{source} has the unknown setting {name!r}, expected some of {', '.join(sorted(known))}; remove it"
                )
            if (
                not isinstance(entry, dict)
                or "value" not in entry
                or not isinstance(entry.get("confirmed", False), bool)
            ):
                raise CheckpointError(
                    f'{source}: setting {name} is {entry!r}, expected {{"value": ..., "confirmed": true or false}}'
                )
            value = entry["value"]
            values[name] = tuple(value) if isinstance(value, list) else value
            if entry.get("confirmed", False):
                assumed.discard(name)
        try:
            return cls(**values, assumed=tuple(sorted(assumed)))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{source} holds a value of the wrong type ({error}); correct it") from error

    @classmethod
    def all_assumed(cls) -> PolicySettings:
        """Return the defaults with every setting assumed: what a checkpoint without policy.json gets."""
        return cls(assumed=tuple(sorted({f.name for f in fields(cls)} - {"assumed"})))


def settings_path(checkpoint: Path) -> Path:
    """Return the settings file that counts for a checkpoint file or a converted folder.

    `X.policy.json` beside `X.pth` wins over `policy.json`, so that two checkpoints can share a folder.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.is_dir():
        return checkpoint / SETTINGS_FILE
    own = checkpoint.with_suffix(f".{SETTINGS_FILE}")
    return own if own.exists() else checkpoint.with_name(SETTINGS_FILE)


def save_settings(checkpoint: Path, settings: PolicySettings) -> Path:
    """Write the settings of `checkpoint` atomically and return the file.

    Another checkpoint's policy.json in the same folder is kept: then the file is `X.policy.json`. In a converted
    folder, the file's hash is brought up to date.
    """
    checkpoint = Path(checkpoint)
    path = settings_path(checkpoint)
    text = json.dumps(settings.to_json(), indent=2, ensure_ascii=False) + "\n"
    shared = path.name == SETTINGS_FILE and not checkpoint.is_dir()
    if shared and path.exists() and path.read_text(encoding="utf-8") != text:
        others = [p for p in checkpoint.parent.iterdir() if p.suffix in CHECKPOINT_SUFFIXES and p != checkpoint]
        if others:
            path = checkpoint.with_suffix(f".{SETTINGS_FILE}")
    write_text_atomically(path, text)
    if checkpoint.is_dir():
        update_checksum(checkpoint, path.name)
    return path


def load_settings(checkpoint: Path) -> PolicySettings:
    """Load policy.json beside `checkpoint`; all settings are assumed where there is none."""
    path = settings_path(Path(checkpoint))
    if not path.exists():
        return PolicySettings.all_assumed()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} can't be read as JSON ({error}); correct it or write it again with inspect --confirm"
        ) from error
    return PolicySettings.from_json(data, str(path))


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CheckpointError(f"setting {name} is {value!r}, expected one of {', '.join(choices)}; edit policy.json")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
