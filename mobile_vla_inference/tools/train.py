"""`mobile_vla train`: train a member of the family on recorded episodes, or on a course in the simulated world."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_vla_inference.border import MobileVlaError, check_instruction
from mobile_vla_inference.sim.scenarios import training_sentences
from mobile_vla_inference.tools.arguments import check_output, count, positive_number

if TYPE_CHECKING:
    from mobile_vla_inference.training.dataset import Lesson
    from mobile_vla_inference.training.network import SequenceModel
    from mobile_vla_inference.training.trainer import Store, Trainer

HELP = "train on recorded episodes, or on a course in the simulated world"

WORLD = "world"
_SIZES = ("world", "tiny", "small")
_VALIDATION_EPISODES = 64
_SAVE_EVERY_UPDATES = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "episodes",
        metavar="EPISODES",
        help=f"HDF5 file or folder, folder with images/ and actions.csv, or '{WORLD}': a course with the expert",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="CK.pth", help="checkpoint to write")
    parser.add_argument(
        "--init", default="world", metavar="SIZE|CK", help=f"{', '.join(_SIZES)}, or a checkpoint (default: world)"
    )
    parser.add_argument("--updates", type=count, metavar="N", help="optimizer steps (default 2000; the course's own)")
    parser.add_argument("--rounds", type=count, metavar="N", help="rounds of the course (default 40)")
    parser.add_argument("--batch", type=count, default=8, metavar="N", help="episodes in a batch (default 8)")
    parser.add_argument("--window", type=count, default=64, metavar="N", help="steps gradients go back (default 64)")
    parser.add_argument("--learning-rate", type=positive_number, default=2e-3, metavar="R", help="default 0.002")
    parser.add_argument("--frozen-towers", action="store_true", help="train fusion, cell and head only")
    parser.add_argument("--no-memory", action="store_true", help="clear the cell's state before every step")
    parser.add_argument(
        "--instruction", type=check_instruction, metavar="TEXT", help="what was told, where the episodes don't say"
    )
    parser.add_argument("--steps", type=_steps, metavar="A:B", help="train on these steps of each episode")
    parser.add_argument("--validate-steps", type=_steps, metavar="A:B", help="validate on these steps")
    parser.add_argument("--action-scale", type=_scale, metavar="X,Z", help="commands per unit (default: the policy's)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of weights and batches (default 0)")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted training stopped")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default cpu)")
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="processes that record (default 1)")
    parser.add_argument("--processors", type=Path, metavar="DIR", help="tokenizers (default: by the checkpoint)")


def run(args: argparse.Namespace) -> int:
    """Train; return the exit status."""
    import torch

    from mobile_vla_inference.training.saving import training_path

    check_output(args.out)
    if args.seed < 0:
        raise MobileVlaError(f"--seed is {args.seed}, expected 0 or more; choose another")
    if args.resume and not training_path(args.out).exists():
        raise MobileVlaError(f"{training_path(args.out)} doesn't exist, expected it to go on from; leave out --resume")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise MobileVlaError("--device is cuda, but torch finds none, expected an NVIDIA GPU; use --device cpu")
    with tempfile.TemporaryDirectory() as folder:
        network, processors = _network(args, Path(folder))
        if args.episodes == WORLD:
            _train_in_world(args, network, processors)
        else:
            _train_on_episodes(args, network, processors)
    return 0


def _network(args: argparse.Namespace, folder: Path) -> tuple[SequenceModel, Path]:
    """Return the network to train and the folder of its processors."""
    from dataclasses import replace

    from mobile_vla_inference.policy.preprocess import InstructionEncoder
    from mobile_vla_inference.policy.processors import find_processors, processor_folders, write_processors
    from mobile_vla_inference.training.network import SequenceModel, loaded_model, starting_member, starting_model

    if args.init in _SIZES:
        config, settings = starting_member(args.init)
        model = starting_model(config, settings, args.seed)
        processors = args.processors
        if processors is None:
            processors = folder / "processors"
            write_processors(processors, config, training_sentences())
    else:
        model = loaded_model(args.init)
        processors = find_processors(args.init, args.processors)
    if args.action_scale is not None:
        if len(args.action_scale) != len(model.settings.action_axes):
            raise MobileVlaError(
                f"--action-scale has {len(args.action_scale)} numbers, expected {len(model.settings.action_axes)}, one "
                f"for each of {', '.join(model.settings.action_axes)}; correct it"
            )
        model.settings = replace(model.settings, action_scale=args.action_scale)
    encoder = InstructionEncoder(processor_folders(processors, model.config), model.config, model.settings)
    return SequenceModel(model.to(args.device), encoder), processors


def _train_in_world(args: argparse.Namespace, network: SequenceModel, processors: Path) -> None:
    """Run the course; what it has recorded lies beside the checkpoint until it is done."""
    from tqdm import tqdm

    from mobile_vla_inference.sim.sight import SIGHT
    from mobile_vla_inference.training import course as courses
    from mobile_vla_inference.training.rollout import RecorderPool
    from mobile_vla_inference.training.saving import load_progress, save_progress
    from mobile_vla_inference.training.trainer import Store, Trainer

    course = courses.Course() if args.rounds is None else courses.Course(rounds=args.rounds)
    trainer = Trainer(network, _recipe(args, course.updates), len(SIGHT))
    store = Store(network.model.settings, network.model.device, course.kept_episodes)
    first_round = 0
    folder = args.out.with_suffix(".episodes")
    if args.resume:
        state = load_progress(args.out)
        _check_same(args, state, trainer)
        trainer.restore(state)
        first_round = state["rounds_done"]
    else:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    bar = tqdm(total=course.updates, initial=trainer.update, unit="update", disable=None)

    def done(number: int, loss: float, outcomes: Counter[str]) -> None:
        save_progress(args.out, trainer, {"rounds_done": number + 1, "given": _given(args)})
        ends = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
        tqdm.write(
            f"round {number + 1} of {course.rounds}: loss {loss:.4f}; trained on new episodes that ended: {ends}"
        )

    with RecorderPool(network.model.config, network.model.settings, processors, args.workers) as pool, bar:
        courses.run_course(
            course,
            trainer,
            store,
            pool,
            folder,
            first_round=first_round,
            progress=lambda loss: bar.update(),
            done=done,
        )
        validation = Store(network.model.settings, network.model.device)
        for episodes in pool.start(_validation_tasks(), None, True):
            validation.add(episodes)
    _finish(args, trainer, store, validation, processors, course.rounds)
    shutil.rmtree(folder)


def _validation_tasks() -> list[Any]:
    from mobile_vla_inference.sim.scenarios import EVALUATION_SEEDS_FROM
    from mobile_vla_inference.training.rollout import draw_tasks

    return draw_tasks(_VALIDATION_EPISODES, 2 * EVALUATION_SEEDS_FROM, expert_drives=True)


def _train_on_episodes(args: argparse.Namespace, network: SequenceModel, processors: Path) -> None:
    """Train on what a file or folder holds."""
    from tqdm import tqdm

    from mobile_vla_inference.training.dataset import read_lessons
    from mobile_vla_inference.training.saving import load_progress, save_progress
    from mobile_vla_inference.training.trainer import Store, Trainer

    settings = network.model.settings
    episodes = read_lessons(args.episodes, network.model.config.image_size, args.instruction)
    training, validating = _split(args, episodes)
    store, validation = (Store(settings, network.model.device) for _ in range(2))
    store.add(training)
    validation.add(validating)
    trainer = Trainer(network, _recipe(args, args.updates or 2000), store.sight_width)
    if args.resume:
        state = load_progress(args.out)
        _check_same(args, state, trainer)
        trainer.restore(state)
    with tqdm(total=trainer.recipe.updates, initial=trainer.update, unit="update", disable=None) as bar:
        while trainer.update < trainer.recipe.updates:
            trainer.run(store, _SAVE_EVERY_UPDATES, lambda loss: bar.update())
            save_progress(args.out, trainer, {"given": _given(args)})
            bar.set_postfix_str(f"loss {trainer.losses[-1]:.4f}")
    steps = sum(len(episode.frames) for episode in training)
    epochs = round(trainer.update * args.batch * args.window / max(steps, 1))
    _finish(args, trainer, store, validation, processors, epochs)


def _split(args: argparse.Namespace, episodes: list[Lesson]) -> tuple[list[Lesson], list[Lesson]]:
    """Return the episodes to train on and to validate on: by steps where those are given, else every tenth."""
    if args.steps is None and args.validate_steps is None:
        if len(episodes) < 2:
            raise MobileVlaError(
                f"{args.episodes} holds one episode, expected more, or which steps of it are for what; "
                f"give --steps and --validate-steps"
            )
        return [e for i, e in enumerate(episodes) if i % 10 != 9], episodes[9::10] or episodes[-1:]
    training = [episode.steps(*(args.steps or (0, None))) for episode in episodes]
    validating = [episode.steps(*(args.validate_steps or (0, None))) for episode in episodes]
    for name, part in (("--steps", training), ("--validate-steps", validating)):
        if not all(len(episode.frames) for episode in part):
            raise MobileVlaError(f"{name} leaves an episode without a step, expected some of each; choose others")
    return training, validating


def _recipe(args: argparse.Namespace, updates: int) -> Any:
    from mobile_vla_inference.training.trainer import Recipe

    return Recipe(
        updates=updates,
        batch_episodes=args.batch,
        window_steps=args.window,
        learning_rate=args.learning_rate,
        memory=not args.no_memory,
        frozen_towers=args.frozen_towers,
        seed=args.seed,
    )


def _finish(
    args: argparse.Namespace, trainer: Trainer, store: Store, validation: Store, processors: Path, epoch: int
) -> None:
    """Validate, write the checkpoint, tell its error beside the baselines', and remove what --resume would need."""
    from mobile_vla_inference.training.saving import install_processors, save_checkpoint, training_path
    from mobile_vla_inference.training.trainer import baseline_errors, mean_absolute_error

    error = mean_absolute_error(trainer.network, validation, not args.no_memory)
    install_processors(processors, args.out)
    save_checkpoint(args.out, trainer, epoch, error, argparse.Namespace(**_given(args)))
    training_path(args.out).unlink(missing_ok=True)
    baselines = baseline_errors(store, validation)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {trainer.update} updates")
    print(f"mean absolute error on what it hasn't seen, in units of the policy: {error:.4f}")
    for name, value in baselines.items():
        print(f"  {name}: {value:.4f}")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options as plain values, paths by their names: they travel in the checkpoint, folders don't."""
    plain = {name: value for name, value in vars(args).items() if name not in ("run", "resume", "workers")}
    return {name: value.name if isinstance(value, Path) else value for name, value in plain.items()}


def _check_same(args: argparse.Namespace, state: dict[str, Any], trainer: Trainer) -> None:
    """Raise MobileVlaError where a training would go on with other options than it began with."""
    before, now = state["given"], _given(args)
    different = sorted(name for name in now if before.get(name) != now[name])
    if different:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in different)
        raise MobileVlaError(f"{named} differs from what the training began with, expected the same; correct it")


def _steps(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text} is no range of steps such as 0:500")
    return int(first), int(end)


def _scale(text: str) -> tuple[float, ...]:
    return tuple(positive_number(part) for part in text.split(","))
