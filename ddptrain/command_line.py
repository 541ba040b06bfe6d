"""What can be typed: the commands and their options, as `--help` shows them."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

from ddptrain.compose import options

SPLITS = ("train", "val", "test")


def parse(given: list[str]) -> argparse.Namespace:
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
    of_grid = train.add_mutually_exclusive_group()
    of_grid.add_argument("-m", "--multirun", action="store_true", help="a trial per combination")
    of_grid.add_argument("--trial", type=int, metavar="N", help="combination N alone, from 0")
    submit = add("submit", "have Slurm train it, with the code as it is now", run=False)
    submit.add_argument("--dry-run", action="store_true", help="print the script; submit nothing")
    verify = add("verify", "test that ranks, resumes and workers change nothing", run=False)
    verify.add_argument("--steps", type=int, default=3, metavar="N", help="steps to compare: 3")
    add("doctor", "try the launch of a config: what is wrong with it, and what to do", run=False)
    add("lr-find", "try learning rates in a few steps, and suggest one", run=False)
    add("batch-find", "find the largest micro-batch that fits, and how fast each is", run=False)
    add("config", "print the composed, checked config; train nothing", run=False)
    add("rerun", "train a run's stored config again, in a new directory", run=True)
    evaluate = add("evaluate", "the metrics of a run's checkpoint over a split", run=True)
    evaluate.add_argument("--split", choices=SPLITS, help="default: test, or val")
    export = add("export", "write a run's weights to one safetensors file", run=True)
    export.add_argument("--output", type=Path, help="default: RUN/model.safetensors")
    explain = add("explain", "which parts of its inputs a run's outputs go back to", run=True)
    _add_explain(explain)
    sample = add("sample", "text from a run's language model", run=True)
    sample.add_argument("--prompt", default="def ", help="text to continue")
    sample.add_argument("--length", type=int, default=400, help="bytes to add")
    for command in (evaluate, export, explain, sample):
        _add_checkpoint(command)
    replay = add("replay", "take one step of a run again, and name what was wrong in it", run=True)
    replay.add_argument("step", type=int, help="counted from 0, as in anomalies.jsonl")
    _add_diff(add("diff", "where two runs parted, and what differed first", run=True))
    for add_own in (_add_compare, _add_study, _add_init):
        add_own(commands)
    add("rank", None, run=False)
    add("worker", None, run=True).add_argument("--again", action="store_true")
    commands.add_parser("node").add_argument("of_ranks", metavar="COMMAND")
    commands.add_parser("verify-rank").add_argument("folder", type=Path)
    return parser


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint", default="latest", metavar="WHICH", help="latest, best, or a step"
    )
    command.add_argument("--last", action="store_true", help="of averaged weights: the last")


def _add_explain(explain: argparse.ArgumentParser) -> None:
    explain.add_argument("--split", choices=SPLITS, help="default: test, or val")
    explain.add_argument(
        "--method",
        action="append",
        choices=("integrated-gradients", "permutation", "saliency"),
        help="may be given again; default: all that there are for such inputs",
    )
    default = "default: all; of images and texts 200"
    explain.add_argument("--samples", type=int, metavar="N", help=f"so many, drawn; {default}")
    steps = "points between baseline and input: 200"
    explain.add_argument("--steps", type=int, default=200, metavar="N", help=steps)
    explain.add_argument("--output", type=Path, metavar="FOLDER", help="default: RUN/explain")


def _add_diff(diff: argparse.ArgumentParser) -> None:
    diff.add_argument("other", type=Path, metavar="run", help="another run's directory")


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "a table, curves and hparams of several runs, the best first"
    command = commands.add_parser("compare", description=summary, help=summary)
    folder = "a run's directory, or a folder with runs below it"
    command.add_argument("runs", type=Path, nargs="+", metavar="run", help=folder)
    default = "default: compare/ in the nearest folder that holds all of them"
    command.add_argument("--output", type=Path, metavar="FOLDER", help=default)


def _add_study(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "many small runs in one go, compared in a report: gradient-descent"
    command = commands.add_parser("study", description=summary, help=summary)
    command.add_argument("name", help="which: gradient-descent")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of all runs")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/NAME")
    only = "this comparison alone; may be given again: rates, batches, optimisers, penalties"
    command.add_argument("--only", action="append", default=[], metavar="NAME", help=only)


def _add_init(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "write a small project of your own, which trains at once"
    init = commands.add_parser("init", description=summary, help=summary)
    init.add_argument("folder", type=Path, help="a new folder")
