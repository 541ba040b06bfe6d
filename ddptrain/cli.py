"""The commands. None of them imports torch before it has to."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path

import yaml

from ddptrain.compose import compose, flatten, make_importable, options, to_plain
from ddptrain.config import Config, Resume, check_world_size
from ddptrain.errors import EXIT_COMPLETED, EXIT_FAILED, Refused, TrainingError
from ddptrain.observe.phases import Phases
from ddptrain.origin import origin
from ddptrain.parent import end_with_parent
from ddptrain.place import Place
from ddptrain.remembered import compose_once
from ddptrain.resilience.failure import is_first_to_say, tell_agent
from ddptrain.resilience.preemption import StopRequest
from ddptrain.resilience.stopped import end_if_stopped
from ddptrain.run_directory import RunDirectory, changes, check_directory, open_directory


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code. Overrides without a command train as one rank."""
    given = sys.argv[1:] if arguments is None else arguments
    is_command = bool(given) and (given[0] in COMMANDS or given[0].startswith("-"))
    make_importable()
    try:
        if not is_command:
            _refuse_unknown_command(given)
            given = ["rank", *given]
        parsed = _parse(given)
        return COMMANDS[parsed.command](parsed)
    except TrainingError as error:
        line = f"ddptrain: {error}"
        if is_first_to_say():
            print(line, file=sys.stderr, flush=True)
        tell_agent(line)
        return error.exit_code


def _refuse_unknown_command(given: list[str]) -> None:
    """Overrides may stand without a command; a word without a value is none."""
    if given and given[0].isidentifier():
        close = get_close_matches(given[0], COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        raise Refused(f"unknown command {given[0]}; {hint}")


def _parse(given: list[str]) -> argparse.Namespace:
    """Parse a command line on which overrides may stand before and after options."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(given)
    if rest and (not hasattr(parsed, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddptrain",
        description="Distributed data-parallel training: a run is a pure function of its config.",
        epilog="experiments: " + ", ".join(options("experiment")) + "; keys and their meaning: "
        "`ddptrain config experiment=…` and the files in conf/. Under torchrun: "
        "torchrun --standalone --nproc-per-node 2 -m ddptrain experiment=digits",
    )
    parser.add_argument("--version", action="version", version=f"ddptrain {version('ddptrain')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, summary: str | None, *, run: bool) -> argparse.ArgumentParser:
        command = (
            commands.add_parser(name, description=summary, help=summary)
            if summary
            else commands.add_parser(name)  # internal: not in the list of commands
        )
        if run:
            command.add_argument("run", type=Path, help="a run's directory")
        else:
            command.add_argument(
                "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides"
            )
        return command

    train = add("train", "compose a config, start its ranks here, train", run=False)
    train.add_argument("-m", "--multirun", action="store_true", help="a trial per combination")
    verify = add("verify", "test that ranks, resumes and workers change nothing", run=False)
    verify.add_argument("--steps", type=int, default=3, metavar="N", help="steps to compare: 3")
    add("config", "print the composed, checked config; train nothing", run=False)
    add("rerun", "train a run's stored config again, in a new directory", run=True)
    evaluate = add("evaluate", "the metrics of a run's checkpoint over a split", run=True)
    evaluate.add_argument("--split", choices=("train", "val", "test"), help="default: test, or val")
    export = add("export", "write a run's weights to one safetensors file", run=True)
    export.add_argument("--output", type=Path, help="default: RUN/model.safetensors")
    sample = add("sample", "text from a run's language model", run=True)
    sample.add_argument("--prompt", default="def ", help="text to continue")
    sample.add_argument("--length", type=int, default=400, help="bytes to add")
    for command in (evaluate, export, sample):
        command.add_argument(
            "--checkpoint", default="latest", metavar="WHICH", help="latest, best, or a step"
        )
    diff = add("diff", "where two runs parted, and what differed first", run=True)
    diff.add_argument("other", type=Path, metavar="run", help="another run's directory")
    add("rank", None, run=False)
    add("worker", None, run=True).add_argument("--again", action="store_true")
    commands.add_parser("verify-rank").add_argument("folder", type=Path)
    return parser


def _listen(place: Place) -> StopRequest:
    """Heed signals from the first moment on; the agent's end is one, too."""
    stop_request = StopRequest(place)
    stop_request.listen()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)
    return stop_request


def _refuse_under_torchrun(command: str) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise Refused(
            f"`{command}` starts ranks itself, but torchrun has started this one: "
            "torchrun … -m ddptrain KEY=VALUE … trains without it"
        )


def _train(parsed: argparse.Namespace) -> int:
    _refuse_under_torchrun("train")
    if parsed.multirun:
        from ddptrain.launch.sweep import sweep

        return sweep(parsed.overrides)
    return _start(compose(parsed.overrides), parsed.overrides)


def _start(config: Config, overrides: list[str], rerun_of: str | None = None) -> int:
    """Start the ranks of one run on this machine and wait for them."""
    phases = Phases()
    check_directory(config)
    if config.launch.nproc_per_node != "auto":
        check_world_size(config, int(config.launch.nproc_per_node))
    from ddptrain.launch.local import count_ranks, launch_ranks

    ranks = count_ranks(config)
    check_world_size(config, ranks)
    run = open_directory(config, overrides, rerun_of)
    if ranks == 1 and not config.launch.max_restarts:
        from ddptrain.launch.worker import run_rank

        stop_request = _listen(Place())
        return run_rank(config, Place(), phases, overrides=overrides, stop_request=stop_request)
    run.launched.write_text(yaml.safe_dump(to_plain(config)))
    return launch_ranks(run, config, ranks)


def _rank(parsed: argparse.Namespace) -> int:
    """Be one rank, under torchrun or alone."""
    phases = Phases()
    place = Place.from_environment()
    stop_request = _listen(place)
    config = compose_once(parsed.overrides, place)
    check_world_size(config, place.world_size)
    end_if_stopped(config.resilience.hang_seconds)
    # A start after a node was lost counts as the first: whether it is, the agents' store tells.
    if place.rank == 0 and place.restarts == 0 and config.run.resume is not Resume.never:
        check_directory(config)
    from ddptrain.launch.worker import run_rank

    overrides = parsed.overrides
    return run_rank(config, place, phases, overrides=overrides, stop_request=stop_request)


def _worker(parsed: argparse.Namespace) -> int:
    """Be one rank that ``ddptrain train`` has started."""
    phases = Phases()
    place = Place.from_environment()
    stop_request = _listen(place)
    config = RunDirectory(parsed.run).load_launched()
    if parsed.again:
        config.run.resume = Resume.auto
    end_if_stopped(config.resilience.hang_seconds)
    from ddptrain.launch.worker import run_rank

    return run_rank(
        config, place, phases, overrides=[], stop_request=stop_request, errors_on_screen=False
    )


def _verify(parsed: argparse.Namespace) -> int:
    _refuse_under_torchrun("verify")
    if parsed.steps < 1:
        raise Refused(f"--steps {parsed.steps}: expected a number above 0")
    config = compose(parsed.overrides)
    micro_batches = config.train.global_batch_size // config.train.micro_batch_size
    from ddptrain.verify.command import verify

    return verify(config, list(range(1, min(3, micro_batches) + 1)), parsed.steps)


def _verify_rank(parsed: argparse.Namespace) -> int:
    """Be one rank that ``ddptrain verify`` has started."""
    end_with_parent()
    from ddptrain.verify.rank import verify_rank

    return verify_rank(parsed.folder)


def _config(parsed: argparse.Namespace) -> int:
    print(yaml.safe_dump(to_plain(compose(parsed.overrides)), sort_keys=False), end="")
    return EXIT_COMPLETED


def _rerun(parsed: argparse.Namespace) -> int:
    _refuse_under_torchrun("rerun")
    run = RunDirectory(parsed.run.absolute())
    config, provenance = run.load(), run.provenance()
    now = origin()
    then = {key: provenance.get(key, {}) for key in now}
    different = changes(flatten(then), flatten(now))
    print(f"repeating {run.path}")
    if now["git_commit"] is None:
        different.append("the folder is in no git repository: what differs in code cannot be told")
    for change in different or ["the code and versions are the same"]:
        print(f"  {change}")
    config.run.dir = config.checkpoint.dir = None
    config.run.resume = Resume.auto
    before = run.outcome()
    if config.launch.nproc_per_node == "auto" and before:
        config.launch.nproc_per_node = str(before["world_size"])  # which torchrun had chosen
    code = _start(config, provenance.get("overrides", []), rerun_of=str(run.path))
    again = RunDirectory(Path(str(config.run.dir)))
    if code == EXIT_COMPLETED and before:
        if again.outcome()["weights_sha256"] == before["weights_sha256"]:
            print(f"weights      the same bits as {run.path}")
        else:
            print(f"weights      not those of {run.path}: ddptrain diff {run.path} {again.path}")
    return code


def _stored(parsed: argparse.Namespace) -> tuple[RunDirectory, Config]:
    """The run that was named and its config, read before anything slow is imported."""
    run = RunDirectory(parsed.run)
    return run, run.load()


def _evaluate(parsed: argparse.Namespace) -> int:
    run, config = _stored(parsed)
    from ddptrain.launch.inspect import evaluate

    return evaluate(run, config, parsed.checkpoint, parsed.split)


def _export(parsed: argparse.Namespace) -> int:
    run, config = _stored(parsed)
    from ddptrain.launch.inspect import export

    return export(run, config, parsed.checkpoint, parsed.output)


def _sample(parsed: argparse.Namespace) -> int:
    run, config = _stored(parsed)
    from ddptrain.launch.inspect import sample

    return sample(run, config, parsed.checkpoint, parsed.prompt, parsed.length)


def _diff(parsed: argparse.Namespace) -> int:
    from ddptrain.observe.difference import circumstances, compare

    runs = RunDirectory(parsed.run), RunDirectory(parsed.other)
    for line in circumstances(*runs):
        print(line)
    same, told = compare(*runs)
    print(told)
    return EXIT_COMPLETED if same else EXIT_FAILED


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "config": _config,
    "rerun": _rerun,
    "evaluate": _evaluate,
    "export": _export,
    "sample": _sample,
    "diff": _diff,
    "rank": _rank,
    "worker": _worker,
    "verify": _verify,
    "verify-rank": _verify_rank,
}
