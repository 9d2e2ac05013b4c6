"""`mobile_vla make-episodes`: record episodes in simulation; each step is labelled with the expert action."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.sim.phrases import training_sentences
from mobile_vla_inference.sim.scenarios import EVALUATION_SEEDS_FROM
from mobile_vla_inference.tools.arguments import check_output, count, whole_number
from mobile_vla_inference.tools.progress import progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("out", type=Path, metavar="OUT.h5", help="file to write, with a group for each episode")
    parser.add_argument("--episodes", type=count, default=64, metavar="N", help="number of episodes")
    parser.add_argument("--seed", type=whole_number, default=0, metavar="N", help="seed of the first world")
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="CK",
        help="checkpoint that drives while the expert labels (default: the expert drives)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="number of processes")


def run(args: argparse.Namespace) -> int:
    """Record the episodes; return the exit status."""
    from mobile_vla_inference.policy.storage.checkpoint_files import find_processors
    from mobile_vla_inference.policy.synthetic.processors import write_processors
    from mobile_vla_inference.training.dataset import write_training_episodes
    from mobile_vla_inference.training.network import loaded_model, starting_config
    from mobile_vla_inference.training.rollout import RecorderPool, draw_tasks

    check_output(args.out, args.policy, force=args.force)
    if args.seed > EVALUATION_SEEDS_FROM - args.episodes:
        raise MobileVlaError(
            f"--seed is {args.seed}, expected 0 to {EVALUATION_SEEDS_FROM - args.episodes}: the worlds from "
            f"{EVALUATION_SEEDS_FROM} on are for evaluation; choose another seed"
        )
    tasks = draw_tasks(args.episodes, args.seed, expert_drives=args.policy is None)
    with tempfile.TemporaryDirectory() as folder:
        if args.policy is None:
            model, processors = None, Path(folder)
            config, settings = starting_config("world")
            write_processors(processors, config, training_sentences())
        else:
            model, processors = loaded_model(args.policy), find_processors(args.policy)
            config, settings = model.config, model.settings
        with RecorderPool(config, settings, processors, args.workers) as pool:
            recording = pool.start(tasks, model, memory=True)
            with progress_bar("recording", "episode", len(tasks)) as bar:
                episodes = []
                for batch in recording:
                    episodes += batch
                    bar.update(len(batch))
    write_training_episodes(args.out, episodes)
    steps = sum(len(episode.frames) for episode in episodes)
    ends = ", ".join(f"{number} {name}" for name, number in Counter(each.outcome for each in episodes).most_common())
    print(f"{args.out}: {len(episodes)} episodes, {steps} steps ({ends})")
    return 0
