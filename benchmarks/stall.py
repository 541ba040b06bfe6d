"""How long a step waits for a snapshot, beside what copying the state takes; and what it costs.

    torchrun --standalone --nproc-per-node 2 benchmarks/stall.py

First the copy alone, for states of several sizes: seconds of a snapshot ÷ seconds of copying the
same tensors into memory that is warm; 1.2 at most is the aim. Then the GPT of the other benchmark,
trained by the loop's own code without any saving, with snapshots in memory, and with durable
checkpoints, one in ten steps and every step, in turns within one process: short ones, for what else
a machine does changes from second to second. What one costs in ten steps is a fifth of that in 50:
every 50 steps may cost 1 % of a run's seconds, every step 3.5 %.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from cases import BATCH_PER_RANK

from ddptrain.build import build_trainer
from ddptrain.checkpoint.memory import Memory
from ddptrain.compose import compose
from ddptrain.launch.worker import TIMEOUT
from ddptrain.loop import Trainer
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.state import State

MEGABYTES = (10, 100, 1000)
TURNS = 40
"""Of the copies."""
STEPS = 10
"""Of a turn of training."""
SELDOM = 50
"""Steps between saves where a turn has one."""
Every = tuple[int | None, int | None]
EVERY: tuple[Every, ...] = ((None, None), (STEPS, None), (1, None), (None, STEPS), (None, 1))
"""Steps between snapshots in memory, and between durable checkpoints."""
HERE = Path(__file__).resolve().parent


def copies(root: Path) -> None:
    """Print the stall of a snapshot against a plain copy, by size."""
    print("| state, MB | snapshot, ms | copy, ms | ratio |\n|---|---|---|---|")
    for megabytes in MEGABYTES:
        tensors = {f"{i}": torch.randn(megabytes * 2500) for i in range(100)}
        warm = {name: tensor.clone() for name, tensor in tensors.items()}
        memory = Memory([root / f"{megabytes}"])
        snapshots, plain = [], []
        for turn in range(3 + TURNS):
            slot = memory.free()
            assert slot is not None
            began = time.perf_counter()
            memory.take(slot, State(turn, {"model.safetensors": tensors}, {}))
            snapshots.append(time.perf_counter() - began)
            memory.seal(slot, memory.describe(slot, {"step": turn}))
            slot.busy = False
            began = time.perf_counter()
            for name, tensor in tensors.items():
                warm[name].copy_(tensor)
            plain.append(time.perf_counter() - began)
        ratio = median(s / p for s, p in zip(snapshots[3:], plain[3:], strict=True))
        one, other = median(snapshots[3:]), median(plain[3:])
        print(f"| {megabytes} | {1000 * one:.2f} | {1000 * other:.2f} | {ratio:.2f} |", flush=True)
        shutil.rmtree(root / f"{megabytes}")


def training(ranks: Ranks, folder: Path, turns: int) -> None:
    """Print what a step takes with snapshots and checkpoints at several intervals."""
    trainer = the_trainer(ranks, folder)
    trainer.restore()
    trainer.fetch()
    some_steps(trainer, None, None, STEPS // 2)  # what is due once in a turn comes in its midst
    seconds: dict[Every, list[float]] = {every: [] for every in EVERY}
    for turn in range(1 + turns):
        first = turn % len(EVERY)  # no kind always has the same place in a turn
        for every in (*EVERY[first:], *EVERY[:first]):
            ranks.barrier()
            began = time.perf_counter()
            some_steps(trainer, *every, STEPS)
            if turn:
                seconds[every].append((time.perf_counter() - began) / STEPS)
            trainer.checkpoints.settle()
    if ranks.is_first:
        print(table(seconds, sum(t.numel() * t.element_size() for t in tensors_of(trainer))))
    trainer.checkpoints.memory.forget()


def the_trainer(ranks: Ranks, folder: Path) -> Trainer:
    batch = BATCH_PER_RANK["gpt"]
    config = compose(
        [
            "task={_target_:cases.task,case:gpt}",
            "data.train={_target_:cases.Data,case:gpt}",
            "train.max_steps=100000",
            f"train.global_batch_size={ranks.world_size * batch}",
            f"train.micro_batch_size={batch}",
            "train.device=cpu",
        ]
    )
    return build_trainer(config, ranks, RunDirectory(folder), Phases())


def some_steps(trainer: Trainer, memory: int | None, durable: int | None, count: int) -> None:
    """Train as ``Trainer.go_on`` does, with snapshots and checkpoints at such intervals.

    Without what it does once, in the first step: that is for a run that is told of by its config.
    """
    trainer.config.checkpoint.memory_every_steps = memory
    trainer.config.checkpoint.every_steps = durable
    for step in range(trainer.done, trainer.done + count):
        trainer.step(step, trainer.batches)
        trainer.record = trainer.step.fingerprints.take(step)
        trainer.advance(step + 1)
        trainer.heed()
        trainer.observer.fingerprint(trainer.record)
        trainer.tend()


def tensors_of(trainer: Trainer) -> list[torch.Tensor]:
    files = trainer.state(trainer.done).files.values()
    return [tensor for tensors in files for tensor in tensors.values()]


def table(seconds: dict[Every, list[float]], state: int) -> str:
    rows = [
        f"\n{state / 1e6:.1f} MB of state; by turn, against the turn without",
        "| in memory | in the run directory | ms per step | cost, median | quartiles |",
        "|---|---|---:|---:|---|",
    ]
    for every in EVERY:
        asked = [None if n is None else SELDOM if n == STEPS else n for n in every]
        share = STEPS / SELDOM if SELDOM in asked else 1.0
        costs = [
            share * (s / n - 1) for s, n in zip(seconds[every], seconds[EVERY[0]], strict=True)
        ]
        low, middle, high = quantiles(costs, n=4) if len(costs) > 1 else 3 * costs
        memory, durable = ("–" if n is None else f"every {n} steps" for n in asked)
        # Of a step on average, at the share of steps that saves are asked for.
        milliseconds = 1000 * median(seconds[EVERY[0]]) * (1 + middle)
        numbers = f"{milliseconds:.2f} | {middle:.2%} | {low:.2%} to {high:.2%}"
        rows.append(f"| {memory} | {durable} | {numbers} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=60, help=f"each of {STEPS} steps of each kind")
    parser.add_argument("--run-in", type=Path, help="where checkpoints go, rather than to /tmp")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    os.chdir(HERE)
    torch.set_num_threads(1)
    ranks = Ranks(Place.from_environment(), torch.device("cpu"), TIMEOUT)
    if ranks.is_first:
        copies(Path(tempfile.mkdtemp(dir="/dev/shm")))
    made = tempfile.mkdtemp(dir=options.run_in) if ranks.is_first else None
    path = Path(ranks.from_first(made))
    training(ranks, path, options.turns)
    ranks.barrier()
    gc.collect()  # as a run does: what holds the process group goes before it
    ranks.leave()
    if made is not None:
        shutil.rmtree(path)


if __name__ == "__main__":
    main()
