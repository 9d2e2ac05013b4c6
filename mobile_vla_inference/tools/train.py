"""`mobile_vla train`: train a member of the family on recorded episodes, or on a course in the simulated world."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_vla_inference.action import AXES
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.sim.phrases import training_sentences
from mobile_vla_inference.tools.arguments import (
    add_full_speed_arguments,
    check_absent,
    check_output,
    count,
    full_speeds,
    positive_number,
)

if TYPE_CHECKING:
    from mobile_vla_inference.policy.storage.config import HybridConfig
    from mobile_vla_inference.policy.storage.settings import PolicySettings
    from mobile_vla_inference.training.agreement import Agreement, Start
    from mobile_vla_inference.training.dataset import TrainingEpisode
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
        "--instruction", type=check_instruction, metavar="TEXT", help="what was told (default: as the episodes say)"
    )
    parser.add_argument("--channel-order", choices=("rgb", "bgr"), default="rgb", help="of HDF5 images (default rgb)")
    add_full_speed_arguments(parser)
    parser.add_argument("--steps", type=_steps, metavar="A:B", help="train on these steps of each episode")
    parser.add_argument("--validate-steps", type=_steps, metavar="A:B", help="validate on these others")
    parser.add_argument(
        "--step-period-s",
        type=positive_number,
        metavar="S",
        help="seconds from one step to the next (default: as the episodes' stamps or duration say)",
    )
    parser.add_argument(
        "--action-axes",
        type=_axes,
        metavar="A,B",
        help="what the policy drives, of linear.x,linear.y,angular.z; what else was recorded is left out",
    )
    parser.add_argument(
        "--action-scale",
        type=_scale,
        metavar="X,Z",
        help="m/s or rad/s per unit, one for each axis (default: the start checkpoint's, else the episodes' fastest)",
    )
    parser.add_argument(
        "--max-clipped",
        type=_share,
        metavar="SHARE",
        help="share of the samples of an axis that may be beyond its scale, 0 to 1 (default 0.01)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of weights and batches (default 0)")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that exists, and what belongs to it")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted training stopped")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default cpu)")
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="processes that record (default 1)")
    parser.add_argument("--processors", type=Path, metavar="DIR", help="tokenizers (default: by the checkpoint)")


def run(args: argparse.Namespace) -> int:
    """Train; return the exit status."""
    import torch

    from mobile_vla_inference.training.saving import training_path

    _check_outputs(args)
    if args.seed < 0:
        raise MobileVlaError(f"--seed is {args.seed}, expected 0 or more; choose another")
    if args.resume and not training_path(args.out).exists():
        raise MobileVlaError(f"{training_path(args.out)} doesn't exist, expected it to go on from; leave out --resume")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise MobileVlaError("--device is cuda, but torch finds none, expected an NVIDIA GPU; use --device cpu")
    config, start = _start(args)
    episodes = [] if args.episodes == WORLD else _episodes(args, config.image_size)
    parts = ([], []) if args.episodes == WORLD else _split(args, episodes)
    agreement = _agreement(args, start, [*parts[0], *parts[1]])
    print(*agreement.notes, sep="\n")
    for warning in agreement.warnings:
        _warn(warning)
    with tempfile.TemporaryDirectory() as folder:
        network, processors = _network(args, config, agreement.settings, Path(folder))
        if args.episodes == WORLD:
            _train_in_world(args, network, processors)
        else:
            _train_on_episodes(args, network, processors, *parts)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse what would overwrite the inputs, or, without --force or --resume, anything that exists."""
    from mobile_vla_inference.policy.storage.checkpoint_files import processor_places
    from mobile_vla_inference.training.saving import training_path, written_paths

    in_world = args.episodes == WORLD
    inputs = [None if in_world else Path(args.episodes), None if args.init in _SIZES else Path(args.init)]
    replaced = written_paths(args.out, in_world)
    for path in replaced:
        for each in filter(None, inputs):
            if path.exists() and (path.resolve() == each.resolve() or path.resolve() in each.resolve().parents):
                raise MobileVlaError(
                    f"--out {args.out} would overwrite {path}, from which {each} is read, expected another; choose one"
                )
    check_output(args.out, *inputs, force=args.force or args.resume)
    if args.force or args.resume:
        return
    if training_path(args.out).exists():
        raise MobileVlaError(
            f"{training_path(args.out)} is what an interrupted training left, expected a new one; go on with --resume, "
            "choose another name for --out, or give --force"
        )
    kept = args.processors or (None if args.init in _SIZES else processor_places(Path(args.init))[0])
    check_absent(*(path for path in replaced if kept is None or path.resolve() != kept.resolve()))


def _start(args: argparse.Namespace) -> tuple[HybridConfig, Start]:
    """Return the sizes of what is trained and what it begins with; of a checkpoint, nothing but its index is read."""
    from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
    from mobile_vla_inference.training.agreement import Start
    from mobile_vla_inference.training.network import starting_config

    if args.init in _SIZES:
        config, settings = starting_config(args.init, args.action_axes)
        start = Start(settings, False, f"--init {args.init}")
    else:
        checkpoint = open_checkpoint(args.init)
        config, start = checkpoint.config, Start(checkpoint.settings, True, str(args.init))
    axes = start.settings.action_axes
    if args.action_axes is not None and args.action_axes != axes:
        raise MobileVlaError(
            f"--action-axes is {','.join(args.action_axes)}, but {args.init} drives {','.join(axes)}, expected the "
            f"same; begin with one of the sizes {', '.join(_SIZES)}"
        )
    if args.action_scale is not None and len(args.action_scale) != len(axes):
        raise MobileVlaError(
            f"--action-scale has {len(args.action_scale)} number{'s' * (len(args.action_scale) != 1)}, expected "
            f"{len(axes)}, one for each of "
            f"{', '.join(axes)}; correct it"
        )
    return config, start


def _agreement(args: argparse.Namespace, start: Start, episodes: list[TrainingEpisode]) -> Agreement:
    """Return the settings that the training gives, and what to tell about them."""
    from mobile_vla_inference.training.agreement import MAX_CLIPPED_SHARE, Options, agreed_settings, check_world

    max_clipped = MAX_CLIPPED_SHARE if args.max_clipped is None else args.max_clipped
    options = Options(args.step_period_s, args.action_scale, args.action_axes is not None, max_clipped)
    return check_world(start, options) if args.episodes == WORLD else agreed_settings(episodes, start, options)


def _episodes(args: argparse.Namespace, side_px: int) -> list[TrainingEpisode]:
    """Read the episodes, and tell what options put in place of what they say."""
    from mobile_vla_inference.training.dataset import read_training_episodes

    is_table = (Path(args.episodes) / "actions.csv").is_file()
    if not is_table and (args.max_linear_mps or args.max_angular_radps):
        raise MobileVlaError(
            f"--max-linear-mps and --max-angular-radps are for a folder with actions.csv, but {args.episodes} holds "
            "m/s and rad/s already; leave them out"
        )
    speeds = full_speeds(args)
    episodes = read_training_episodes(
        args.episodes, side_px, args.instruction, channel_order=args.channel_order, full_speeds=speeds
    )
    if is_table:
        print(f"full throttle is {speeds[0]:g} m/s, full steering {speeds[1]:g} rad/s (--max-linear-mps, ...)")
    replaced = sum(episode.recorded_instruction not in ("", episode.instruction) for episode in episodes)
    if replaced:
        _warn(f"--instruction replaces what {replaced} of {len(episodes)} episodes tell")
    return episodes


def _warn(sentence: str) -> None:
    print(f"mobile_vla: warning: {sentence}", file=sys.stderr)


def _network(
    args: argparse.Namespace, config: HybridConfig, settings: PolicySettings, folder: Path
) -> tuple[SequenceModel, Path]:
    """Return the network to train and the folder of its processors."""
    from mobile_vla_inference.policy.preprocess import InstructionEncoder
    from mobile_vla_inference.policy.storage.checkpoint_files import find_processors, processor_folders
    from mobile_vla_inference.policy.synthetic.processors import write_processors
    from mobile_vla_inference.training.network import SequenceModel, loaded_model, starting_model

    if args.init in _SIZES:
        model = starting_model(config, settings, args.seed)
        processors = args.processors
        if processors is None:
            processors = folder / "processors"
            write_processors(processors, config, training_sentences())
    else:
        model = loaded_model(args.init)
        model.settings = settings
        processors = find_processors(args.init, args.processors)
    encoder = InstructionEncoder(processor_folders(processors, model.config), model.config, model.settings)
    return SequenceModel(model.to(args.device), encoder), processors


def _train_in_world(args: argparse.Namespace, network: SequenceModel, processors: Path) -> None:
    """Run the course; what it has recorded lies beside the checkpoint until it is done."""
    from tqdm import tqdm

    from mobile_vla_inference.sim.auxiliary_targets import AUXILIARY_TARGETS
    from mobile_vla_inference.training import curriculum
    from mobile_vla_inference.training.rollout import RecorderPool
    from mobile_vla_inference.training.saving import episodes_path, load_progress, save_progress
    from mobile_vla_inference.training.trainer import Store, Trainer

    plan = curriculum.Curriculum() if args.rounds is None else curriculum.Curriculum(rounds=args.rounds)
    trainer = Trainer(network, _recipe(args, plan.updates), len(AUXILIARY_TARGETS))
    store = Store(network.model.settings, network.model.device, plan.kept_episodes)
    first_round = 0
    folder = episodes_path(args.out)
    if args.resume:
        state = load_progress(args.out)
        _check_same(args, state, trainer)
        trainer.restore(state)
        first_round = state["rounds_done"]
    else:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    bar = tqdm(total=plan.updates, initial=trainer.update, unit="update", disable=None)

    def done(number: int, loss: float, outcomes: Counter[str]) -> None:
        save_progress(args.out, trainer, {"rounds_done": number + 1, "given": _given(args), "units": _units(trainer)})
        ends = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
        tqdm.write(f"round {number + 1} of {plan.rounds}: loss {loss:.4f}; trained on new episodes that ended: {ends}")

    with RecorderPool(network.model.config, network.model.settings, processors, args.workers) as pool, bar:
        curriculum.run_curriculum(
            plan,
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
    _finish(args, trainer, store, validation, processors, plan.rounds)
    shutil.rmtree(folder)


def _validation_tasks() -> list[Any]:
    from mobile_vla_inference.sim.scenarios import EVALUATION_SEEDS_FROM
    from mobile_vla_inference.training.rollout import draw_tasks

    return draw_tasks(_VALIDATION_EPISODES, 2 * EVALUATION_SEEDS_FROM, expert_drives=True)


def _train_on_episodes(
    args: argparse.Namespace,
    network: SequenceModel,
    processors: Path,
    training: list[TrainingEpisode],
    validating: list[TrainingEpisode],
) -> None:
    """Train on some episodes, validate on others."""
    from tqdm import tqdm

    from mobile_vla_inference.training.saving import load_progress, save_progress
    from mobile_vla_inference.training.trainer import Store, Trainer

    settings = network.model.settings
    store, validation = (Store(settings, network.model.device) for _ in range(2))
    store.add(training)
    validation.add(validating)
    steps = [sum(len(episode.frames) for episode in part) for part in (training, validating)]
    print(f"steps: {steps[0]} to train on, {steps[1]} others to validate on")
    trainer = Trainer(network, _recipe(args, args.updates or 2000), store.auxiliary_width)
    if args.resume:
        state = load_progress(args.out)
        _check_same(args, state, trainer)
        trainer.restore(state)
    with tqdm(total=trainer.recipe.updates, initial=trainer.update, unit="update", disable=None) as bar:
        while trainer.update < trainer.recipe.updates:
            trainer.run(store, _SAVE_EVERY_UPDATES, lambda loss: bar.update())
            save_progress(args.out, trainer, {"given": _given(args), "units": _units(trainer)})
            bar.set_postfix_str(f"loss {trainer.losses[-1]:.4f}")
    epochs = round(trainer.update * args.batch * args.window / max(steps[0], 1))
    _finish(args, trainer, store, validation, processors, epochs)


def _split(
    args: argparse.Namespace, episodes: list[TrainingEpisode]
) -> tuple[list[TrainingEpisode], list[TrainingEpisode]]:
    """Return what to train on and to validate on, never the same: by --steps, else every tenth episode or the last."""
    if args.steps is None and args.validate_steps is None:
        if len(episodes) < 2:
            steps = len(episodes[0].frames)
            raise MobileVlaError(
                f"{args.episodes} holds one episode of {steps} step{'s' * (steps != 1)}, expected more, or which steps "
                f"of it are for what; {_split_advice(episodes)}"
            )
        tenths = range(9, len(episodes), 10) or range(len(episodes) - 1, len(episodes))
        return [e for i, e in enumerate(episodes) if i not in tenths], [episodes[i] for i in tenths]
    if args.steps is None or args.validate_steps is None:
        given, missing = ("--steps", "--validate-steps") if args.steps else ("--validate-steps", "--steps")
        advice = _split_advice(episodes, args.steps, args.validate_steps)
        raise MobileVlaError(f"{given} is given without {missing}, expected both; {advice}")
    first, end = max(args.steps[0], args.validate_steps[0]), min(args.steps[1], args.validate_steps[1])
    if first < end:
        raise MobileVlaError(
            f"--steps and --validate-steps both name {first}:{end}, expected to validate on what isn't trained on; "
            f"{_split_advice(episodes)}"
        )
    parts = []
    for name, (first, end) in (("--steps", args.steps), ("--validate-steps", args.validate_steps)):
        short = [episode for episode in episodes if len(episode.frames) < end]
        if short:
            raise MobileVlaError(
                f"{name} is {first}:{end}, but {short[0].where} has {len(short[0].frames)} steps, expected {end} or "
                f"more; {_split_advice(episodes)}"
            )
        parts.append([episode.steps(first, end) for episode in episodes])
    return parts[0], parts[1]


def _split_advice(
    episodes: list[TrainingEpisode], train: tuple[int, int] | None = None, validate: tuple[int, int] | None = None
) -> str:
    """Say how to split episodes by --steps and --validate-steps, with numbers that every one of them has.

    Args:
        episodes: at least one.
        train: steps that are given to train on already, where they can stay.
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
    return f"give both, such as --steps {train[0]}:{train[1]} --validate-steps {validate[0]}:{validate[1]}"


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
    plain = {name: value for name, value in vars(args).items() if name not in ("run", "resume", "workers", "force")}
    return {name: value.name if isinstance(value, Path) else value for name, value in plain.items()}


def _check_same(args: argparse.Namespace, state: dict[str, Any], trainer: Trainer) -> None:
    """Raise MobileVlaError where a training would go on with other options than it began with."""
    before, now = state["given"], _given(args)
    different = sorted(name for name in now if before.get(name) != now[name])
    if different:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in different)
        raise MobileVlaError(f"{named} differs from what the training began with, expected the same; correct it")
    units = _units(trainer)
    if state.get("units", units) != units:
        raise MobileVlaError(
            f"the episodes give the step period and scale {units}, but the training began with {state['units']}, "
            "expected the same episodes; leave out --resume"
        )


def _units(trainer: Trainer) -> list[float]:
    """Return what the weights mean: step period and scale."""
    settings = trainer.network.model.settings
    return [settings.step_period_s, *settings.action_scale]


def _steps(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text} is no range of steps such as 0:500")
    return int(first), int(end)


def _scale(text: str) -> tuple[float, ...]:
    return tuple(positive_number(part) for part in text.split(","))


def _axes(text: str) -> tuple[str, ...]:
    axes = tuple(text.split(","))
    if not set(axes) <= set(AXES) or len(set(axes)) < len(axes):
        raise argparse.ArgumentTypeError(f"{text} names other than {', '.join(AXES)}, each once")
    return axes


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 <= share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is no share, expected 0 to 1")
    return share
