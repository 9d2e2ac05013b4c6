"""The course in the simulated world: the expert shows, then the policy drives and the expert says what is better.

Each round trains on all that was recorded so far while the next episodes are recorded with the weights that
the round began with. Everything follows from the seed; the number of processes changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from mobile_vla_inference.training.dataset import Lesson, read_lessons, write_lessons
from mobile_vla_inference.training.rollout import RecorderPool, Task, draw_tasks
from mobile_vla_inference.training.trainer import Progress, Store, Trainer


@dataclass(frozen=True)
class Course:
    """How much of what.

    Attributes:
        rounds: of recording and training.
        shown_episodes: what the expert drives before the first round.
        round_episodes: what is recorded beside each round.
        shown_rounds: rounds beside which the expert still drives.
        first_updates: of the first round.
        round_updates: of each later one.
        kept_episodes: the newest so many are trained on.
    """

    rounds: int = 40
    shown_episodes: int = 384
    round_episodes: int = 96
    shown_rounds: int = 3
    first_updates: int = 300
    round_updates: int = 80
    kept_episodes: int = 6000

    @property
    def updates(self) -> int:
        """Optimizer steps in all."""
        return self.first_updates + (self.rounds - 1) * self.round_updates


#: Worlds of a course; those of evaluation begin at scenarios.EVALUATION_SEEDS_FROM.
SEEDS_PER_COURSE = 100_000

#: Called after each round with its number, its mean loss and how the episodes recorded beside it ended.
RoundDone = Callable[[int, float, Counter[str]], None]


def run_course(
    course: Course,
    trainer: Trainer,
    store: Store,
    pool: RecorderPool,
    folder: Path,
    *,
    first_round: int = 0,
    progress: Progress | None = None,
    done: RoundDone | None = None,
) -> None:
    """Run the rounds from `first_round` on; `folder` keeps what was recorded, so that a course can be resumed."""
    side_px = trainer.network.model.config.image_size
    for number in range(first_round):
        store.add(read_lessons(_file(folder, number), side_px))
    if first_round == 0:
        episodes = _collect(pool.start(_tasks(course, trainer, 0), None, trainer.recipe.memory), _file(folder, 0))
    else:
        episodes = read_lessons(_file(folder, first_round), side_px)
    for number in range(first_round, course.rounds):
        store.add(episodes)
        outcomes = Counter(episode.outcome for episode in episodes)
        is_last = number + 1 == course.rounds
        if not is_last:
            driver = trainer.network.model if number >= course.shown_rounds else None
            recording = pool.start(_tasks(course, trainer, number + 1), driver, trainer.recipe.memory)
        loss = trainer.run(store, course.round_updates if number else course.first_updates, progress)
        if not is_last:
            episodes = _collect(recording, _file(folder, number + 1))
        if done is not None:
            done(number, loss, outcomes)


def _tasks(course: Course, trainer: Trainer, number: int) -> list[Task]:
    """Return what is recorded for a round; every episode of a course has a seed of its own."""
    first = trainer.recipe.seed * SEEDS_PER_COURSE
    if number == 0:
        return draw_tasks(course.shown_episodes, first, expert_drives=True)
    first += course.shown_episodes + (number - 1) * course.round_episodes
    return draw_tasks(course.round_episodes, first, expert_drives=number <= course.shown_rounds)


def _collect(recording: Iterable[list[Lesson]], path: Path) -> list[Lesson]:
    episodes = list(chain.from_iterable(recording))
    write_lessons(path, episodes)
    return episodes


def _file(folder: Path, number: int) -> Path:
    return folder / f"round_{number:04d}.h5"
