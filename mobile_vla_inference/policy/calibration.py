"""Find the settings that the tensors do not determine: which values reproduce the validation error stored by training?

Every combination of the assumed settings is run over recorded episodes. The towers run once for each way to prepare
frames and text. Pooling, features, head, axes and scale are then tried on the towers' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any

import numpy as np
import torch
from torch import nn

from mobile_vla_inference.action import AXES, training_values
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.frames import reduce_frame
from mobile_vla_inference.policy.architecture import ActionHead, HybridModel
from mobile_vla_inference.policy.loading import load_model
from mobile_vla_inference.policy.preprocess import FrameNormalizer, InstructionEncoder
from mobile_vla_inference.policy.storage.checkpoint import Checkpoint
from mobile_vla_inference.policy.storage.checkpoint_files import ProcessorFolders
from mobile_vla_inference.policy.storage.config import FUSION_FEATURES
from mobile_vla_inference.policy.storage.fusion import solve_fusion_features
from mobile_vla_inference.policy.storage.settings import PolicySettings

#: The values that are tried for each setting that policy.json does not confirm.
CANDIDATES: dict[str, tuple[Any, ...]] = {
    "image_keep_aspect": (False, True),
    "channel_order": ("rgb", "bgr"),
    "image_normalization": ("imagenet", "clip"),
    "prompt": ("{instruction}", "<grounding>{instruction}"),
    "kosmos_pooling": ("mean", "last", "image"),
    "clip_text_feature": ("projected", "normalized", "pooled"),
    "head_activation": ("relu", "gelu", "tanh"),
    "head_tanh": (False, True),
    "action_axes": (("linear.x", "angular.z"), ("linear.x", "linear.y")),
    "action_scale": ((2.0, 2.0), (1.15, 1.15), (1.0, 1.0)),
}
#: The settings that determine the towers' inputs, and those that determine the LSTM's input.
_INPUT = ("image_keep_aspect", "channel_order", "image_normalization", "prompt")
_FEATURES = ("fusion_features", "kosmos_pooling", "clip_text_feature")
#: Settings that matter for one feature only.
_READ_BY = {"kosmos_pooling": "kosmos_text", "clip_text_feature": "clip_text"}

#: A setting is determined if every combination with another value is so many times as far from the stored error.
_CLEAR_FACTOR = 10.0
#: Differences of the MAE below this are rounding.
_ROUNDING = 1e-7
#: The best combination counts as found if at most so many combinations would be expected as near by chance.
CHANCE_LIMIT = 0.01


@dataclass(frozen=True)
class Drive:
    """An episode to calibrate on.

    Attributes:
        frames: called for its images, uint8 RGB; may be called several times.
        instruction: the robot's instruction.
        commands: linear x, linear y (m/s), angular z (rad/s), float [steps, 3].
    """

    frames: Callable[[], Iterable[np.ndarray]]
    instruction: str
    commands: np.ndarray


@dataclass(frozen=True)
class Trial:
    """One combination of settings: their values, the MAE (normalised units), and its distance from the stored error."""

    values: dict[str, Any]
    mae: float
    distance: float


@dataclass(frozen=True)
class Calibration:
    """The result.

    Attributes:
        trials: every combination, the nearest first.
        tried: the settings that were tried, each with its values.
    """

    trials: tuple[Trial, ...]
    tried: dict[str, tuple[Any, ...]]

    @property
    def chance(self) -> float:
        """Expected number of combinations as near as the best one if the errors were random."""
        distances = np.array([trial.distance for trial in self.trials])
        middle = float(np.median(distances))
        return len(distances) / 2.0 * self.trials[0].distance / middle if middle > 0.0 else float(len(distances))

    @property
    def determined(self) -> tuple[str, ...]:
        """The settings that are determined: all their other values are clearly less near."""
        best = self.trials[0]
        limit = max(_CLEAR_FACTOR * best.distance, _ROUNDING)
        return tuple(
            name
            for name in self.tried
            if all(trial.distance > limit for trial in self.trials if trial.values[name] != best.values[name])
        )


def candidates(checkpoint: Checkpoint) -> dict[str, tuple[Any, ...]]:
    """Return the values to try for each setting that is assumed and matters for this checkpoint, name -> values."""
    config, settings = checkpoint.config, checkpoint.settings
    found = {name: values for name, values in CANDIDATES.items() if name in settings.assumed}
    for name in ("action_axes", "action_scale"):
        if name in found and config.num_actions != len(found[name][0]):
            del found[name]
    if config.fusion_in is not None and "fusion_features" in settings.assumed:
        found["fusion_features"] = tuple(
            names for count in range(1, len(FUSION_FEATURES) + 1) for names in permutations(FUSION_FEATURES, count)
        )
    if config.clip_text is None:
        found.pop("clip_text_feature", None)
    return found


def calibrate(
    checkpoint: Checkpoint,
    processors: ProcessorFolders,
    drives: Sequence[Drive],
    val_mae: float,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
) -> Calibration:
    """Try every combination of the assumed settings and rank them by how near their MAE comes to `val_mae`.

    Args:
        checkpoint: an opened one; its confirmed settings stay as they are.
        processors: its tokenizer folders.
        drives: recorded episodes; the state is empty at the start of each.
        val_mae: the validation error that training stored, normalised units.
        device: where it runs.
        dtype: type of the weights.
        progress: called with the drives done so far and in all; each way to prepare the frames counts.
        force: load even if the memory seems too small.

    Raises:
        CheckpointError: no setting is left to try, or the checkpoint can't be loaded.
    """
    tried = candidates(checkpoint)
    if not tried:
        raise CheckpointError(
            f"{checkpoint.path} has no assumed setting that calibration can find, expected at least one; "
            "to check a confirmed setting again, remove it from its policy.json"
        )
    base = replace(checkpoint.settings, assumed=())
    model = load_model(checkpoint, device=device, dtype=dtype, force=force)
    inputs = list(_combinations(tried, _INPUT))
    goals = np.concatenate([drive.commands for drive in drives])
    trials = []
    cache: dict[int, list[np.ndarray]] = {}
    for number, values in enumerate(inputs):
        settings = replace(base, **values)
        if number and values.get("image_keep_aspect") != inputs[number - 1].get("image_keep_aspect"):
            cache.clear()
        variants = list(_feature_variants(checkpoint, settings, tried))
        extractor = _FeatureExtractor(model, processors, settings)
        features: list[list[torch.Tensor]] = []
        for done, drive in enumerate(drives):
            if done not in cache:
                cache[done] = [_reduced(frame, model, settings) for frame in drive.frames()]
            features.append(extractor.features(cache[done], drive.instruction, [variant for _, variant in variants]))
            if progress is not None:
                progress(number * len(drives) + done + 1, len(inputs) * len(drives))
        for index, (feature_values, _) in enumerate(variants):
            parts = [per_drive[index] for per_drive in features]
            for more, mae in _head_trials(model, base, tried, parts, goals):
                trials.append(Trial({**values, **feature_values, **more}, mae, abs(mae - val_mae)))
    trials.sort(key=lambda trial: trial.distance)
    possible = {
        name: tuple(v for v in values if any(t.values[name] == v for t in trials)) for name, values in tried.items()
    }
    return Calibration(tuple(trials), possible)


def _reduced(frame: np.ndarray, model: HybridModel, settings: PolicySettings) -> np.ndarray:
    return reduce_frame(frame, model.config.image_size, settings.image_keep_aspect)


def _combinations(tried: dict[str, tuple[Any, ...]], names: Iterable[str]) -> Iterator[dict[str, Any]]:
    present = [name for name in names if name in tried]
    for values in product(*(tried[name] for name in present)):
        yield dict(zip(present, values))


def _feature_variants(
    checkpoint: Checkpoint, settings: PolicySettings, tried: dict[str, tuple[Any, ...]]
) -> Iterator[tuple[dict[str, Any], PolicySettings]]:
    """Yield the ways to join features whose widths fit the checkpoint."""
    for values in _combinations(tried, _FEATURES):
        variant = replace(settings, **values)
        try:
            features = solve_fusion_features(checkpoint.config, variant)
        except CheckpointError:
            continue
        # A setting that no joined feature depends on is tried with one value only.
        if any(
            setting in values and feature not in features and values[setting] != tried[setting][0]
            for setting, feature in _READ_BY.items()
        ):
            continue
        yield values, variant


class _CachedTower(nn.Module):
    """A tower that returns its last output again until `output` is set to None."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.output: Any = None

    @property
    def vision_model(self) -> nn.Module:
        """The vision tower inside."""
        return self.tower.vision_model

    def forward(self, **inputs: Any) -> Any:
        """Compute the output, or return the cached one."""
        if self.output is None:
            self.output = self.tower(**inputs)
        return self.output


class _FeatureExtractor:
    """The model up to the LSTM's input, for one way to prepare frames and text."""

    def __init__(self, model: HybridModel, processors: ProcessorFolders, settings: PolicySettings) -> None:
        self._model = model
        self._encoder = InstructionEncoder(processors, model.config, settings)
        self._normalize = FrameNormalizer(settings, model.device, model.dtype)
        if self._encoder.clip_eos_token_id is not None and settings.clip_eos_token_id is None:
            model.set_clip_eos_token_id(self._encoder.clip_eos_token_id)

    @torch.inference_mode()
    def features(
        self, frames: Iterable[np.ndarray], instruction: str, variants: Sequence[PolicySettings]
    ) -> list[torch.Tensor]:
        """Return the LSTM's input for the reduced frames of a drive, [steps, cell input], for each variant."""
        model, encoder = self._model, self._encoder
        prompt = encoder.prompt(instruction).to(model.device)
        clip_ids = encoder.clip_ids(instruction)
        original = model.kosmos_model
        cached = _CachedTower(original)
        rows: list[list[torch.Tensor]] = [[] for _ in variants]
        model.kosmos_model = cached
        try:
            texts = [self._clip_text(variant, clip_ids) for variant in variants]
            for frame in frames:
                pixels = self._normalize(frame)
                cached.output = None
                for row, variant, text in zip(rows, variants, texts):
                    self._select(variant)
                    row.append(model.fused_features(pixels, prompt, text))
        finally:
            model.kosmos_model = original
        return [torch.cat(row) for row in rows]

    def _select(self, variant: PolicySettings) -> None:
        self._model.settings = variant
        self._model.fusion_features = solve_fusion_features(self._model.config, variant)

    def _clip_text(self, variant: PolicySettings, clip_ids: torch.Tensor | None) -> torch.Tensor | None:
        self._select(variant)
        if not self._model.reads_clip_text:
            return None
        return self._model.clip_text_feature(clip_ids.to(self._model.device))


@torch.inference_mode()
def _head_trials(
    model: HybridModel,
    base: PolicySettings,
    tried: dict[str, tuple[Any, ...]],
    features: Sequence[torch.Tensor],
    goals: np.ndarray,
) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield the MAE of each head, scale and choice of axes for the LSTM's inputs."""
    outputs = torch.cat([model.rnn(part, model.initial_hidden_state())[0] for part in features])
    for head_values in _combinations(tried, ("head_activation", "head_tanh")):
        settings = replace(base, **head_values)
        head = ActionHead(model.config.head, settings.head_activation, settings.head_tanh)
        head.load_state_dict(model.actions.state_dict())
        actions = head.to(outputs).eval()(outputs).float().cpu().numpy().astype(np.float64)
        for command_values in _combinations(tried, ("action_axes", "action_scale")):
            chosen = replace(settings, **command_values)
            columns = [AXES.index(axis) for axis in chosen.action_axes]
            goal = training_values(goals[:, columns], chosen.action_scale, chosen.action_offset)
            yield {**head_values, **command_values}, float(np.abs(actions - goal).mean())
