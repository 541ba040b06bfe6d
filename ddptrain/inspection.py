"""The commands that look at runs that are there. None of them imports torch before it has to."""

from __future__ import annotations

import argparse

from ddptrain.config import Config
from ddptrain.errors import EXIT_COMPLETED, EXIT_FAILED
from ddptrain.run_directory import RunDirectory


def _stored(parsed: argparse.Namespace) -> tuple[RunDirectory, Config]:
    """The run that was named and its config, read before anything slow is imported."""
    run = RunDirectory(parsed.run)
    return run, run.load()


def evaluate(parsed: argparse.Namespace) -> int:
    run, config = _stored(parsed)
    from ddptrain.launch.inspect import evaluate

    return evaluate(run, config, parsed.checkpoint, parsed.last, parsed.split)


def export(parsed: argparse.Namespace) -> int:
    run, config = _stored(parsed)
    from ddptrain.launch.inspect import export

    return export(run, config, parsed.checkpoint, parsed.last, parsed.output)


def sample(parsed: argparse.Namespace) -> int:
    run, config = _stored(parsed)
    from ddptrain.launch.inspect import sample

    return sample(run, config, parsed.checkpoint, parsed.last, parsed.prompt, parsed.length)


def explain(parsed: argparse.Namespace) -> int:
    run, config = _stored(parsed)
    from ddptrain.explain.command import explain

    wanted = parsed.split, parsed.method, parsed.samples, parsed.steps, parsed.output
    return explain(run, config, parsed.checkpoint, parsed.last, *wanted)


def replay(parsed: argparse.Namespace) -> int:
    run, config = _stored(parsed)
    from ddptrain.launch.replay import replay

    return replay(run, config, parsed.step)


def diff(parsed: argparse.Namespace) -> int:
    from ddptrain.observe.difference import circumstances, compare

    runs = RunDirectory(parsed.run), RunDirectory(parsed.other)
    for line in circumstances(*runs):
        print(line)
    same, told = compare(*runs)
    print(told)
    return EXIT_COMPLETED if same else EXIT_FAILED


def compare(parsed: argparse.Namespace) -> int:
    from ddptrain.observe.compare_folder import compare

    return compare(parsed.runs, parsed.output)
