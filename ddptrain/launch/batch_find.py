"""`ddptrain batch-find`: the largest micro-batch that fits into memory, and how fast each size is.

Sizes double until one does not fit, and then halve the way to the last one that did. A rank that
ran out of memory in an all-reduce would leave the others waiting in it. So each size is first tried
by each rank alone, forward and backward, with the memory occupied that is to stay free; then all
tell how it went, and only what fitted everywhere is trained on together.
"""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ddptrain.build import build_trainer
from ddptrain.config import ALL, Config
from ddptrain.errors import EXIT_COMPLETED, TrainingError
from ddptrain.generators import key_generators
from ddptrain.launch.room import HEADROOM, OnCPU, OnGPU, forget_frames, in_words, is_out_of_memory
from ddptrain.launch.worker import TIMEOUT
from ddptrain.loop import Trainer
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks, choose_device
from ddptrain.place import Place, choose_interface
from ddptrain.rules import check_world_size
from ddptrain.run_directory import RunDirectory
from ddptrain.screen import say
from ddptrain.tasks.task import Batch

FIRST = 2
"""Where it begins: a norm over a micro-batch may refuse a single sample."""
STEPS = 2
"""Of so many the faster one counts."""
STATE = 4
"""Times the parameters: what gradients, buckets and an optimiser's state take in the first step."""
FINE = 16
"""It ends when less than one in so many of the samples is open."""
NO_FASTER = 1.05


@dataclass(frozen=True)
class Trial:
    """How a micro-batch of ``size`` went: the peak of the fullest rank, in bytes, the samples per
    second of all ranks; or why it does ``not`` fit."""

    size: int
    peak: int = 0
    speed: float = 0.0
    unfit: str | None = None


def batch_find(config: Config, place: Place) -> int:
    """Be one rank of the search; rank 0 tells what came of it.

    Raises ``Refused``, and ``TrainingError`` if not even one sample fits.
    """
    check_world_size(config, place.world_size)
    device = choose_device(config.train.device.name, place)
    choose_interface(config.launch.interface)
    ranks = Ranks(place, device, TIMEOUT)
    batch_size = config.train.global_batch_size
    _simplify(config, place.world_size)
    with TemporaryDirectory(prefix="ddptrain-") as folder:
        tries = Tries(build_trainer(config, ranks, RunDirectory(Path(folder)), Phases()))
        trials = list(search(tries, tries.samples // ranks.world_size))
    ranks.leave()
    if ranks.is_first:
        report(trials, batch_size, ranks.world_size, tries.samples)
    return EXIT_COMPLETED


def _simplify(config: Config, world_size: int) -> None:
    """Leave out what a few steps need not; the sizes themselves are set for each try."""
    config.train.micro_batch_size, config.train.global_batch_size = 1, world_size
    config.train.max_steps, config.train.max_epochs = 1, None
    config.schedule = {"_target_": "ddptrain.optim.schedules.Constant"}
    config.data.val = config.data.test = config.eval.every_steps = None
    config.data.workers = config.checkpoint.keep_best = 0
    config.train.early_stop.metric = config.log.fingerprint_every = None
    config.train.spike.action = None


def search(attempt: Callable[[int], Trial], largest: int) -> Iterator[Trial]:
    """Try sizes up to ``largest``, the next by how the one before went."""
    fits, fails = 0, None
    size = min(FIRST, largest)
    while True:
        trial = attempt(size)
        yield trial
        if trial.unfit is None:
            fits = size
        else:
            fails = size
        if fails is None:
            if fits == largest:
                return
            size = min(2 * fits, largest)
        elif fails - fits <= max(1, fits // FINE):
            return
        else:
            size = (fits + fails) // 2


class Tries:
    """Tries micro-batches of any size in real steps of a training; every rank must call it."""

    def __init__(self, trainer: Trainer) -> None:
        self.step, self.ranks = trainer.step, trainer.ranks
        self.fetcher = trainer.fetcher
        self.samples = self.fetcher.source.plan.samples
        on_gpu = self.ranks.device.type == "cuda"
        hosts = self.ranks.gather(socket.gethostname())
        self.room = OnGPU(self.ranks.device) if on_gpu else OnCPU(hosts.count(socket.gethostname()))
        self.state = STATE * sum(p.numel() * p.element_size() for p in self.step.parameters)
        self.fitted: list[Trial] = []

    def __call__(self, size: int) -> Trial:
        unfit, batch = self._alone(size)
        said = self.ranks.gather(unfit)
        if first := next((why for why in said if why), None):
            where = f" on rank {said.index(first)}" if self.ranks.world_size > 1 else ""
            return Trial(size, unfit=f"{first}{where}")
        seconds = self._together(size, batch)
        told = self.ranks.gather((self.room.peak(), seconds))
        peak, slowest = (max(numbers) for numbers in zip(*told, strict=True))
        trial = Trial(size, peak, size * self.ranks.world_size / slowest)
        self.fitted.append(replace(trial, peak=self.room.peak()))
        return trial

    def _alone(self, size: int) -> tuple[str | None, Batch]:
        """Fetch the samples and take forward and backward of them; why it does not fit, if so."""
        step, world_size = self.step, self.ranks.world_size
        plan = replace(step.plan, micro_batch_size=size, global_batch_size=size * world_size)
        step.plan = self.fetcher.source.plan = plan
        gc.collect()
        self.room.begin()
        if expected := self._too_much(size):
            return expected, None
        batch: Batch = None
        unfit = None
        try:
            (mine,) = plan.micro_batches(0, self.ranks.rank, world_size)
            batch = next(iter(self.fetcher.fetch([mine])))
            spare = self.room.spare() + (0 if self.fitted else self.state)
            occupied = torch.empty(spare, dtype=torch.uint8, device=self.ranks.device)
            key_generators(plan.forward_key(mine), self.ranks.device)
            # Not through the replica, which talks to the others even if it reduces nothing.
            torch.autograd.grad(step.module(batch), step.parameters, allow_unused=True)
            self.room.peak()  # of a GPU: the wait in which it might still say no
            del occupied
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            unfit, batch = "out of memory", None
            forget_frames(error)
        return unfit, batch

    def _too_much(self, size: int) -> str | None:
        """What is expected to be too much for the kernel, by the growth from try to try."""
        left = self.room.left()
        if left is None or len(self.fitted) < 2:
            return None
        one, two = self.fitted[-2:]
        growth = (two.peak - one.peak) / (two.size - one.size)
        expected = int(two.peak + growth * (size - two.size)) - self.room.used()
        if expected <= left:
            return None
        return f"not tried: an estimated {in_words(expected)} more, of {in_words(left)} to be had"

    def _together(self, size: int, batch: Batch) -> float:
        """Take real steps on all ranks; the seconds of the fastest, without loading."""
        taken = []
        try:
            for _ in range(STEPS):
                began = time.perf_counter()
                self.step(0, iter([batch]))
                self.step.heard(False, wait=True)
                self.room.peak()
                taken.append(time.perf_counter() - began)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Others may wait for this rank in an all-reduce: it can only leave, and they with it.
            raise TrainingError(
                f"{self.ranks.place.name}: out of memory in the reduction or the update of {size} "
                "samples, though forward and backward fitted; there is hardly any memory left "
                "besides the model, its gradients and the optimiser's state"
            ) from None
        return min(taken)


def report(trials: list[Trial], batch_size: int | str, world_size: int, samples: int) -> None:
    """Print the table, and what to write into a config."""
    lines = [f"{'micro-batch':>11}  {'memory':>10}  {'samples/s':>10}"]
    fitting = sorted((t for t in trials if t.unfit is None), key=lambda trial: trial.size)
    for trial in sorted(trials, key=lambda trial: trial.size):
        told = f"{in_words(trial.peak):>10}  {trial.speed:>10.4g}"
        lines.append(f"{trial.size:>11}  {told if trial.unfit is None else trial.unfit}")
    say("\n".join(lines))
    if not fitting:
        raise TrainingError(
            "not even one sample fits into memory; make the model or the sample smaller, or take "
            "a device with more"
        )
    largest = fitting[-1].size
    fastest = max(trial.speed for trial in fitting)
    enough = next(trial for trial in fitting if trial.speed * NO_FASTER >= fastest)
    ends = "" if largest < samples // world_size else ", for there are no more samples"
    say(f"fits         {largest}, with {HEADROOM:.0%} of memory left free{ends}")
    say(f"fast enough  {enough.size}: larger ones are at most {NO_FASTER - 1:.0%} faster")
    micro = fitting_size(largest, batch_size, world_size)
    say(f"suggestion   train.micro_batch_size={micro}")
    if largest > micro:
        say(
            f"or           train.micro_batch_size={largest} "
            f"train.global_batch_size={largest * world_size}"
        )


def fitting_size(largest: int, batch_size: int | str, world_size: int) -> int:
    """The largest micro-batch that fits, divides the global batch, and leaves no rank idle."""
    if batch_size == ALL:
        return largest
    size = int(batch_size)
    most = min(largest, size // world_size)
    return next(each for each in range(most, 0, -1) if size % each == 0)
