"""The commands. None of them imports torch before it has to."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path

import yaml

from ddptrain import inspection
from ddptrain.command_line import parse
from ddptrain.compose import compose
from ddptrain.config import Config, Resume, to_plain
from ddptrain.errors import EXIT_COMPLETED, EXIT_FAILED, Refused, TrainingError
from ddptrain.observe.phases import Phases
from ddptrain.parent import end_with_parent
from ddptrain.place import Place
from ddptrain.remembered import LAUNCHED, compose_once
from ddptrain.resilience.failure import is_first_to_say, may_pass, tell_agent
from ddptrain.resilience.preemption import listen
from ddptrain.resilience.stopped import end_if_stopped
from ddptrain.rules import check_world_size
from ddptrain.run_directory import RunDirectory, check_launch
from ddptrain.screen import say
from ddptrain.snapshot import make_importable

OPTIONS = ("-h", "--help", "--version")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code. Overrides without a command train as one rank."""
    given = sys.argv[1:] if arguments is None else arguments
    is_command = bool(given) and given[0] in (*COMMANDS, *OPTIONS)
    make_importable()
    try:
        if not is_command:
            _refuse_unknown_command(given)
            given = ["rank", *given]
        parsed = parse(given)
        return COMMANDS[parsed.command](parsed)
    except TrainingError as error:
        if is_first_to_say():
            say(f"ddptrain: {error}", sys.stderr)
        tell_agent(f"ddptrain: {error}", may_pass=may_pass(error))
        return error.exit_code
    except KeyboardInterrupt:
        if is_first_to_say():
            say("ddptrain: interrupted", sys.stderr)
        return EXIT_FAILED


def _refuse_unknown_command(given: list[str]) -> None:
    """Overrides may stand without a command; a word without a value is none."""
    if {"-m", "--multirun"} & set(given):
        raise Refused(
            "a sweep is `ddptrain train --multirun KEY=A,B …`, without torchrun: it starts the "
            "ranks of its trials itself"
        )
    if given and given[0].isidentifier():
        close = get_close_matches(given[0], COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        raise Refused(f"unknown command {given[0]}; {hint}")


def _refuse_under_torchrun(command: str) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise Refused(
            f"`{command}` starts ranks itself, but torchrun has started this one: "
            "torchrun … -m ddptrain KEY=VALUE … trains without it"
        )
    if os.environ.get("WORLD_SIZE", "1" if "RANK" not in os.environ else "") != "1":
        raise Refused(
            f"`{command}` starts ranks itself, but RANK or WORLD_SIZE is set, as for one of "
            "several: `python -m ddptrain KEY=VALUE …` is such a rank; or unset them"
        )


def _train(parsed: argparse.Namespace) -> int:
    _refuse_under_torchrun("train")
    if parsed.multirun:
        from ddptrain.launch.sweep import sweep

        return sweep(parsed.overrides)
    overrides = parsed.overrides
    if parsed.trial is not None:
        from ddptrain.launch.combinations import combination

        overrides = combination(overrides, parsed.trial)
    from ddptrain.launch.start import start

    return start(compose(overrides), overrides)


def _submit(parsed: argparse.Namespace) -> int:
    config = compose(parsed.overrides)
    check_launch(config)
    if config.launch.nproc_per_node != "auto":
        check_world_size(config, config.slurm.nodes * int(config.launch.nproc_per_node))
    from ddptrain.launch.submit import submit

    return submit(config, parsed.overrides, parsed.dry_run)


def _rank(parsed: argparse.Namespace) -> int:
    """Be one rank, under torchrun or alone."""
    phases = Phases()
    place = Place.from_environment()
    stop_request = listen(place)
    config = compose_once(parsed.overrides, place)
    check_world_size(config, place.world_size)
    end_if_stopped(config.resilience.hang_seconds)
    # A start after a node was lost counts as the first: whether it is, the agents' store tells.
    is_first = place.rank == 0 and place.restarts == 0 and LAUNCHED not in os.environ
    if is_first and config.run.resume is not Resume.never:
        check_launch(config)
    from ddptrain.launch.worker import run_rank

    overrides = parsed.overrides
    return run_rank(config, place, phases, overrides=overrides, stop_request=stop_request)


def _worker(parsed: argparse.Namespace) -> int:
    """Be one rank that ``ddptrain train`` has started."""
    phases = Phases()
    place = Place.from_environment()
    stop_request = listen(place)
    config = RunDirectory(parsed.run).load_launched()
    if parsed.again:
        config.run.resume = Resume.auto
    end_if_stopped(config.resilience.hang_seconds)
    from ddptrain.launch.worker import run_rank

    return run_rank(
        config, place, phases, overrides=[], stop_request=stop_request, errors_on_screen=False
    )


def _node(parsed: argparse.Namespace) -> int:
    """Be the agent of a node that `ddptrain train` has started through Slurm."""
    from ddptrain.launch.node import be_node

    return be_node(parsed.of_ranks)


def _verify(parsed: argparse.Namespace) -> int:
    _refuse_under_torchrun("verify")
    if parsed.steps < 1:
        raise Refused(f"--steps {parsed.steps}: expected a number above 0")
    config = compose(parsed.overrides)
    micro_batches = config.train.micro_batches() or 3
    from ddptrain.verify.command import verify

    return verify(config, list(range(1, min(3, micro_batches) + 1)), parsed.steps)


def _verify_rank(parsed: argparse.Namespace) -> int:
    """Be one rank that ``ddptrain verify`` has started."""
    end_with_parent()
    from ddptrain.verify.rank import verify_rank

    return verify_rank(parsed.folder)


def _join(parsed: argparse.Namespace) -> tuple[Config, Place] | int:
    """What a rank needs to run a command with the others; or the exit code of those started."""
    from ddptrain.launch.allocation import Allocation
    from ddptrain.launch.local import count_ranks, try_ranks
    from ddptrain.launch.slurm import try_on

    place = Place.from_environment()
    config = compose_once(parsed.overrides, place)
    if "RANK" not in os.environ:
        allocation = Allocation.here()
        if allocation is not None:
            return try_on(allocation, config, parsed.command)
        ranks = count_ranks(config)
        check_world_size(config, ranks)
        if ranks > 1:
            return try_ranks([parsed.command, *parsed.overrides], ranks)
    return config, place


def _on_all_ranks(name: str, parsed: argparse.Namespace) -> int:
    """Run what a module of ``launch`` does under its own name, on every rank of a launch."""
    joined = _join(parsed)
    if isinstance(joined, int):
        return joined
    return int(getattr(import_module(f"ddptrain.launch.{name}"), name)(*joined))


def _study(parsed: argparse.Namespace) -> int:
    from ddptrain.studies.command import study

    return study(parsed)


def _config(parsed: argparse.Namespace) -> int:
    print(yaml.safe_dump(to_plain(compose(parsed.overrides)), sort_keys=False), end="")
    return EXIT_COMPLETED


def _rerun(parsed: argparse.Namespace) -> int:
    _refuse_under_torchrun("rerun")
    from ddptrain.launch.start import start
    from ddptrain.observe.difference import since

    run = RunDirectory(parsed.run.absolute())
    config, provenance = run.load(), run.provenance()
    print(f"repeating {run.path}")
    for change in since(run) or ["the code and versions are the same"]:
        print(f"  {change}")
    config.run.dir = config.checkpoint.dir = None
    config.run.resume = Resume.auto
    before = run.outcome()
    if config.launch.nproc_per_node == "auto" and before:
        config.launch.nproc_per_node = str(before["world_size"])  # which torchrun had chosen
    code = start(config, provenance.get("overrides", []), rerun_of=str(run.path))
    again = RunDirectory(Path(str(config.run.dir)))
    if code == EXIT_COMPLETED and before:
        if again.outcome()["weights_sha256"] == before["weights_sha256"]:
            print(f"weights      the same bits as {run.path}")
        else:
            print(f"weights      not those of {run.path}: ddptrain diff {run.path} {again.path}")
    return code


def _init(parsed: argparse.Namespace) -> int:
    from ddptrain.project import new_project

    new_project(parsed.folder)
    return EXIT_COMPLETED


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "submit": _submit,
    "config": _config,
    "init": _init,
    "rerun": _rerun,
    "evaluate": inspection.evaluate,
    "export": inspection.export,
    "explain": inspection.explain,
    "sample": inspection.sample,
    "replay": inspection.replay,
    "diff": inspection.diff,
    "compare": inspection.compare,
    "rank": _rank,
    "worker": _worker,
    "node": _node,
    "verify": _verify,
    "verify-rank": _verify_rank,
    "doctor": partial(_on_all_ranks, "doctor"),
    "lr-find": partial(_on_all_ranks, "lr_find"),
    "batch-find": partial(_on_all_ranks, "batch_find"),
    "study": _study,
}
