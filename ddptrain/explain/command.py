"""`ddptrain explain`: loads a run, attributes its outputs to its inputs, and tells of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddptrain.config import Config, Direction
from ddptrain.data.fetch import Fetcher
from ddptrain.errors import EXIT_COMPLETED, Refused
from ddptrain.evaluate import Evaluation
from ddptrain.explain import features, images, tokens
from ddptrain.explain.attribution import INTEGRATED, METHODS, PERMUTATION, Attributions, Attributor
from ddptrain.explain.importance import REPEATS, Importance, Metric, measure
from ddptrain.explain.report import Report, quality_of
from ddptrain.explain.samples import Example, check_shapes, draw, inputs_of
from ddptrain.launch.inspect import load, split_of
from ddptrain.launch.worker import TIMEOUT
from ddptrain.observe.values import digits
from ddptrain.parallel.ranks import Ranks, choose_device
from ddptrain.parts import build_autocast, build_source
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.screen import say, short
from ddptrain.tasks.task import Task

MANY_FEATURES = 1000
"""Of more, each takes as many evaluations as of few, and nobody waits for them unasked."""


def explain(
    run: RunDirectory,
    config: Config,
    which: str,
    last: bool,
    split: str | None,
    methods: list[str] | None,
    samples: int | None,
    steps: int,
    output: Path | None,
) -> int:
    """Explain a checkpoint's outputs for the samples of a split; on several ranks under torchrun.

    Writes a table, facts and pictures into ``output``, by default ``explain`` in the run's
    directory. Raises ``Refused`` for what cannot be explained so.
    """
    split = split_of(config, run, split)
    if steps < 1:
        raise Refused(f"--steps {steps}: expected a number above 0")
    place = Place.from_environment()
    ranks = Ranks(place, choose_device(config.train.device.name, place), TIMEOUT)
    task, step = load(run, config, which, ranks, last)
    example = Example.of(task, build_source(config, split), ranks.device, config.data.workers)
    methods = _check(methods, example, speaks=ranks.is_first)
    source = draw(example.source, samples, example.kind)
    attributor = Attributor(task, example, methods, steps)
    fetcher = Fetcher(source, ranks.device, config.data.workers)
    mine = source.plan.micro_batches(0, ranks.rank, ranks.world_size)
    batches = list(fetcher.fetch(mine))
    shapes = ranks.gather([inputs_of(task, batch, source.label).shape[1:] for batch in batches])
    check_shapes([shape for of_rank in shapes for shape in of_rank], source.label)
    importance = None
    if PERMUTATION in methods:
        importance = _importance(config, task, fetcher, batches, ranks)
    found = attributor.over(source, batches, ranks) if set(methods) - {PERMUTATION} else None
    if ranks.is_first:
        facts = {"split": split, "step": step, "samples": source.plan.samples}
        facts |= {"steps": steps} if INTEGRATED in methods else {}
        explained = _explained(attributor.outputs, example.has_classes)
        say(f"{run.path}, step {step}: {explained}, of {source.plan.samples} samples of {split}")
        _tell(
            _report(example, found, importance), found, importance, facts, output or run.explained
        )
    ranks.barrier()  # the first that leaves with an error ends the others under torchrun
    ranks.leave()
    return EXIT_COMPLETED


def _check(methods: list[str] | None, example: Example, speaks: bool) -> list[str]:
    """The methods that are wanted, each once, in a fixed order. Raises ``Refused``."""
    known = METHODS[example.kind]
    for method in methods or ():
        if method not in known:
            raise Refused(
                f"--method {method}: inputs of {example.source.label} are {example.kind}, for "
                f"which there is {', '.join(known)}"
            )
    features = len(example.feature_names)
    if not methods and features > MANY_FEATURES:
        if speaks:
            say(
                f"permutation  not measured: {features} features, each in {REPEATS} orders, are an "
                "evaluation each; ask for it by --method permutation"
            )
        methods = [method for method in known if method != PERMUTATION]
    return [method for method in known if not methods or method in methods]


def _explained(outputs: int, has_classes: bool) -> str:
    """What it is that is explained of each sample, where the task gives so many ``outputs``."""
    if has_classes:
        return "its output" if outputs == 1 else "the class it predicts"
    return "the number it predicts" if outputs == 1 else f"the largest of its {outputs} outputs"


def _importance(
    config: Config, task: Task, fetcher: Fetcher, batches: list[Any], ranks: Ranks
) -> Importance:
    autocast = build_autocast(config.train.precision, ranks.device)
    evaluation = Evaluation(task, fetcher, ranks, autocast)
    keep = config.checkpoint
    metric = Metric.of_run(keep.metric, keep.mode is Direction.max, evaluation.names())
    return measure(evaluation, batches, metric)


def _report(example: Example, found: Attributions | None, importance: Importance | None) -> Report:
    if example.kind == "features" or found is None:
        return features.report(example.feature_names, found, importance)
    if example.kind == "images":
        return images.report(found, example.class_name)
    return tokens.report(found, example.class_name, example.token_name)


def _tell(
    report: Report,
    found: Attributions | None,
    importance: Importance | None,
    facts: dict[str, Any],
    folder: Path,
) -> None:
    say(f"\n{report.table()}\n")
    if importance is not None:
        name, value = importance.metric.name, importance.value
        facts |= {"metric": name, "value": value, "orders": REPEATS}
        say(f"permutation  {name} is {digits(value)}; {REPEATS} orders of each feature")
    if found is not None and (quality := quality_of(found)):
        facts |= quality
        missed, change = quality["largest_convergence_delta"], quality["mean_absolute_change"]
        say(
            f"integrated   a score's change from the baseline is {change:.4g} in the mean, and "
            f"missed by {missed:.2g} at most" + "; more --steps miss less" * (missed > change / 10)
        )
    for file in report.write(folder, str(facts["split"]), facts):
        say(f"written      {short(file)}")
