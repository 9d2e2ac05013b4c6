"""`mobile_vla bench`: measure loading, a policy step, the running node and its stop, on this machine."""

from __future__ import annotations

import argparse

from mobile_vla_inference.tools.arguments import add_json_argument, check_output
from mobile_vla_inference.tools.bench import load, node, step, stop
from mobile_vla_inference.tools.results import write_json

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
        add_json_argument(subparser, "figures")
        subparser.set_defaults(bench=bench)


def run(args: argparse.Namespace) -> int:
    """Measure and print; return 0 if the benchmark passed, else 1.

    Raises:
        MobileVlaError: an option can't be used, or nothing could be measured.
    """
    check_output(args.json, *(getattr(args, name) for name in args.bench.INPUTS))
    report = args.bench.measure(args)
    write_json(args.json, report)
    args.bench.print_report(report)
    return 0 if args.bench.passed(report) else EXIT_FAILED
