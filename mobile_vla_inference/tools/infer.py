"""`mobile_vla infer`: run a checkpoint over numbered images of a folder, in order, and print or write what it does."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_vla_inference import __version__
from mobile_vla_inference.action import ActionMapping, VelocityCommand
from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import InstructionError
from mobile_vla_inference.frames import list_frames, read_image
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.policy_facts import DEVICES, DTYPES, ENGINES
from mobile_vla_inference.tools.arguments import check_output

HELP = "run a checkpoint over a folder of images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CK", help="checkpoint file or folder")
    parser.add_argument(
        "--instruction", type=check_instruction, required=True, metavar="TEXT", help="what the robot is told, UTF-8"
    )
    parser.add_argument(
        "--frames", type=Path, required=True, metavar="DIR", help="folder of images, read in the order of their numbers"
    )
    parser.add_argument("--reset-each", action="store_true", help="clear the policy's state before every frame")
    parser.add_argument("--processors", type=Path, metavar="DIR", help="processor folder (default: by the checkpoint)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the weights (default auto)")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="how a step runs (default auto)")
    parser.add_argument("--force", action="store_true", help="load even where the memory seems too small")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the actions and velocities to this file")


def run(args: argparse.Namespace) -> int:
    """Run the policy over the frames; return the exit status."""
    if not check_instruction(args.instruction):
        raise InstructionError("--instruction is empty, expected a sentence such as 'go to the cup'; give one")
    check_output(args.json, args.checkpoint, args.frames, args.processors)
    paths = list_frames(args.frames)
    policy = VlaPolicy.load(
        args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        engine=args.engine,
        processors=args.processors,
        force=args.force,
    )
    for warning in policy.describe().warnings:
        print(f"mobile_vla: warning: {warning}", file=sys.stderr)
    policy.set_instruction(args.instruction)
    steps = _run_policy(policy, paths, args.reset_each)
    if args.json is None:
        _print_table(steps)
    else:
        text = json.dumps(_report(args, policy, steps), indent=2, ensure_ascii=False) + "\n"
        write_text_atomically(args.json, text)
    return 0


@dataclass(frozen=True)
class _Step:
    frame: str
    action: tuple[float, ...]
    velocity: VelocityCommand


def _run_policy(policy: VlaPolicy, paths: list[Path], reset_each: bool) -> list[_Step]:
    from tqdm import tqdm

    settings = policy.settings
    mapping = ActionMapping.of(settings)
    steps = []
    for path in tqdm(paths, unit="frame", delay=1, disable=None):
        if reset_each:
            policy.reset()
        action = policy.step(read_image(path)).values
        steps.append(_Step(path.name, action, mapping.velocity(action)))
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
