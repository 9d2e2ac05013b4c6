"""`mobile_vla train`: train a checkpoint on recorded episodes, or on a curriculum in simulation."""

from __future__ import annotations

import argparse
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
    add_processors_argument,
    check_absent,
    check_output,
    count,
    full_speeds,
    positive_number,
    share,
)
from mobile_vla_inference.tools.progress import progress_bar
from mobile_vla_inference.tools.results import warn
from mobile_vla_inference.training.agreement import (
    MAX_CLIPPED_SHARE,
    Agreement,
    Options,
    Start,
    agreed_settings,
    check_world,
)

if TYPE_CHECKING:
    from mobile_vla_inference.policy.storage.config import HybridConfig
    from mobile_vla_inference.policy.storage.settings import PolicySettings
    from mobile_vla_inference.training.dataset import TrainingEpisode
    from mobile_vla_inference.training.network import SequenceModel
    from mobile_vla_inference.training.session import Result, Setup
    from mobile_vla_inference.training.trainer import Recipe

WORLD = "world"
_SIZES = ("world", "tiny", "small")
_UPDATES = 2000
#: Rounds of training.curriculum.Curriculum, which imports torch: too slow for the help.
_ROUNDS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "episodes",
        metavar="EPISODES",
        help="HDF5 file or folder of them, or folder with images/ and actions.csv; "
        f"'{WORLD}': a curriculum in simulation, labelled with expert actions",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="CK.pth", help="checkpoint to write")
    parser.add_argument(
        "--init",
        default="world",
        metavar="SIZE|CK",
        help=f"start of the training: a size ({', '.join(_SIZES)}; world: that of the bundled policy) for random "
        "weights, or a checkpoint",
    )
    parser.add_argument(
        "--updates", type=count, metavar="N", help=f"optimizer steps (default: {_UPDATES}; fixed for '{WORLD}')"
    )
    parser.add_argument(
        "--rounds", type=count, metavar="N", help=f"rounds of the curriculum, for '{WORLD}' (default: {_ROUNDS})"
    )
    parser.add_argument("--batch", type=count, default=8, metavar="N", help="episodes per batch")
    parser.add_argument("--window", type=count, default=64, metavar="N", help="backpropagation window, steps")
    parser.add_argument("--learning-rate", type=positive_number, default=2e-3, metavar="R", help="peak learning rate")
    parser.add_argument(
        "--frozen-towers", action="store_true", help="train the feature fusion, recurrent network and action head only"
    )
    parser.add_argument("--no-memory", action="store_true", help="reset the LSTM state each step (ablation)")
    parser.add_argument(
        "--instruction",
        type=check_instruction,
        metavar="TEXT",
        help="instruction of every episode (default: as recorded)",
    )
    parser.add_argument(
        "--channel-order", choices=("rgb", "bgr"), default="rgb", help="channel order of the stored HDF5 images"
    )
    add_full_speed_arguments(parser)
    parser.add_argument(
        "--steps", type=_steps, metavar="A:B", help="train on steps A to B-1 of each episode (default: whole episodes)"
    )
    parser.add_argument(
        "--validate-steps",
        type=_steps,
        metavar="A:B",
        help="validate on steps A to B-1 of each episode (default: every tenth episode, or the last)",
    )
    parser.add_argument(
        "--step-period-s",
        type=positive_number,
        metavar="S",
        help="time between steps, seconds (default: from the stamps or the duration of the episodes)",
    )
    parser.add_argument(
        "--action-axes",
        type=_axes,
        metavar="AXIS,...",
        help=f"axes that the policy drives, of {', '.join(AXES)} (default: as in --init)",
    )
    parser.add_argument(
        "--action-scale",
        type=_scale,
        metavar="SPEED,...",
        help="m/s or rad/s per normalised unit, for each axis (default: as in the start checkpoint, or the "
        "fastest command in the episodes)",
    )
    parser.add_argument(
        "--max-clipped",
        type=share,
        metavar="SHARE",
        help=f"largest allowed share of samples beyond the scale of an axis, 0 to 1 (default: {MAX_CLIPPED_SHARE:g})",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and batches")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an existing checkpoint with its settings, processors, loss curve and training progress",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument(
        "--workers", type=count, default=1, metavar="N", help=f"processes that record episodes, for '{WORLD}'"
    )
    add_processors_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Train; return the exit status."""
    import torch

    from mobile_vla_inference.training.saving import training_path
    from mobile_vla_inference.training.split import split_episodes

    _check_outputs(args)
    if args.seed < 0:
        raise MobileVlaError(f"--seed is {args.seed}, expected 0 or more; choose another")
    if args.resume and not training_path(args.out).exists():
        raise MobileVlaError(
            f"{training_path(args.out)} doesn't exist, expected the progress of an interrupted training; leave "
            "out --resume"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise MobileVlaError(
            "--device is cuda, but torch finds no CUDA device, expected an NVIDIA GPU; use --device cpu"
        )
    config, start = _start(args)
    training, validating = [], []
    if args.episodes != WORLD:
        episodes = _episodes(args, config.image_size)
        training, validating = split_episodes(episodes, args.episodes, args.steps, args.validate_steps)
    agreement = _agreement(args, start, [*training, *validating])
    print(*agreement.notes, sep="\n")
    warn(*agreement.warnings)
    with tempfile.TemporaryDirectory() as folder:
        network, processors = _network(args, config, agreement.settings, Path(folder))
        if args.episodes == WORLD:
            result = _train_in_world(args, network, processors)
        else:
            result = _train_on_episodes(args, network, processors, training, validating)
    _print_result(args.out, result)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """Raise MobileVlaError if an input would be overwritten, or, without --force or --resume, any file."""
    from mobile_vla_inference.policy.storage.checkpoint_files import processor_places
    from mobile_vla_inference.training.saving import training_path, written_paths

    in_world = args.episodes == WORLD
    inputs = [None if in_world else Path(args.episodes), None if args.init in _SIZES else Path(args.init)]
    replaced = written_paths(args.out, in_world)
    for path in replaced:
        for each in filter(None, inputs):
            if path.exists() and (path.resolve() == each.resolve() or path.resolve() in each.resolve().parents):
                raise MobileVlaError(
                    f"--out {args.out} would overwrite {path}, a file that is read, expected another; choose one"
                )
    check_output(args.out, *inputs, force=args.force or args.resume)
    if args.force or args.resume:
        return
    if training_path(args.out).exists():
        raise MobileVlaError(
            f"{training_path(args.out)} contains the progress of an interrupted training, expected none; "
            "continue it with --resume, choose another name for --out, or give --force"
        )
    kept = args.processors or (None if args.init in _SIZES else processor_places(Path(args.init))[0])
    check_absent(*(path for path in replaced if kept is None or path.resolve() != kept.resolve()))


def _start(args: argparse.Namespace) -> tuple[HybridConfig, Start]:
    """Return the sizes of the network and what training starts from; of a checkpoint, only its index is read."""
    from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
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
            f"same; start from one of the sizes {', '.join(_SIZES)}"
        )
    if args.action_scale is not None and len(args.action_scale) != len(axes):
        raise MobileVlaError(
            f"--action-scale has {len(args.action_scale)} number{'s' * (len(args.action_scale) != 1)}, expected "
            f"{len(axes)}, one for each of {', '.join(axes)}; correct it"
        )
    return config, start


def _agreement(args: argparse.Namespace, start: Start, episodes: list[TrainingEpisode]) -> Agreement:
    """Return the settings of the trained policy, and what to print about them."""
    max_clipped = MAX_CLIPPED_SHARE if args.max_clipped is None else args.max_clipped
    options = Options(args.step_period_s, args.action_scale, args.action_axes is not None, max_clipped)
    return check_world(start, options) if args.episodes == WORLD else agreed_settings(episodes, start, options)


def _episodes(args: argparse.Namespace, side_px: int) -> list[TrainingEpisode]:
    """Read the episodes; print what the options replace."""
    from mobile_vla_inference.training.dataset import read_training_episodes

    is_table = (Path(args.episodes) / "actions.csv").is_file()
    if not is_table and (args.max_linear_mps or args.max_angular_radps):
        raise MobileVlaError(
            f"--max-linear-mps and --max-angular-radps are for a folder with actions.csv, but {args.episodes} contains "
            "m/s and rad/s already; leave them out"
        )
    speeds = full_speeds(args)
    episodes = read_training_episodes(
        args.episodes, side_px, args.instruction, channel_order=args.channel_order, full_speeds=speeds
    )
    if is_table:
        print(f"full throttle is {speeds[0]:g} m/s, full steering {speeds[1]:g} rad/s (--max-linear-mps, ...)")
    replaced = sum(each.recorded_instruction not in ("", each.instruction) for each in episodes)
    if replaced:
        warn(f"--instruction replaces the recorded instruction of {replaced} of {len(episodes)} episodes")
    return episodes


def _network(
    args: argparse.Namespace, config: HybridConfig, settings: PolicySettings, folder: Path
) -> tuple[SequenceModel, Path]:
    """Return the network to train, and the folder of its tokenizers, which is in `folder` if new ones are made."""
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


def _train_in_world(args: argparse.Namespace, network: SequenceModel, processors: Path) -> Result:
    """Train on the curriculum."""
    from mobile_vla_inference.training import curriculum
    from mobile_vla_inference.training.session import WorldTraining

    plan = curriculum.Curriculum() if args.rounds is None else curriculum.Curriculum(rounds=args.rounds)
    session = WorldTraining(_setup(args, network, processors, plan.updates), plan, args.workers)
    with progress_bar("training", "update", plan.updates, done=session.trainer.update) as bar:

        def round_done(number: int, loss: float, outcomes: Counter[str]) -> None:
            ends = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
            bar.write(f"round {number + 1} of {plan.rounds}: loss {loss:.4f}; new episodes ended with: {ends}")

        return session.run(lambda loss: bar.update(), round_done)


def _train_on_episodes(
    args: argparse.Namespace,
    network: SequenceModel,
    processors: Path,
    training: list[TrainingEpisode],
    validating: list[TrainingEpisode],
) -> Result:
    """Train on some episodes, validate on others."""
    from mobile_vla_inference.training.session import EpisodesTraining

    steps = [sum(len(episode.frames) for episode in part) for part in (training, validating)]
    print(f"steps: {steps[0]} to train on, {steps[1]} others to validate on")
    updates = args.updates or _UPDATES
    session = EpisodesTraining(_setup(args, network, processors, updates), training, validating)
    with progress_bar("training", "update", updates, done=session.trainer.update) as bar:

        def updated(loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()

        return session.run(updated)


def _setup(args: argparse.Namespace, network: SequenceModel, processors: Path, updates: int) -> Setup:
    from mobile_vla_inference.training.session import Setup

    return Setup(args.out, network, processors, _recipe(args, updates), _given(args), args.resume)


def _recipe(args: argparse.Namespace, updates: int) -> Recipe:
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


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options as plain values for the checkpoint; of paths, only the names."""
    plain = {name: value for name, value in vars(args).items() if name not in ("run", "resume", "workers", "force")}
    return {name: value.name if isinstance(value, Path) else value for name, value in plain.items()}


def _print_result(out: Path, result: Result) -> None:
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {result.updates} updates")
    print(f"validation MAE (normalised): {result.error:.4f}")
    for name, value in result.baselines.items():
        print(f"  {name}: {value:.4f}")


def _steps(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text} is not a range of steps A:B with A below B, such as 0:500")
    return int(first), int(end)


def _scale(text: str) -> tuple[float, ...]:
    return tuple(positive_number(part) for part in text.split(","))


def _axes(text: str) -> tuple[str, ...]:
    axes = tuple(text.split(","))
    if not set(axes) <= set(AXES) or len(set(axes)) < len(axes):
        raise argparse.ArgumentTypeError(f"{text} is not a list of axes from {', '.join(AXES)}, each at most once")
    return axes
