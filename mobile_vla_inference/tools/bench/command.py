"""`mobile_vla bench`: measure loading, a policy step, the running node and its stop, on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.tools.arguments import check_output
from mobile_vla_inference.tools.bench import load, node, step, stop

EXIT_FAILED = 1

#: Name -> a module with HELP, add_arguments(parser), INPUTS (the options that name what is read), measure(args) (which
#: returns a JSON-ready report), print_report(report) and passed(report).
BENCHES = {"load": load, "node": node, "step": step, "stop": stop}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be measured, each with its own arguments."""
    subparsers = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    for name, bench in BENCHES.items():
        subparser = subparsers.add_parser(name, help=bench.HELP, description=bench.HELP)
        bench.add_arguments(subparser)
        subparser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
        subparser.set_defaults(bench=bench)


def run(args: argparse.Namespace) -> int:
    """Measure and print; return 0 if the benchmark passed, else 1.

    Raises:
        MobileVlaError: an option can't be used, or nothing could be measured.
    """
    check_output(args.json, *(getattr(args, name) for name in args.bench.INPUTS))
    report = args.bench.measure(args)
    args.bench.print_report(report)
    if args.json is not None:
        write_text_atomically(args.json, json.dumps(report, indent=2) + "\n")
    return 0 if args.bench.passed(report) else EXIT_FAILED
