"""On a GPU: what the trainer costs over a hand-tuned loop, and how long snapshots hold it up.

    python benchmarks/gpu.py

One rank, in one process: the hand-tuned loop, and the loop's own code without any saving, with
snapshots in memory and with durable checkpoints, every 50 steps and every step, take turns. Seconds
are the GPU's, between two of its events; ratios are taken within a round, to the hand-tuned loop.
Then the copy alone, against the same bytes copied to pinned memory by nobody but CUDA.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from stall import some_steps, tensors_of
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from ddptrain import Loss, Task
from ddptrain.build import build_trainer
from ddptrain.checkpoint.memory import Memory
from ddptrain.compose import compose
from ddptrain.launch.worker import TIMEOUT
from ddptrain.loop import Trainer
from ddptrain.models import GPT
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.state import State

HERE = Path(__file__).resolve().parent
SIZES = {
    "small": {"vocabulary": 256, "context": 64, "layers": 4, "heads": 4, "width": 128},
    "large": {"vocabulary": 50304, "context": 512, "layers": 12, "heads": 12, "width": 768},
}
BATCH = {"small": 64, "large": 16}
SAMPLES = 8192
LEARNING_RATE = 1e-3
HORIZON = 100_000
STEPS = 50
"""Of a turn."""
Every = tuple[int | None, int | None]
EVERY: dict[str, Every] = {
    "no saving": (None, None),
    "snapshot every 50": (50, None),
    "snapshot every step": (1, None),
    "checkpoint every 50": (None, 50),
}

TOO_OFTEN: dict[str, tuple[Every, ...]] = {"small": (), "large": ((1, None),)}
"""Its checksums take longer than a step."""


class Tokens(TensorDataset):
    def __init__(self, size: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (SAMPLES, SIZES[size]["context"] + 1)
        tokens = torch.randint(0, SIZES[size]["vocabulary"], shape, generator=generator)
        super().__init__(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class Language(Task):
    def __init__(self, size: str) -> None:
        super().__init__()
        self.model = GPT(**SIZES[size])

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        inputs, targets = batch
        logits = self.model(inputs)
        total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return Loss(total, targets.numel())


def hand(size: str, ranks: Ranks) -> Callable[[int], None]:
    """A hand-tuned DDP loop with nothing in it but training; takes so many steps."""
    ranks.form_group()
    torch.manual_seed(0)
    model = GPT(**SIZES[size]).to(ranks.device)
    replica = nn.parallel.DistributedDataParallel(
        model, device_ids=[ranks.device], gradient_as_bucket_view=True, static_graph=True
    )
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    tokens = Tokens(size).tensors

    def batches() -> Iterator[Any]:
        while True:
            for rows in torch.randperm(SAMPLES).split(BATCH[size]):
                yield [tensor[rows] for tensor in tokens]

    source = batches()
    done = 0

    def take(count: int) -> None:
        nonlocal done
        for _ in range(count):
            inputs, targets = (t.to(ranks.device, non_blocking=True) for t in next(source))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * done / HORIZON))
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = replica(inputs)
                loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1

    return take


def the_trainer(size: str, ranks: Ranks, folder: Path) -> Trainer:
    config = compose(
        [
            f"task={{_target_:gpu.Language,size:{size}}}",
            f"data.train={{_target_:gpu.Tokens,size:{size}}}",
            f"train.max_steps={HORIZON}",
            f"train.global_batch_size={BATCH[size]}",
            f"train.micro_batch_size={BATCH[size]}",
            "train.precision=bf16",
            "train.grad_clip.max_norm=1",
            f"optim.lr={LEARNING_RATE}",
            "log.every_steps=50",
            "log.tensorboard=false",
            "parallel.check_every_steps=null",
        ]
    )
    trainer = build_trainer(config, ranks, RunDirectory(folder), Phases())
    trainer.restore()
    trainer.fetch()
    return trainer


def timed(work: Callable[[], None]) -> float:
    """Seconds of the GPU from before ``work`` until all of it is done."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) / 1000


def training(size: str, ranks: Ranks, folder: Path, rounds: int) -> None:
    by_hand = hand(size, ranks)
    trainer = the_trainer(size, ranks, folder)
    some_steps(trainer, None, None, STEPS // 2)  # what is due every 50 comes in mid-turn

    def taking(every: Every) -> Callable[[], None]:
        return lambda: some_steps(trainer, *every, STEPS)

    kinds = {name: every for name, every in EVERY.items() if every not in TOO_OFTEN[size]}
    turns = {"hand": lambda: by_hand(STEPS)} | {name: taking(e) for name, e in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(1 + rounds):
        names = list(turns)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took = timed(turns[name])
            trainer.checkpoints.settle()
            if number:
                seconds[name].append(took / STEPS)
    size_mb = sum(t.numel() * t.element_size() for t in tensors_of(trainer)) / 1e6
    print(f"\n{size}: {size_mb:.0f} MB of state\n| | ms per step | ratio to hand |\n|---|---|---|")
    for name, took in seconds.items():
        ratio = median(t / h for t, h in zip(took, seconds["hand"], strict=True))
        print(f"| {name} | {1000 * median(took):.3f} | {ratio:.4f} |", flush=True)
    trainer.checkpoints.memory.forget()


def copies(device: torch.device, megabytes: int) -> None:
    """Print how long a snapshot holds up the host, and what CUDA needs at best."""
    tensors = {f"{i}": torch.randn(megabytes * 2500, device=device) for i in range(100)}
    pinned = {n: torch.empty(t.shape, pin_memory=True) for n, t in tensors.items()}
    memory = Memory([Path(tempfile.mkdtemp(dir="/dev/shm"))])
    snapshots, plain = [], []
    for turn in range(12):
        slot = memory.free()
        assert slot is not None
        torch.cuda.synchronize()
        began = time.perf_counter()
        memory.take(slot, State(turn, {"model.safetensors": tensors}, {}))
        snapshots.append(time.perf_counter() - began)
        memory.seal(slot, memory.describe(slot, {"step": turn}))
        slot.busy = False
        began = time.perf_counter()
        for name, tensor in tensors.items():
            pinned[name].copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        plain.append(time.perf_counter() - began)
    first, one, other = snapshots[0], median(snapshots[5:]), median(plain[5:])
    print(
        f"| {megabytes} | {1000 * first:.1f} | {1000 * one:.2f} | {1000 * other:.2f} "
        f"| {one / other:.2f} |",
        flush=True,
    )
    memory.forget()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    os.chdir(HERE)
    device = torch.device("cuda", 0)
    print(torch.cuda.get_device_name(device), torch.__version__, flush=True)
    ranks = Ranks(Place(), device, TIMEOUT)
    print("| state, MB | first snapshot, ms | snapshot, ms | pinned copy, ms | ratio |")
    print("|---|---|---|---|---|")
    for megabytes in (10, 100, 1000):
        copies(device, megabytes)
    for size in options.sizes:
        folder = Path(tempfile.mkdtemp())
        training(size, ranks, folder, options.rounds)
        shutil.rmtree(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
