"""Runs under torchrun: what depends on the number of ranks, computed once for many tests.

Writes a JSON object to the file it is given; the tests compare it between numbers of ranks.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ddptrain.account import Window, add_logs, means
from ddptrain.build import build_trainer
from ddptrain.compose import compose
from ddptrain.config import Config
from ddptrain.data.fetch import Fetcher
from ddptrain.evaluate import Evaluation
from ddptrain.launch.worker import TIMEOUT
from ddptrain.loop import Trainer
from ddptrain.observe.loggers import read_json_lines
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ddp import DataParallel
from ddptrain.parallel.ranks import Ranks
from ddptrain.parallel.reduction import Mean
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.state import fingerprint, load_optimizer, optimizer_tensors
from ddptrain.tasks import Loss

MICRO_BATCHES = (2, 3, 6)  # 12, 8 and 4 of them: three ranks cannot share all of these evenly
GLOBAL_BATCH = 24


def build(config: Config, ranks: Ranks, folder: Path) -> Trainer:
    return build_trainer(config, ranks, RunDirectory(folder), Phases())


def gradients(ranks: Ranks, folder: Path) -> dict[str, list[list[float]]]:
    """By micro-batch size, with clipping or without, single and double: weights after two steps.

    A full step and a short one, by plain descent at rate 1: the weights tell the gradients.
    """
    config = compose(
        [
            "experiment=ragged",
            "log.tensorboard=false",
            "model.dropout=0",
            "data.train={_target_:ragged.Sentences,samples:43,noisy:false}",
            *("optim=sgd", "optim.lr=1", "optim.momentum=0", "optim.nesterov=false"),
            "schedule=constant",
        ]
    )
    found = {}
    whole = (GLOBAL_BATCH,) if ranks.world_size == 1 else ()
    settings = ((None, False), (0.05, False), (0.05, True))
    for micro, (clip, double) in product((*MICRO_BATCHES, *whole), settings):
        config.train.micro_batch_size = micro
        config.train.grad_clip.max_norm = clip
        config.task["double"] = double
        found[f"{micro}/{clip}/{double}"] = weights_after(2, build(config, ranks, folder))
    return found


def weights_after(steps: int, made: Trainer) -> list[list[float]]:
    batches = made.fetcher.steps(0, steps, made.ranks.rank, made.ranks.world_size)
    weights = []
    for step in range(steps):
        made.step(step, batches)
        flat = torch.cat([p.detach().double().flatten() for p in made.task.parameters()])
        weights.append(flat.tolist())
    return weights


def collectives_of_a_step(ranks: Ranks, folder: Path) -> int:
    """How many collectives a step of three micro-batches on each rank makes."""
    micro = GLOBAL_BATCH // (3 * ranks.world_size)
    overrides = ["experiment=ragged", f"train.micro_batch_size={micro}"]
    made = build(compose(overrides), ranks, folder)
    batches = made.fetcher.steps(0, 4, ranks.rank, ranks.world_size)
    for step in range(3):  # DDP arranges its buckets in the first
        made.step(step, batches)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        made.step(3, batches)
    return sum(event.name.startswith("gloo:") for event in profiled.events() or ())


def reduced(ranks: Ranks) -> dict[str, bool]:
    """By bucket size, gathered or in a ring: is the sum over the ranks right in every element?"""
    right = {}
    for count in (1, 1000, 1_000_000):
        layer = torch.nn.Linear(count, 1, bias=False)
        of_ranks = [torch.arange(count) % 7 + rank for rank in range(ranks.world_size)]
        replica = DataParallel(ranks, bucket_mb=25, reduction=Mean()).wrap(layer)
        replica(of_ranks[ranks.rank].float()).sum().backward()
        gradient = torch.nn.utils.parameters_to_vector([p.grad for p in layer.parameters()])
        right[str(count)] = torch.equal(gradient, torch.stack(of_ranks).sum(0).float())
    return right


def resumes_in_a_ring(ranks: Ranks, folder: Path) -> bool:
    """Does a run that starts at step 1 end like one that starts at 0, above the gather's limit?"""
    config = compose(["experiment=ragged", "model.width=12000", "log.tensorboard=false"])
    whole, resumed = build(config, ranks, folder), build(config, ranks, folder)
    take_steps(whole, 0, 1)
    copy_state(whole, resumed)
    return torch.equal(take_steps(whole, 1, 3), take_steps(resumed, 1, 3))


def take_steps(trainer: Trainer, first: int, last: int) -> torch.Tensor:
    ranks = trainer.ranks
    batches = trainer.fetcher.steps(first, last, ranks.rank, ranks.world_size)
    for step in range(first, last):
        trainer.step(step, batches)
    return torch.nn.utils.parameters_to_vector(trainer.task.parameters())


def evaluations(ranks: Ranks, folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of 21 samples, by experiment and micro-batch size."""
    found = {}
    for name, target in (("digits", "Digits"), ("breast_cancer", "BreastCancer")):
        data = f"data.val={{_target_:first.First,count:21,of:{target}}}"
        counting = ["task._target_=first.Counting"] if name == "digits" else []
        config = compose([f"experiment={name}", data, "log.tensorboard=false", *counting])
        evaluation = build(config, ranks, folder).evaluations["val"]
        source = evaluation.fetcher.source
        for micro in range(1, 9):
            source.plan = replace(source.plan, micro_batch_size=micro)
            again = Evaluation(
                evaluation.task,
                Fetcher(source, ranks.device),
                ranks,
                evaluation.autocast,
            )
            found[f"{name}/{micro}"] = again.run()
    return found


LANGUAGE_MODEL = [
    *("experiment=stdlib_lm", "model.layers=1", "model.width=16", "model.dropout=0.1"),
    *("data.val=null", "data.test=null", "eval.every_steps=null", "checkpoint.keep_best=0"),
]
EXACT = {
    "digits": ["experiment=digits", "task.mixup=0.4", "task.label_smoothing=0.1"],
    "stdlib_lm": LANGUAGE_MODEL,
    "own model, clipped": ["experiment=ragged", "train.grad_clip.max_norm=0.02"],
    "batch norm": ["experiment=ragged", "model.batch_norm=true", "train.micro_batch_size=3"],
    "fp16": ["experiment=ragged", "train.precision=fp16"],
    "double": ["experiment=ragged", "task.double=true", "parallel.bucket_mb=0.0001"],
    "penalties": [
        *("experiment=ragged", "train.penalty.l1=0.01", "train.penalty.l2=0.1"),
        *("train.grad_clip.per_unit=0.05", "train.grad_clip.max_value=0.01"),
    ],
    "restarts": ["experiment=ragged", "restarts=3", "train.grad_clip.max_norm=0.1"],
    "restarts, batch norm": ["experiment=ragged", "restarts=2", "model.batch_norm=true"],
    "gaussian": [
        *("experiment=diabetes", "data.val=null", "data.test=null", "eval.every_steps=null"),
        "checkpoint.keep_best=0",
    ],
    "averages": ["experiment=ragged", "train.average.kind=ema", "train.average.start=1"],
    "muon": [*LANGUAGE_MODEL, "optim=muon", "optim.layer_decay=0.5"],
    "lbfgs": [
        *("experiment=ragged", "optim=lbfgs", "optim.max_iter=3", "train.grad_clip.max_norm=null"),
        *("train.global_batch_size=all", "train.micro_batch_size=5", "model.batch_norm=true"),
    ],
    **{
        name: ["experiment=ragged", f"optim={name}"]
        for name in ("sgd", "adam", "adagrad", "rmsprop", "adadelta", "nadam", "radam")
    },
}


def exact(ranks: Ranks, folder: Path) -> dict[str, list[str]]:
    """Hashes of the weights after some steps, in one go and resumed, by config."""
    found = {}
    for name, overrides in EXACT.items():
        config = compose([*overrides, "parallel.reduction=exact", "log.tensorboard=false"])
        found[name] = resumed_and_not(config, ranks, folder, 2, 4)
    draw = random.Random(5)
    for case in range(2):  # borders of epochs and of micro-batches fall anywhere
        micro, micro_batches = draw.randint(1, 3), draw.randint(4, 7)
        batch = micro * micro_batches
        samples = draw.randint(batch, 3 * batch)
        config = compose(
            [
                *("experiment=ragged", f"data.train.samples={samples}", f"seed={case}"),
                *(f"train.micro_batch_size={micro}", f"train.global_batch_size={batch}"),
                *("parallel.reduction=exact", "log.tensorboard=false"),
            ]
        )
        name = f"{samples} samples, {micro_batches} micro-batches of {micro}"
        found[name] = resumed_and_not(config, ranks, folder, draw.randint(1, 4), 5)
    return found


def resumed_and_not(
    config: Config, ranks: Ranks, folder: Path, middle: int, last: int
) -> list[str]:
    whole, resumed = build(config, ranks, folder), build(config, ranks, folder)
    take_steps(whole, 0, middle)
    copy_state(whole, resumed)
    return [take_steps_and_hash(trainer, middle, last) for trainer in (whole, resumed)]


def take_steps_and_hash(trainer: Trainer, first: int, last: int) -> str:
    take_steps(trainer, first, last)
    return fingerprint(trainer.task)


def layers(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """What is seen in layers in each second of four steps, and weights with that and without."""
    found: dict[str, Any] = {}
    for every in ("null", "2"):
        overrides = [*EXACT["digits"], "parallel.reduction=exact", "log.tensorboard=false"]
        made = build(compose([*overrides, f"log.layers_every_steps={every}"]), ranks, folder)
        made.layers.restore()
        made.fetch()
        for step in range(4):
            with made.layers.watch(step):
                made.step(step, made.batches)
            made.layers.tell(step + 1)
        made.observer.close()
        found[every] = fingerprint(made.task)
    lines = folder / "layers.jsonl"
    found["lines"] = read_json_lines(lines) if ranks.is_first else []
    return found


def moved_buffers(ranks: Ranks, folder: Path) -> dict[str, list[float]]:
    """A model's running statistics after a step, with sums in floating point."""
    config = compose(["experiment=ragged", "model.batch_norm=true", "log.tensorboard=false"])
    made = build(config, ranks, folder)
    take_steps(made, 0, 1)
    return {name: buffer.view(-1).tolist() for name, buffer in made.task.named_buffers()}


def copy_state(whole: Trainer, resumed: Trainer) -> None:
    """What a checkpoint does, without the files."""
    resumed.task.load_state_dict(whole.task.state_dict())
    tensors, numbers = optimizer_tensors(whole.task, whole.step.optimizer)
    load_optimizer(resumed.task, resumed.step.optimizer, tensors, numbers)
    resumed.step.load_numbers(whole.step.numbers(), 0)


def differing_logs(ranks: Ranks) -> dict[str, float]:
    """What ranks log when their keys, order and counts differ."""
    window = Window(ranks.device)
    one = torch.ones(())
    for sample in range(12):
        if sample * ranks.world_size // 12 != ranks.rank:
            continue
        logs = {"all": one * sample, f"only_{sample % 3}": (one * sample, 2)}
        if ranks.rank % 2:
            logs = dict(reversed(logs.items()))
        window.add(Loss(one, sample + 1, logs))
    return means(add_logs(ranks.gather(window.logs())))


def main(file: Path) -> None:
    place = Place.from_environment()
    ranks = Ranks(place, torch.device("cpu"), TIMEOUT)
    found: dict[str, Any] = {"exact": exact(ranks, file.parent), "reduced": reduced(ranks)}
    if ranks.world_size < 4:
        found |= {
            "gradients": gradients(ranks, file.parent),
            "evaluations": evaluations(ranks, file.parent),
            "buffers": moved_buffers(ranks, file.parent),
            "logs": differing_logs(ranks),
            # Between two ranks the order of a sum does not matter.
            "resumes": ranks.world_size != 3 or resumes_in_a_ring(ranks, file.parent),
            "layers": layers(ranks, file.parent),
            "collectives": collectives_of_a_step(ranks, file.parent),
        }
    if ranks.is_first:
        file.write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
