"""What a checkpoint's tensors don't show (PolicySettings): the keys of policy.json.

settings_file.py reads and writes them; each setting is confirmed by a person (or a calibration), or assumed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from mobile_vla_inference.action import AXES
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.config import FUSION_FEATURES, TOWERS

#: Mean and standard deviation of the RGB channels, 0 to 1, by the value of the setting `image_normalization`.
IMAGE_NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}

#: Limits of an action's scale and offset, m/s or rad/s per normalised unit: no base is faster. Training divides
#: commands by the scale, so it can't be 0.
MAX_ACTION_SCALE = 100.0
MIN_ACTION_SCALE = 1e-6

STEP_PERIODS_S = (0.001, 10.0)
MAX_PROMPT_LENGTH = 1000

_MAX_FEATURES = 2 * len(FUSION_FEATURES)
_MAX_HEADS = 4096
_MAX_TOKEN_ID = 1 << 31
_MAX_SHOWN_CHARACTERS = 80

#: Settings with a fixed list of values.
_CHOICES = {
    "kosmos_pooling": ("mean", "last", "image"),
    "clip_text_feature": ("projected", "normalized", "pooled"),
    "head_activation": ("relu", "gelu", "tanh"),
    "image_normalization": tuple(IMAGE_NORMALIZATIONS),
    "channel_order": ("rgb", "bgr"),
}


@dataclass(frozen=True)
class PolicySettings:
    """The keys of policy.json; the defaults are the training project's likely values.

    Attributes:
        fusion_features: features of the fusion input in order; None: solved from the widths.
        kosmos_pooling: `mean` over valid positions, `last` token, or `image` positions.
        clip_text_feature: `projected`, `normalized` (projected, unit length) or `pooled` (before projection).
        attention_heads: heads by tower (`kosmos_text`, `kosmos_vision`, `clip_text`, `clip_vision`) unless width / 64.
        clip_eos_token_id: end-of-text id that CLIP's text tower pools at; None: from the tokenizer.
        head_activation: `relu`, `gelu` or `tanh` between the head's layers.
        head_tanh: final tanh; None: only for the head layout without LayerNorm (0/2/4/6).
        image_normalization: `imagenet` or `clip` mean and standard deviation.
        image_keep_aspect: crop the centred square before the resize, instead of changing the aspect ratio.
        channel_order: order of the training images' channels, `rgb` or `bgr`.
        action_scale: command units (m/s, rad/s) per normalised unit, one per axis.
        action_offset: command units added after the scale, one per axis.
        action_axes: which axis of the Twist each action drives.
        step_period_s: seconds that one step of the LSTM represents.
        prompt: the text for Kosmos-2; `{instruction}` is replaced.
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
        """Raise CheckpointError for values that no policy can have."""
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
        """Read the output of `to_json`; a missing setting keeps its default and is assumed.

        Raises:
            CheckpointError: another form, an unknown setting, or an impossible value; the message names the `source`.
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
        """Return the defaults with every setting assumed: the settings of a checkpoint without a settings file."""
        return cls().as_assumed()


def abridged(value: Any) -> str:
    """Return a value from a file for a message; a long one is cut."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}..."


def _setting_names() -> list[str]:
    return [each.name for each in fields(PolicySettings) if each.name != "assumed"]


def _require(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise CheckpointError(f"setting {name} is {abridged(value)}, expected {expected}; correct it")


def _is_list(value: Any, least: int, most: int, choices: tuple[str, ...] | None = None) -> bool:
    is_list = isinstance(value, (tuple, list)) and least <= len(value) <= most
    return is_list and (choices is None or all(each in choices for each in value))


def _is_number(value: Any, least: float, most: float) -> bool:
    """Return whether a value is a finite number whose magnitude is within limits."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and least <= abs(value) <= most


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
