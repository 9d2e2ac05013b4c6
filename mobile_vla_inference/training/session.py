"""A training from its first update to its checkpoint: on recorded episodes, or on a curriculum in simulation.

Its progress is stored next to the checkpoint while it runs, so that an interrupted training can be resumed.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_vla_inference.sim.auxiliary_targets import AUXILIARY_TARGETS
from mobile_vla_inference.sim.scenarios import EVALUATION_SEEDS_FROM
from mobile_vla_inference.training import curriculum
from mobile_vla_inference.training.dataset import TrainingEpisode, TrainingError
from mobile_vla_inference.training.network import SequenceModel
from mobile_vla_inference.training.rollout import RecorderPool, draw_tasks
from mobile_vla_inference.training.saving import (
    episodes_path,
    install_processors,
    load_progress,
    save_checkpoint,
    save_progress,
    training_path,
)
from mobile_vla_inference.training.trainer import (
    Progress,
    Recipe,
    Store,
    Trainer,
    baseline_errors,
    mean_absolute_error,
)

_VALIDATION_EPISODES = 64
_SAVE_EVERY_UPDATES = 200


@dataclass(frozen=True)
class Setup:
    """What a training begins with.

    Attributes:
        out: the checkpoint to write.
        network: what is trained.
        processors: folder of its tokenizers.
        recipe: how it is trained.
        given: the options as plain values, which are stored in the checkpoint.
        resume: whether it continues an interrupted training.
    """

    out: Path
    network: SequenceModel
    processors: Path
    recipe: Recipe
    given: dict[str, Any]
    resume: bool


@dataclass(frozen=True)
class Result:
    """A finished training.

    Attributes:
        updates: optimizer steps made.
        error: validation MAE, normalised.
        baselines: the same error of commands that need no camera, by name.
    """

    updates: int
    error: float
    baselines: dict[str, float]


class EpisodesTraining:
    """A training on recorded episodes.

    Attributes:
        trainer: its state.
    """

    def __init__(
        self, setup: Setup, training: Sequence[TrainingEpisode], validating: Sequence[TrainingEpisode]
    ) -> None:
        """Prepare the training, or restore an interrupted one; raise TrainingError if that was another training."""
        self._setup = setup
        self._store, self._validation = (_store(setup) for _ in range(2))
        self._store.add(training)
        self._validation.add(validating)
        self._steps = sum(len(episode.frames) for episode in training)
        self.trainer = Trainer(setup.network, setup.recipe, self._store.auxiliary_width)
        if setup.resume:
            _restore(setup, self.trainer)

    def run(self, progress: Progress) -> Result:
        """Train to the end; `progress` is called after each update with its loss."""
        trainer, recipe = self.trainer, self._setup.recipe
        while trainer.update < recipe.updates:
            trainer.run(self._store, _SAVE_EVERY_UPDATES, progress)
            _save(self._setup, trainer)
        epochs = round(trainer.update * recipe.batch_episodes * recipe.window_steps / max(self._steps, 1))
        return _finish(self._setup, trainer, self._store, self._validation, epochs)


class WorldTraining:
    """A training on a curriculum in simulation. Its recorded episodes are kept next to the checkpoint until it is done.

    Attributes:
        trainer: its state.
    """

    def __init__(self, setup: Setup, rounds: curriculum.Curriculum, workers: int) -> None:
        """Prepare the training, or restore an interrupted one.

        Args:
            setup: what it begins with.
            rounds: the rounds.
            workers: processes that record episodes.

        Raises:
            TrainingError: the interrupted training had other options.
        """
        self._setup = setup
        self._curriculum = rounds
        self._workers = workers
        self._folder = episodes_path(setup.out)
        self._first_round = 0
        self.trainer = Trainer(setup.network, setup.recipe, len(AUXILIARY_TARGETS))
        if setup.resume:
            self._first_round = _restore(setup, self.trainer)["rounds_done"]
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, progress: Progress, round_done: Callable[[int, float, Counter[str]], None]) -> Result:
        """Train to the end.

        Args:
            progress: called after each update with its loss.
            round_done: called after each round with its number from 0, its mean loss, and how many of the recorded
                episodes ended in which way.
        """
        setup, trainer = self._setup, self.trainer
        store = _store(setup, self._curriculum.kept_episodes)
        validation = _store(setup)
        self._folder.mkdir(exist_ok=True)

        def done(number: int, loss: float, outcomes: Counter[str]) -> None:
            _save(setup, trainer, {"rounds_done": number + 1})
            round_done(number, loss, outcomes)

        model = setup.network.model
        with RecorderPool(model.config, model.settings, setup.processors, self._workers) as pool:
            curriculum.run_curriculum(
                self._curriculum,
                trainer,
                store,
                pool,
                self._folder,
                first_round=self._first_round,
                progress=progress,
                done=done,
            )
            tasks = draw_tasks(_VALIDATION_EPISODES, 2 * EVALUATION_SEEDS_FROM, expert_drives=True)
            for episodes in pool.start(tasks, None, True):
                validation.add(episodes)
        result = _finish(setup, trainer, store, validation, self._curriculum.rounds)
        shutil.rmtree(self._folder)
        return result


def _store(setup: Setup, capacity: int | None = None) -> Store:
    return Store(setup.network.model.settings, setup.network.model.device, capacity)


def _save(setup: Setup, trainer: Trainer, extra: dict[str, Any] | None = None) -> None:
    save_progress(setup.out, trainer, {"given": setup.given, "units": _units(trainer), **(extra or {})})


def _restore(setup: Setup, trainer: Trainer) -> dict[str, Any]:
    """Restore an interrupted training and return its state; raise TrainingError if it had other options or units."""
    state = load_progress(setup.out)
    different = sorted(name for name in setup.given if state["given"].get(name) != setup.given[name])
    if different:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in different)
        raise TrainingError(
            f"{named} differs from the value at the start of the training, expected the same; correct it"
        )
    units = _units(trainer)
    if state.get("units", units) != units:
        raise TrainingError(
            f"the episodes give the step period and scale {units}, but the training started with {state['units']}, "
            "expected the same episodes; leave out --resume"
        )
    trainer.restore(state)
    return state


def _units(trainer: Trainer) -> list[float]:
    """Return the units of the weights: step period and scale."""
    settings = trainer.network.model.settings
    return [settings.step_period_s, *settings.action_scale]


def _finish(setup: Setup, trainer: Trainer, store: Store, validation: Store, epoch: int) -> Result:
    """Validate, write the checkpoint, and remove what only --resume needs."""
    error = mean_absolute_error(trainer.network, validation, setup.recipe.memory)
    install_processors(setup.processors, setup.out)
    save_checkpoint(setup.out, trainer, epoch, error, Namespace(**setup.given))
    training_path(setup.out).unlink(missing_ok=True)
    return Result(trainer.update, error, baseline_errors(store, validation))
