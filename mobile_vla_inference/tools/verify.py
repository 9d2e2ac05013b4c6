"""`mobile_vla verify`: compare every file of a converted folder with the hashes in it. No torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.checksums import verify_folder
from mobile_vla_inference.policy.storage.settings_file import SETTINGS_FILE, confirm_command
from mobile_vla_inference.tools.arguments import add_json_argument, check_output
from mobile_vla_inference.tools.progress import progress
from mobile_vla_inference.tools.results import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder written by mobile_vla convert")
    add_json_argument(parser, "names of good, bad, missing and extra files")


def run(args: argparse.Namespace) -> int:
    """Check the folder; return the exit status.

    Raises:
        CheckpointError: a file is bad, missing or extra; each such file has been printed.
    """
    check_output(args.json, args.folder)
    with progress(f"verifying {args.folder.name}", "B") as show:
        found = verify_folder(args.folder, show)
    problems = {"bad": found.bad, "missing": found.missing, "extra": found.extra}
    write_json(args.json, {"folder": str(args.folder), "passed": found.passed, "good": found.good, **problems})
    for problem, names in problems.items():
        for name in names:
            print(f"{problem:<8} {name}")
    if problems == {"bad": (SETTINGS_FILE,), "missing": (), "extra": ()}:
        raise CheckpointError(
            f"{args.folder / SETTINGS_FILE} was changed after it was confirmed, expected it unchanged; all other files "
            f"are good; if a person changed it, check the values and run {confirm_command(args.folder)}; otherwise "
            "copy it again"
        )
    if not found.passed:
        counts = ", ".join(f"{len(names)} {problem}" for problem, names in problems.items())
        raise CheckpointError(
            f"{args.folder} has {counts} of {len(found.good) + len(found.bad) + len(found.missing)} files, expected "
            f"every hash to match; copy the folder again or convert again"
        )
    print(f"{args.folder}: {len(found.good)} files match their hashes")
    return 0
