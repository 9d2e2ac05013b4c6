"""`mobile_vla verify`: compare every file of a converted folder with the hashes in it. No torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.checksums import verify_folder
from mobile_vla_inference.policy.storage.settings_file import SETTINGS_FILE, confirm_command
from mobile_vla_inference.tools.arguments import check_output

HELP = "check every file of a converted folder by its hash"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that convert wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the names of good, bad, missing, extra files")


def run(args: argparse.Namespace) -> int:
    """Check the folder; return the exit status.

    Raises:
        CheckpointError: a file is bad, missing or extra; every one of them has been printed.
    """
    check_output(args.json, args.folder)
    with tqdm(unit="B", unit_scale=True, desc=args.folder.name, delay=1, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = verify_folder(args.folder, show)
    problems = {"bad": found.bad, "missing": found.missing, "extra": found.extra}
    if args.json is not None:
        report = {"folder": str(args.folder), "passed": found.passed, "good": found.good, **problems}
        write_text_atomically(args.json, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    for problem, names in problems.items():
        for name in names:
            print(f"{problem:<8} {name}")
    if problems == {"bad": (SETTINGS_FILE,), "missing": (), "extra": ()}:
        raise CheckpointError(
            f"{args.folder / SETTINGS_FILE} was changed, expected as it was confirmed; all others are as converted; "
            f"if a person changed it, check the values and run {confirm_command(args.folder)}; otherwise copy it again"
        )
    if not found.passed:
        counts = ", ".join(f"{len(names)} {problem}" for problem, names in problems.items())
        raise CheckpointError(
            f"{args.folder} has {counts} of {len(found.good) + len(found.bad) + len(found.missing)} files, expected "
            f"each as it was converted; copy the folder again or convert again"
        )
    print(f"{args.folder}: {len(found.good)} files are as they were converted")
    return 0
