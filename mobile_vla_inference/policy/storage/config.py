"""The sizes of a family member (HybridConfig) and what tensors can't tell (PolicySettings).

Pure data, no torch: `inspect` and the node's side can read it. Sizes are read from tensor shapes (family.py)
or chosen by make-checkpoint; settings live in a file beside the checkpoint (settings_file.py), each confirmed or
assumed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from mobile_vla_inference.action import AXES
from mobile_vla_inference.errors import CheckpointError

#: Every stock block of Kosmos-2 and CLIP has heads of this width; the count itself leaves no trace in the tensors.
STOCK_HEAD_DIM = 64

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

#: Names of the features that can feed the fusion layer, and where each comes from.
FUSION_FEATURES = ("kosmos_text", "kosmos_vision", "clip_text", "clip_image", "clip_vision_hidden")


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


#: Towers that can have a number of attention heads of their own.
TOWERS = ("kosmos_text", "kosmos_vision", "clip_text", "clip_vision")

#: Scales and offsets of an action beyond these belong to no base: m/s or rad/s per normalised unit. Commands are
#: divided by a scale in training, so it can't be 0 either.
MAX_ACTION_SCALE = 100.0
MIN_ACTION_SCALE = 1e-6

STEP_PERIODS_S = (0.001, 10.0)
MAX_PROMPT_LENGTH = 1000

_MAX_FEATURES = 2 * len(FUSION_FEATURES)
_MAX_HEADS = 4096
_MAX_TOKEN_ID = 1 << 31
_MAX_SHOWN = 80


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
        for name, choices in _CHOICES.items():
            _require(name, getattr(self, name), getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name in ("image_keep_aspect", "head_tanh"):
            value, may_be_none = getattr(self, name), name == "head_tanh"
            fits = isinstance(value, bool) or (may_be_none and value is None)
            _require(name, value, fits, "true, false or null" if may_be_none else "true or false")
        _require(
            "fusion_features",
            self.fusion_features,
            self.fusion_features is None or _is_list(self.fusion_features, 1, _MAX_FEATURES, FUSION_FEATURES),
            f"null or a list of {', '.join(FUSION_FEATURES)}",
        )
        _require(
            "action_axes",
            self.action_axes,
            _is_list(self.action_axes, 1, len(AXES), AXES) and len(set(self.action_axes)) == len(self.action_axes),
            f"each axis once, of {', '.join(AXES)}",
        )
        count = len(self.action_axes)
        for name, least in (("action_scale", MIN_ACTION_SCALE), ("action_offset", 0.0)):
            values = getattr(self, name)
            fits = _is_list(values, count, count) and all(_is_number(v, least, MAX_ACTION_SCALE) for v in values)
            _require(name, values, fits, f"{count} numbers of {least:g} to {MAX_ACTION_SCALE:g}, either sign")
        fits = _is_number(self.step_period_s, *STEP_PERIODS_S) and self.step_period_s > 0
        _require("step_period_s", self.step_period_s, fits, "{:g} to {:g} s".format(*STEP_PERIODS_S))
        heads = self.attention_heads
        fits = isinstance(heads, dict) and all(key in TOWERS and _is_count(heads[key], 1, _MAX_HEADS) for key in heads)
        _require("attention_heads", heads, fits, f"numbers of heads by tower, of {', '.join(TOWERS)}")
        eos = self.clip_eos_token_id
        _require("clip_eos_token_id", eos, eos is None or _is_count(eos, 0, _MAX_TOKEN_ID), "null or a token's number")
        fits = (
            isinstance(self.prompt, str)
            and len(self.prompt) <= MAX_PROMPT_LENGTH
            and self.prompt.count("{instruction}") == 1
        )
        _require("prompt", self.prompt, fits, f"text of up to {MAX_PROMPT_LENGTH} characters with one {{instruction}}")

    @property
    def confirmed(self) -> bool:
        """Whether a person (or a calibration) has confirmed every setting."""
        return not self.assumed

    def as_assumed(self) -> PolicySettings:
        """Return the same values, none of them confirmed."""
        return replace(self, assumed=tuple(sorted(_setting_names())))

    def to_json(self) -> dict[str, Any]:
        """Return each setting with its value and whether it is confirmed, JSON-ready; `from_json` reads it back."""
        return {
            name: {"value": getattr(self, name), "confirmed": name not in self.assumed} for name in _setting_names()
        }

    @classmethod
    def from_json(cls, data: Any, source: str) -> PolicySettings:
        """Read what `to_json` gave; what is missing keeps its default and counts as assumed.

        Raises:
            CheckpointError: not the form, an unknown setting, or a value that can't be; names the `source`.
        """
        known = _setting_names()
        if not isinstance(data, dict):
            raise CheckpointError(f"{source} has the settings {abridged(data)}, expected an object; correct it")
        values, assumed = {}, set(known)
        for name, entry in data.items():
            if name not in known:
                raise CheckpointError(
                    f"{source} has the unknown setting {abridged(name)}, expected some of {', '.join(sorted(known))}; "
                    f"remove it"
                )
            if (
                not isinstance(entry, dict)
                or entry.keys() - {"confirmed"} != {"value"}
                or not isinstance(entry.get("confirmed", False), bool)
            ):
                raise CheckpointError(
                    f"{source}: setting {name} is {abridged(entry)}, "
                    f'expected {{"value": ..., "confirmed": true or false}}; correct it'
                )
            value = entry["value"]
            values[name] = tuple(value) if isinstance(value, list) else value
            if entry.get("confirmed", False):
                assumed.discard(name)
        try:
            return cls(**values, assumed=tuple(sorted(assumed)))
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from error

    @classmethod
    def all_assumed(cls) -> PolicySettings:
        """Return the defaults with every setting assumed: what a checkpoint without a settings file gets."""
        return cls().as_assumed()


def abridged(value: Any) -> str:
    """Return a value from outside for a message: its beginning, where it is long."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


#: Values of the settings that are one of a few words.
_CHOICES = {
    "kosmos_pooling": ("mean", "last", "image"),
    "clip_text_feature": ("projected", "normalized", "pooled"),
    "head_activation": ("relu", "gelu", "tanh"),
    "image_normalization": ("imagenet", "clip"),
    "channel_order": ("rgb", "bgr"),
}


def _setting_names() -> list[str]:
    return [each.name for each in fields(PolicySettings) if each.name != "assumed"]


def _require(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise CheckpointError(f"setting {name} is {abridged(value)}, expected {expected}; correct it")


def _is_list(value: Any, least: int, most: int, choices: tuple[str, ...] | None = None) -> bool:
    is_list = isinstance(value, (tuple, list)) and least <= len(value) <= most
    return is_list and (choices is None or all(each in choices for each in value))


def _is_number(value: Any, least: float, most: float) -> bool:
    """Whether a value is a finite number of a size (its sign left out) within limits."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and least <= abs(value) <= most


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
