"""`mobile_vla drive`: let a policy drive in the simulated world, and count how often it follows its instruction."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobile_vla_inference import __version__
from mobile_vla_inference.action import ActionMapping, VelocityCommand
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.policy_facts import PolicyFacts
from mobile_vla_inference.sim.closed_loop import (
    CAMERAS,
    EpisodeResult,
    EpisodeTask,
    drive_episode,
    summarize,
    summarize_by_scenario,
)
from mobile_vla_inference.sim.phrases import instruction
from mobile_vla_inference.sim.scenarios import EVALUATION_SEEDS_FROM, SCENARIOS, other_side
from mobile_vla_inference.sim.world import BASES, MAX_ANGULAR_RADPS, MAX_LINEAR_MPS
from mobile_vla_inference.tools.arguments import (
    SMALL_POLICY,
    VIDEO_OUTPUT,
    add_json_argument,
    add_loading_arguments,
    check_distinct,
    check_output,
    count,
    node_loading_parameters,
)
from mobile_vla_inference.tools.progress import progress_bar
from mobile_vla_inference.tools.results import warn, write_json

if TYPE_CHECKING:
    from tqdm import tqdm

    from mobile_vla_inference.policy.vla_policy import VlaPolicy

DRIVERS = ("policy", "misled", "random", "expert")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=SMALL_POLICY,
        metavar="CK",
        help="checkpoint file or folder (default: the bundled small policy)",
    )
    parser.add_argument("--episodes", type=count, default=40, metavar="N", help="number of episodes")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="number of the first evaluation world; training uses none of these worlds",
    )
    parser.add_argument("--scenario", choices=SCENARIOS, help="only this scenario (default: all in turn)")
    parser.add_argument(
        "--driver",
        choices=DRIVERS,
        default="policy",
        help="what drives: 'policy', or for comparison 'misled' (the policy, with a random side in the "
        "instruction), 'random' (random commands), 'expert' (knows the map)",
    )
    parser.add_argument("--no-memory", action="store_true", help="reset the LSTM state each step (ablation)")
    parser.add_argument(
        "--swap-instruction",
        action="store_true",
        help="the same worlds, with the instruction to pass on the other side",
    )
    parser.add_argument(
        "--unseen-phrasing", action="store_true", help="instructions with phrasings that training never used"
    )
    parser.add_argument("--language", choices=("en", "ko"), help="language of the instructions (default: both)")
    parser.add_argument(
        "--camera",
        choices=CAMERAS,
        default="on",
        help="on; frozen: repeat the first image; black: images without light (default: on)",
    )
    parser.add_argument(
        "--base", choices=BASES, default="differential", help="drive type of the robot (default: differential)"
    )
    parser.add_argument(
        "--ros", action="store_true", help="drive through the real vla_node and sim_robot, over topics and in real time"
    )
    add_json_argument(parser, "figures and every episode")
    parser.add_argument(
        "--video",
        type=Path,
        metavar="OUT.mp4",
        help="write a video: camera, map, instruction, command, time, outcome",
    )
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Drive the episodes; return the exit status."""
    check_output(args.json, args.checkpoint, args.processors)
    check_output(args.video, args.checkpoint, args.processors, kind=VIDEO_OUTPUT)
    check_distinct(args.json, args.video)
    if args.seed < 0:
        raise MobileVlaError(
            f"--seed is {args.seed}, expected 0 or more: world 0 is the first one for evaluation; choose another"
        )
    results, facts = _drive_through_node(args) if args.ros else _drive_in_process(args)
    write_json(args.json, _report(args, facts, results))
    _print_table(results, args.video)
    return 0


class PolicyDriver:
    """A policy as the robot's node runs it, without the node: one step for each image."""

    def __init__(self, policy: VlaPolicy, keeps_memory: bool = True) -> None:
        settings = policy.settings
        self._policy = policy
        self._keeps_memory = keeps_memory
        self._mapping = ActionMapping.of(settings)

    def begin(self, instruction: str) -> None:
        """Clear the LSTM state, and follow an instruction."""
        self._policy.set_instruction(instruction)
        self._policy.reset()

    def drive(self, frame: np.ndarray) -> VelocityCommand:
        """Return the command for an image."""
        if not self._keeps_memory:
            self._policy.reset()
        return self._mapping.velocity(self._policy.step(frame).values)


class RandomDriver:
    """Random commands, each axis over the whole range of the base."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._episodes = 0

    def begin(self, instruction: str) -> None:
        """Start the next sequence of random numbers."""
        self._rng = np.random.default_rng([self._seed, self._episodes])
        self._episodes += 1

    def drive(self, frame: np.ndarray) -> VelocityCommand:
        """Return a random command."""
        x, z = self._rng.uniform((0.0, -MAX_ANGULAR_RADPS), (MAX_LINEAR_MPS, MAX_ANGULAR_RADPS))
        return VelocityCommand(float(x), 0.0, float(z))


def tasks(args: argparse.Namespace) -> list[EpisodeTask]:
    """Return the episodes that the options ask for."""
    phrasing = "unseen" if args.unseen_phrasing else "training"
    chosen = []
    for index in range(args.episodes):
        seed = EVALUATION_SEEDS_FROM + args.seed + index
        scenario = args.scenario or SCENARIOS[index % len(SCENARIOS)]
        if args.swap_instruction:
            scenario = other_side(scenario)
        instructed = scenario
        if args.driver == "misled" and np.random.default_rng([seed, 6]).integers(2):
            instructed = other_side(scenario)
        chosen.append(EpisodeTask(scenario, seed, instruction(instructed, seed, phrasing, args.language)))
    return chosen


def _drive_through_node(args: argparse.Namespace) -> tuple[list[EpisodeResult], PolicyFacts]:
    """Drive the episodes through the real node; return their results, and the facts of the policy."""
    from mobile_vla_inference.policy.facts import policy_facts_of_node
    from mobile_vla_inference.tools.drive_node import node_driver

    _check_ros_options(args)
    chosen = tasks(args)
    results = []
    loading = node_loading_parameters(args)
    with (
        node_driver(args.checkpoint, args.base, chosen[0], loading) as driver,
        progress_bar("driving", "episode", len(chosen)) as bar,
    ):
        for task in chosen:
            results.append(driver.drive(task))
            _show(bar, results)
        return results, policy_facts_of_node(args.checkpoint, driver.facts)


def _check_ros_options(args: argparse.Namespace) -> None:
    """Raise MobileVlaError where an option is given that works without the node only."""
    in_process_only = {
        "--driver": args.driver not in ("policy", "misled"),
        "--no-memory": args.no_memory,
        "--camera": args.camera != "on",
        "--video": args.video is not None,
    }
    given = [option for option, is_given in in_process_only.items() if is_given]
    if given:
        raise MobileVlaError(f"{given[0]} does not work with --ros, expected one of the two; leave one out")


def _drive_in_process(args: argparse.Namespace) -> tuple[list[EpisodeResult], PolicyFacts]:
    """Drive the episodes without the node; return their results, and the facts of the policy."""
    from mobile_vla_inference.sim.renderer import Renderer
    from mobile_vla_inference.sim.video import open_video
    from mobile_vla_inference.tools.loading import load_policy

    policy = load_policy(args, args.checkpoint)
    warn(*policy.describe().warnings)
    drivers = {"expert": None, "random": RandomDriver(args.seed)}
    driver = drivers[args.driver] if args.driver in drivers else PolicyDriver(policy, not args.no_memory)
    renderer = Renderer()
    chosen = tasks(args)
    results = []
    with (
        open_video(args.video, policy.settings.step_period_s) as video,
        progress_bar("driving", "episode", len(chosen)) as bar,
    ):
        for task in chosen:
            result = drive_episode(
                task,
                driver,
                renderer,
                period_s=policy.settings.step_period_s,
                base=args.base,
                camera=args.camera,
                watcher=None if video is None else video.watcher(task.instruction),
            )
            results.append(result)
            _show(bar, results)
    renderer.close()
    return results, policy.describe()


def _show(bar: tqdm, results: list[EpisodeResult]) -> None:
    """Count an episode, and show the success rate so far."""
    bar.set_postfix_str(f"{summarize(results)['success_rate']:.0%} success", refresh=False)
    bar.update()


def _report(args: argparse.Namespace, facts: PolicyFacts, results: list[EpisodeResult]) -> dict[str, Any]:
    return {
        "version": __version__,
        "checkpoint": str(args.checkpoint),
        "dtype": facts.dtype,
        "quantization": facts.quantization,
        "ros": args.ros,
        "seed": args.seed,
        "driver": args.driver,
        "memory": not args.no_memory,
        "swapped": args.swap_instruction,
        "phrasing": "unseen" if args.unseen_phrasing else "training",
        "camera": args.camera,
        "base": args.base,
        **summarize(results),
        "scenarios": summarize_by_scenario(results),
        "results": [vars(result) for result in results],
    }


def _print_table(results: list[EpisodeResult], video: Path | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("scenario", no_wrap=True)
    for name in ("episodes", "success", "95 %", "wrong side", "collision", "timeout", "path"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, figures in summarize_by_scenario(results).items():
        table.add_row(*_row(name, figures))
    table.add_section()
    table.add_row(*_row("all", summarize(results)))
    console = Console()
    console.print(table)
    console.print(
        "95 %: confidence interval of success; path: length over that of the expert, where it succeeds", highlight=False
    )
    if video is not None:
        console.print(f"video: {video}", highlight=False, markup=False, soft_wrap=True)


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    low, high = figures["interval_95"]
    ratio = figures["path_ratio"]
    return [
        name,
        str(figures["episodes"]),
        f"{figures['success_rate']:.1%}",
        f"{100 * low:.0f} to {100 * high:.0f}",
        *(f"{figures[key]:.1%}" for key in ("wrong_side_rate", "collision_rate", "timeout_rate")),
        "-" if ratio is None else f"{ratio:.2f}",
    ]
