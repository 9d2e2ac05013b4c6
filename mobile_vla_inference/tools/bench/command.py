"""`mobile_vla bench`: figures of loading, of stepping, of the running node and of its stop, measured here and now."""

from __future__ import annotations

import argparse

from mobile_vla_inference.tools.bench import load as bench_load
from mobile_vla_inference.tools.bench import node as bench_node
from mobile_vla_inference.tools.bench import step as bench_step
from mobile_vla_inference.tools.bench import stop as bench_stop

HELP = "measure loading, a policy step, the running node and how it stops"

#: What is measured -> the module that does; each has HELP, add_arguments and run, as a tool has.
BENCHES = {
    "load": bench_load,
    "node": bench_node,
    "step": bench_step,
    "stop": bench_stop,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be measured, each with arguments of its own."""
    subparsers = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    for name, bench in BENCHES.items():
        subparser = subparsers.add_parser(name, help=bench.HELP, description=bench.HELP)
        bench.add_arguments(subparser)
        subparser.set_defaults(run_bench=bench.run)


def run(args: argparse.Namespace) -> int:
    """Measure; return the exit status."""
    return args.run_bench(args)
