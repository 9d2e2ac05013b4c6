"""`mobile_vla infer`: run a checkpoint on the numbered images of a folder, in order; print or write the actions."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_vla_inference import __version__
from mobile_vla_inference.action import ActionMapping, VelocityCommand
from mobile_vla_inference.frames import list_frames, read_image
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.tools.arguments import (
    add_checkpoint_argument,
    add_json_argument,
    add_loading_arguments,
    check_output,
    instruction,
)
from mobile_vla_inference.tools.loading import load_policy
from mobile_vla_inference.tools.progress import progress_bar
from mobile_vla_inference.tools.results import warn, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--instruction", type=instruction, required=True, metavar="TEXT", help="what the robot is instructed to do"
    )
    parser.add_argument(
        "--frames",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of images, in the numeric order of their names",
    )
    parser.add_argument("--reset-each", action="store_true", help="reset the LSTM state before each image")
    add_loading_arguments(parser)
    add_json_argument(parser, "actions and velocities")


def run(args: argparse.Namespace) -> int:
    """Run the policy on the images; return the exit status."""
    check_output(args.json, args.checkpoint, args.frames, args.processors)
    paths = list_frames(args.frames)
    policy = load_policy(args, args.checkpoint)
    warn(*policy.describe().warnings)
    policy.set_instruction(args.instruction)
    steps = _run_policy(policy, paths, args.reset_each)
    if args.json is None:
        _print_table(steps)
    else:
        write_json(args.json, _report(args, policy, steps))
    return 0


@dataclass(frozen=True)
class _Step:
    frame: str
    action: tuple[float, ...]
    velocity: VelocityCommand


def _run_policy(policy: VlaPolicy, paths: list[Path], reset_each: bool) -> list[_Step]:
    settings = policy.settings
    mapping = ActionMapping.of(settings)
    steps = []
    with progress_bar("inference", "image", len(paths)) as bar:
        for path in paths:
            if reset_each:
                policy.reset()
            action = policy.step(read_image(path)).values
            steps.append(_Step(path.name, action, mapping.velocity(action)))
            bar.update()
    return steps


def _report(args: argparse.Namespace, policy: VlaPolicy, steps: list[_Step]) -> dict[str, Any]:
    return {
        "version": __version__,
        "instruction": args.instruction,
        "reset_each": args.reset_each,
        "units": {"actions": "normalised", "velocities": ["m/s", "m/s", "rad/s"]},
        **policy.describe().to_json(),
        "frames": [step.frame for step in steps],
        "actions": [list(step.action) for step in steps],
        "velocities": [list(step.velocity.values) for step in steps],
    }


def _print_table(steps: list[_Step]) -> None:
    print(f"{'frame':<20} {'action (normalised)':<24} {'linear x, y (m/s)':<20} angular z (rad/s)")
    for step in steps:
        action = " ".join(f"{value:+.3f}" for value in step.action)
        x, y, z = step.velocity.values
        print(f"{step.frame:<20} {action:<24} {x:+.3f} {y:+.3f}{'':<8} {z:+.3f}")
