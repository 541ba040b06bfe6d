"""How long a step waits for a snapshot, beside what copying the state takes; and what it costs.

    torchrun --standalone --nproc-per-node 2 benchmarks/stall.py

First the copy alone, for states of several sizes: seconds of a snapshot ÷ seconds of copying the
same tensors into memory that is warm. Then the GPT of the other benchmark, trained with snapshots
every step, every 50 steps, and without, in turns within one process: ratios of seconds per step.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from cases import BATCH_PER_RANK

from ddptrain.build import build_trainer
from ddptrain.checkpoint.memory import Memory
from ddptrain.compose import compose
from ddptrain.launch.worker import TIMEOUT
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.state import State

MEGABYTES = (10, 100, 1000)
TURNS = 12
EVERY = (None, 50, 1)
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


def training(ranks: Ranks, folder: Path) -> None:
    """Print what a step takes with snapshots at several intervals."""
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
    trainer = build_trainer(config, ranks, RunDirectory(folder), Phases())
    batches = trainer.fetcher.steps(0, 100000, ranks.rank, ranks.world_size)
    seconds: dict[int | None, list[float]] = {every: [] for every in EVERY}
    step = 0
    for turn in range(1 + TURNS // 2):
        for every in EVERY:
            config.checkpoint.memory_every_steps = every
            ranks.barrier()
            began = time.perf_counter()
            for _ in range(50):
                trainer.step(step, batches)
                step += 1
                trainer.advance(step)
                if trainer.is_due(every):
                    trainer.snapshot()
            if turn:
                seconds[every].append((time.perf_counter() - began) / 50)
    if ranks.is_first:
        print("\n| snapshots | ms per step | ratio |\n|---|---|---|")
        for every in EVERY:
            ratio = median(s / n for s, n in zip(seconds[every], seconds[None], strict=True))
            print(f"| every {every} | {1000 * median(seconds[every]):.2f} | {ratio:.4f} |")
    trainer.checkpoints.settle()
    trainer.checkpoints.memory.forget()


def main() -> None:
    sys.path.insert(0, str(HERE))
    os.chdir(HERE)
    torch.set_num_threads(1)
    ranks = Ranks(Place.from_environment(), torch.device("cpu"), TIMEOUT)
    if ranks.is_first:
        copies(Path(tempfile.mkdtemp(dir="/dev/shm")))
    path = ranks.from_first(tempfile.mkdtemp() if ranks.is_first else None)
    training(ranks, Path(path))
    ranks.barrier()
    ranks.leave()


if __name__ == "__main__":
    main()
