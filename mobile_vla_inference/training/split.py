"""Which steps of recorded episodes are trained on and which are validated on; no step is both."""

from __future__ import annotations

from collections.abc import Sequence

from mobile_vla_inference.training.dataset import TrainingEpisode, TrainingError

#: Steps from the first to before the second.
StepRange = tuple[int, int]


def split_episodes(
    episodes: Sequence[TrainingEpisode], source: str, train: StepRange | None, validate: StepRange | None
) -> tuple[list[TrainingEpisode], list[TrainingEpisode]]:
    """Return what to train on and what to validate on: by the given steps, else every tenth episode or the last one.

    Args:
        episodes: at least one.
        source: where they are from, for messages.
        train: steps of each episode to train on; None: whole episodes.
        validate: steps of each episode to validate on; given if and only if `train` is.

    Raises:
        TrainingError: there is only one episode, or the steps overlap or don't exist.
    """
    if train is None and validate is None:
        return _split_whole(episodes, source)
    if train is None or validate is None:
        given, missing = ("--steps", "--validate-steps") if train else ("--validate-steps", "--steps")
        raise TrainingError(
            f"{given} is given without {missing}, expected both; {_split_advice(episodes, train, validate)}"
        )
    first, end = max(train[0], validate[0]), min(train[1], validate[1])
    if first < end:
        raise TrainingError(
            f"--steps and --validate-steps both contain {first}:{end}, expected no step in both; "
            f"{_split_advice(episodes)}"
        )
    parts = []
    for name, (first, end) in (("--steps", train), ("--validate-steps", validate)):
        short = [episode for episode in episodes if len(episode.frames) < end]
        if short:
            raise TrainingError(
                f"{name} is {first}:{end}, but {short[0].where} has {len(short[0].frames)} steps, expected {end} or "
                f"more; {_split_advice(episodes)}"
            )
        parts.append([episode.steps(first, end) for episode in episodes])
    return parts[0], parts[1]


def _split_whole(
    episodes: Sequence[TrainingEpisode], source: str
) -> tuple[list[TrainingEpisode], list[TrainingEpisode]]:
    if len(episodes) < 2:
        steps = len(episodes[0].frames)
        raise TrainingError(
            f"{source} contains one episode of {steps} step{'s' * (steps != 1)}, expected several episodes, or "
            "steps to "
            f"train and to validate on; {_split_advice(episodes)}"
        )
    validating = range(9, len(episodes), 10) or range(len(episodes) - 1, len(episodes))
    training = [episode for index, episode in enumerate(episodes) if index not in validating]
    return training, [episodes[index] for index in validating]


def _split_advice(
    episodes: Sequence[TrainingEpisode], train: StepRange | None = None, validate: StepRange | None = None
) -> str:
    """Return how to split the episodes by --steps and --validate-steps, with numbers that each of them has.

    Args:
        episodes: at least one.
        train: given steps to train on, which are kept if possible.
        validate: the same to validate on.
    """
    count = min(len(episode.frames) for episode in episodes)
    if count < 2:
        return "record more steps"
    if train is not None and train[1] < count:
        validate = (train[1], count)
    elif validate is not None and validate[0] > 0 and validate[1] <= count:
        train = (0, validate[0])
    else:
        middle = count - max(1, count // 10)
        train, validate = (0, middle), (middle, count)
    return f"give separate steps, such as --steps {train[0]}:{train[1]} --validate-steps {validate[0]}:{validate[1]}"
