"""The sizes of a policy's architecture (HybridConfig), and the named configurations: tiny, small and full.

Sizes are read from tensor shapes (shape_inference.py) or chosen by name; what tensors don't show is in settings.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mobile_vla_inference.errors import CheckpointError

#: Every stock block of Kosmos-2 and CLIP has heads of this width; tensors don't show the number of heads.
STOCK_HEAD_DIM = 64

#: Names of the features that can feed the fusion layer, and where each comes from.
FUSION_FEATURES = ("kosmos_text", "kosmos_vision", "clip_text", "clip_image", "clip_vision_hidden")

#: The transformers of a policy.
TOWERS = ("kosmos_text", "kosmos_vision", "clip_text", "clip_vision")

#: Number of gates of each kind of recurrent cell.
CELL_GATES = {"lstm": 4, "gru": 3, "rnn": 1}


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
    """The recurrent layers, `rnn.*`."""

    kind: str  # a key of CELL_GATES
    input_size: int
    hidden_size: int
    num_layers: int

    @property
    def gate_rows(self) -> int:
        """Rows of each weight matrix: the hidden size times the number of gates."""
        return CELL_GATES[self.kind] * self.hidden_size


@dataclass(frozen=True)
class HeadLayer:
    """One parameter pair of the action head, at `actions.mlp.<index>`."""

    index: int
    kind: str  # "linear" or "layer_norm"
    in_features: int
    out_features: int


@dataclass(frozen=True)
class HybridConfig:
    """Every size of one architecture. A part that is None is absent.

    `fusion_in` and `fusion_out` are the widths of `feature_fusion` (a Linear); both None in the pure variant, whose
    LSTM reads the pooled Kosmos-2 feature itself.
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
        """Width of each feature that this architecture can compute, by its FUSION_FEATURES name."""
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
        """Build a config from the output of `to_json`; raise CheckpointError if a field is missing or unknown."""
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
                f"{source} can't be read ({type(error).__name__}: {error}), expected the sizes of an architecture; "
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
    """Scale a published head (input 1024) to another LSTM width; the two actions stay two."""

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


def standard_config(size: str, variant: str, fusion_in: int | None = None) -> HybridConfig:
    """Return a named configuration: size `tiny`, `small` or `full` (the published one), variant `hybrid` or `pure`.

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


def with_layers(config: HybridConfig, layers: Mapping[str, int]) -> HybridConfig:
    """Return a config whose towers (`kosmos_text`, ...) have the numbers of layers in `layers`."""
    towers = {name: replace(getattr(config, name), num_layers=count) for name, count in layers.items()}
    return replace(config, **towers)
