"""The curriculum in the simulated world: first the expert drives, then the policy, with the expert's labels (DAgger).

Each round trains on all episodes recorded so far. Meanwhile, the next episodes are recorded with the weights that the
policy had when the round began. Everything follows from the seed: the number of processes changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from mobile_vla_inference.training.dataset import TrainingEpisode, read_training_episodes, write_training_episodes
from mobile_vla_inference.training.rollout import RecorderPool, Task, draw_tasks
from mobile_vla_inference.training.trainer import Progress, Store, Trainer


@dataclass(frozen=True)
class Curriculum:
    """How many episodes are recorded, and how many updates are made.

    Attributes:
        rounds: of recording and training.
        expert_episodes: episodes that the expert drives before the first round.
        round_episodes: episodes that are recorded during each round.
        expert_rounds: the first rounds, during which the expert still drives.
        first_updates: optimizer steps of the first round.
        round_updates: optimizer steps of each later round.
        kept_episodes: training uses at most this many episodes, the newest.
    """

    rounds: int = 40
    expert_episodes: int = 384
    round_episodes: int = 96
    expert_rounds: int = 3
    first_updates: int = 300
    round_updates: int = 80
    kept_episodes: int = 6000

    @property
    def updates(self) -> int:
        """Optimizer steps in all."""
        return self.first_updates + (self.rounds - 1) * self.round_updates


#: Number of worlds for one curriculum; evaluation uses those from scenarios.EVALUATION_SEEDS_FROM on.
SEEDS_PER_CURRICULUM = 100_000

#: Called after each round with its number, its mean loss and the outcomes of the episodes that it added.
RoundDone = Callable[[int, float, Counter[str]], None]


def run_curriculum(
    curriculum: Curriculum,
    trainer: Trainer,
    store: Store,
    pool: RecorderPool,
    folder: Path,
    *,
    first_round: int = 0,
    progress: Progress | None = None,
    done: RoundDone | None = None,
) -> None:
    """Run the rounds from `first_round` on; `folder` keeps the recorded episodes, so that a later call can resume."""
    side_px = trainer.network.model.config.image_size
    for number in range(first_round):
        store.add(read_training_episodes(_file(folder, number), side_px))
    if first_round == 0:
        recording = pool.start(_tasks(curriculum, trainer, 0), None, trainer.recipe.memory)
        episodes = _collect(recording, _file(folder, 0))
    else:
        episodes = read_training_episodes(_file(folder, first_round), side_px)
    for number in range(first_round, curriculum.rounds):
        store.add(episodes)
        outcomes = Counter(episode.outcome for episode in episodes)
        is_last = number + 1 == curriculum.rounds
        if not is_last:
            driver = trainer.network.model if number >= curriculum.expert_rounds else None
            recording = pool.start(_tasks(curriculum, trainer, number + 1), driver, trainer.recipe.memory)
        loss = trainer.run(store, curriculum.round_updates if number else curriculum.first_updates, progress)
        if not is_last:
            episodes = _collect(recording, _file(folder, number + 1))
        if done is not None:
            done(number, loss, outcomes)


def _tasks(curriculum: Curriculum, trainer: Trainer, number: int) -> list[Task]:
    """Return the episodes to record for a round; every episode of a curriculum has its own seed."""
    first = trainer.recipe.seed * SEEDS_PER_CURRICULUM
    if number == 0:
        return draw_tasks(curriculum.expert_episodes, first, expert_drives=True)
    first += curriculum.expert_episodes + (number - 1) * curriculum.round_episodes
    return draw_tasks(curriculum.round_episodes, first, expert_drives=number <= curriculum.expert_rounds)


def _collect(recording: Iterable[list[TrainingEpisode]], path: Path) -> list[TrainingEpisode]:
    """Wait for the recorded episodes, and write them to a file."""
    episodes = list(chain.from_iterable(recording))
    write_training_episodes(path, episodes)
    return episodes


def _file(folder: Path, number: int) -> Path:
    return folder / f"round_{number:04d}.h5"
