"""The training loop: batches of episodes through the network, truncated backpropagation through time.

Plain PyTorch: AdamW, a learning rate that rises, stays and falls, clipped gradients. The same seed gives the same
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mobile_vla_inference.action import AXES, training_values
from mobile_vla_inference.policy.architecture import HiddenState
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.training.dataset import TrainingEpisode
from mobile_vla_inference.training.network import SequenceModel, Texts, trained_parameters

_HUBER_BETA = 0.1
_MAX_GRADIENT = 1.0
_WEIGHT_DECAY = 0.01
_AUXILIARY_WEIGHT = 0.5
_WARM_UP_UPDATES = 100
_COOL_DOWN = 0.3  # share of the updates
_LEAST_RATE = 0.01

#: Called after each update with its loss.
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        updates: optimizer steps in all.
        batch_episodes: episodes in a batch.
        window_steps: steps that gradients are propagated back through.
        learning_rate: its maximum.
        memory: False resets the hidden state before every step.
        frozen_towers: train only the fusion layer, the recurrent cell and the head.
        seed: of the weights and the batches.
    """

    updates: int
    batch_episodes: int = 8
    window_steps: int = 64
    learning_rate: float = 2e-3
    memory: bool = True
    frozen_towers: bool = False
    seed: int = 0


class Store:
    """Episodes on the training device: frames, normalised targets, auxiliary targets, instructions."""

    def __init__(self, settings: PolicySettings, device: torch.device | str = "cpu", capacity: int | None = None):
        """Begin empty.

        Args:
            settings: their axes, scale and offset turn commands into targets.
            device: of the tensors.
            capacity: how many episodes are kept, the newest; None: all.
        """
        self._settings = settings
        self._device = device
        self._capacity = capacity
        self.frames: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        self.auxiliary_targets: list[torch.Tensor | None] = []
        self.instructions: list[str] = []

    def add(self, episodes: Sequence[TrainingEpisode]) -> None:
        """Add episodes; beyond the capacity, the oldest are removed."""
        for episode in episodes:
            self.frames.append(torch.from_numpy(episode.frames).to(self._device))
            targets = targets_of(episode.commands, self._settings)
            self.targets.append(torch.from_numpy(targets).to(self._device))
            auxiliary = episode.auxiliary_targets
            self.auxiliary_targets.append(None if auxiliary is None else torch.from_numpy(auxiliary).to(self._device))
            self.instructions.append(episode.instruction)
        surplus = 0 if self._capacity is None else max(0, len(self.frames) - self._capacity)
        for column in (self.frames, self.targets, self.auxiliary_targets, self.instructions):
            del column[:surplus]

    @property
    def auxiliary_width(self) -> int:
        """Number of auxiliary targets at each step; 0 where an episode has none."""
        missing = any(targets is None for targets in self.auxiliary_targets)
        return 0 if missing else self.auxiliary_targets[0].shape[1]

    def __len__(self) -> int:
        return len(self.frames)


def targets_of(commands: np.ndarray, settings: PolicySettings) -> np.ndarray:
    """Return the normalised targets of commands [steps, 3], float32 [steps, actions]."""
    columns = [AXES.index(axis) for axis in settings.action_axes]
    return training_values(commands[:, columns], settings.action_scale, settings.action_offset).astype(np.float32)


class Trainer:
    """The state of a training.

    Attributes:
        network: what is trained.
        recipe: how.
        update: number of optimizer steps made.
        losses: of each update, on the actions.
    """

    def __init__(self, network: SequenceModel, recipe: Recipe, auxiliary_width: int = 0) -> None:
        """Begin.

        Args:
            network: what is trained; its parameters get requires_grad by the recipe.
            recipe: how.
            auxiliary_width: number of auxiliary targets, which a linear layer next to the policy predicts; 0 for none.
        """
        self.network = network
        self.recipe = recipe
        self.update = 0
        self.losses: list[float] = []
        self._device = network.model.device
        network.model.requires_grad_(False)
        chosen = trained_parameters(network.model, recipe.frozen_towers)
        self._parameters = [parameter.requires_grad_(True) for _, parameter in chosen]
        self._auxiliary_head = None
        if auxiliary_width:
            torch.manual_seed(recipe.seed)
            width = network.model.config.cell.input_size
            self._auxiliary_head = torch.nn.Linear(width, auxiliary_width).to(self._device)
            self._parameters += self._auxiliary_head.parameters()
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=recipe.learning_rate, weight_decay=_WEIGHT_DECAY, fused=self._device.type == "cuda"
        )
        self._rng = np.random.default_rng([recipe.seed, 5])

    def run(self, store: Store, updates: int, progress: Progress | None = None) -> float:
        """Make updates on batches drawn from the store; return their mean loss on the actions."""
        losses = []
        windows = self._windows(store)
        for _ in range(min(updates, self.recipe.updates - self.update)):
            losses.append(next(windows))
            if progress is not None:
                progress(losses[-1])
        self.losses += losses
        return float(np.mean(losses)) if losses else 0.0

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs to continue with the same results."""
        return {
            "recipe": asdict(self.recipe),
            "model": self.network.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "sight_head": None if self._auxiliary_head is None else self._auxiliary_head.state_dict(),
            "update": self.update,
            "losses": self.losses,
            "random": self._rng.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.network.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._auxiliary_head is not None:
            self._auxiliary_head.load_state_dict(state["sight_head"])
        self.update = state["update"]
        self.losses = list(state["losses"])
        self._rng.bit_generator.state = state["random"]

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state, for the checkpoint."""
        return self._optimizer.state_dict()

    def _windows(self, store: Store) -> Iterator[float]:
        """Draw batches without end; each window of steps is an update, and passes the hidden state on to the next."""
        window = self.recipe.window_steps
        while True:
            chosen = self._rng.integers(0, len(store), self.recipe.batch_episodes)
            texts = self.network.texts([store.instructions[index] for index in chosen])
            starts = [
                int(self._rng.integers(0, window)) if len(store.frames[index]) > window else 0 for index in chosen
            ]
            longest = max(len(store.frames[index]) - start for index, start in zip(chosen, starts))
            state = None
            for shift in range(0, longest, window):
                parts = [slice(start + shift, start + shift + window) for start in starts]
                loss, state = self._learn(store, chosen, parts, texts, state)
                yield loss

    def _learn(
        self, store: Store, chosen: np.ndarray, parts: list[slice], texts: Texts, state: HiddenState | None
    ) -> tuple[float, HiddenState | None]:
        """Make one update on a part of each chosen episode; return the loss on the actions and the hidden state."""
        frames = [store.frames[index][part] for index, part in zip(chosen, parts)]
        counts = [len(each) for each in frames]
        rows = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)], device=self._device)
        steps = torch.tensor([step for count in counts for step in range(count)], device=self._device)
        features = self.network.features(torch.cat(frames), texts, rows)
        padded = features.new_zeros(len(chosen), max(counts), features.shape[-1]).index_put((rows, steps), features)
        if self.recipe.memory:
            actions, state = self.network.act(padded, state)
            state = tuple(each.detach() for each in state) if isinstance(state, tuple) else state.detach()
        else:
            actions = self.network.act_without_memory(padded)
        targets = torch.cat([store.targets[index][part] for index, part in zip(chosen, parts)])
        loss = functional.smooth_l1_loss(actions[rows, steps], targets, beta=_HUBER_BETA)
        total = loss
        if self._auxiliary_head is not None:
            auxiliary = torch.cat([store.auxiliary_targets[index][part] for index, part in zip(chosen, parts)])
            total = loss + _AUXILIARY_WEIGHT * _auxiliary_loss(self._auxiliary_head(features), auxiliary)
        self._descend(total)
        return loss.item(), state

    def _descend(self, loss: torch.Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * self._rate()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT)
        self._optimizer.step()
        self.update += 1

    def _rate(self) -> float:
        """Return the factor of the learning rate: rising at first, then 1, and falling over the last part."""
        left = 1.0 - self.update / self.recipe.updates
        return max(_LEAST_RATE, min(1.0, (self.update + 1) / _WARM_UP_UPDATES, left / _COOL_DOWN))


def _auxiliary_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error over the targets that are not NaN."""
    known = targets.isfinite()
    return ((outputs - targets.nan_to_num()).square() * known).sum() / known.sum().clamp(min=1)


@torch.inference_mode()
def predicted(network: SequenceModel, store: Store, memory: bool) -> list[torch.Tensor]:
    """Return the network's actions for each episode of a store, [steps, actions]; `memory` keeps the hidden state."""
    outputs = []
    for frames, text in zip(store.frames, store.instructions):
        rows = torch.zeros(len(frames), dtype=torch.long, device=frames.device)
        features = network.features(frames, network.texts([text]), rows).unsqueeze(0)
        actions = network.act(features, None)[0] if memory else network.act_without_memory(features)
        outputs.append(actions[0])
    return outputs


def mean_absolute_error(network: SequenceModel, store: Store, memory: bool = True) -> float:
    """Return the error over all steps and actions of a store, in normalised units."""
    outputs = predicted(network, store, memory)
    errors = torch.cat([(actions - targets).abs() for actions, targets in zip(outputs, store.targets)])
    return float(errors.mean())


def baseline_errors(training: Store, validation: Store) -> dict[str, float]:
    """Return the errors of baselines: zero, the mean of the training targets, and the target of the step before."""
    mean = torch.cat(training.targets).mean(dim=0)
    targets = torch.cat(validation.targets)
    changes = torch.cat([each[1:] - each[:-1] for each in validation.targets])
    return {
        "zero": float(targets.abs().mean()),
        "mean of training": float((targets - mean).abs().mean()),
        "previous action": float(changes.abs().mean()),
    }
