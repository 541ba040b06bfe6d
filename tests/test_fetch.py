"""Samples reach a step whole, in order, the same on any workers, or a line says which did not."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from ddptrain import garbage
from ddptrain.data.fetch import Fetcher, Source, tensors_in
from ddptrain.data.plan import MicroBatch, Plan
from ddptrain.errors import DataError

CPU = torch.device("cpu")
SAMPLES = 20
SECONDS = 20
"""By when a failed worker must be noticed; starting one takes 2 s on a busy machine."""


class Numbers(Dataset[Tensor]):
    """Sample i is i, and the indices that were asked for are written down."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples
        self.asked: list[Any] = []

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        return torch.tensor([index, index])


class Thresholds(Numbers):
    """Of the process that fetches a sample: how many objects may be made between two searches."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(gc.get_threshold())


class ListOfMany(Numbers):
    """Fetches many at once as a list of samples, as Hugging Face's data sets do."""

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        self.asked.append(list(indices))
        return [torch.tensor([index, index]) for index in indices]


class BatchOfMany(Numbers):
    """Fetches many at once as a finished batch."""

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        self.asked.append(list(indices))
        return torch.tensor([[index, index] for index in indices])


class InMemory(TensorDataset):
    """Tensors in memory, with a name of its own."""

    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__(torch.arange(samples).unsqueeze(1).repeat(1, 2))


def source(dataset: Any, micro: int = 5, *, seed: int = 1, shuffled: bool = True) -> Source:
    samples = len(dataset)
    return Source("train", dataset, Plan(samples, samples, micro, seed, shuffled))


def batches(made: Source, workers: int = 0, steps: int = 1) -> list[Any]:
    return list(Fetcher(made, CPU, workers).steps(0, steps, 0, 1))


def refusal(made: Source, workers: int = 0) -> str:
    """The message of the ``DataError`` that fetching ends with, soon."""
    began = time.monotonic()
    with pytest.raises(DataError) as raised:
        batches(made, workers)
    assert time.monotonic() - began < SECONDS
    # A loader that is freed by the garbage collector waits 5 s for each of its workers, in vain.
    error: BaseException | None = raised.value
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    return str(raised.value)


def rows(batch: Any) -> list[int]:
    (tensor,) = tensors_in(batch)
    return [int(i) for i in tensor[:, 0]]


@pytest.mark.parametrize("make", [Numbers, ListOfMany, BatchOfMany, InMemory])
def test_a_micro_batch_has_the_samples_of_the_plan_in_its_order(make: Callable[[], Any]) -> None:
    made = source(make(), micro=6)
    found = [rows(batch) for batch in batches(made)]
    planned = [made.plan.indices(b).tolist() for b in made.plan.micro_batches(0)]
    assert found == planned
    assert [len(part) for part in found] == [6, 6, 6, 2]


@pytest.mark.parametrize("make", [ListOfMany, BatchOfMany])
def test_a_set_that_can_is_asked_for_whole_micro_batches(make: Callable[[], Numbers]) -> None:
    dataset = make()
    made = source(dataset, micro=6)
    found = batches(made)
    assert dataset.asked == [rows(batch) for batch in found]


def test_a_set_that_cannot_is_asked_for_each_sample_once() -> None:
    dataset = Numbers()
    batches(source(dataset), steps=2)
    assert sorted(dataset.asked) == sorted([*range(SAMPLES)] * 2)


def test_a_tensor_data_set_is_indexed_whole_unless_it_has_its_own_way() -> None:
    class Doubled(InMemory):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            return tuple(2 * tensor for tensor in super().__getitem__(index))

    assert source(InMemory()).in_memory
    assert not source(Doubled()).in_memory
    (batch,) = batches(source(Doubled(), micro=SAMPLES, shuffled=False))
    assert rows(batch) == [2 * i for i in range(SAMPLES)]


def test_torch_wrappers_of_data_sets_work() -> None:
    part = Subset(Numbers(), [3, 1, 4, 15, 9])
    (batch,) = batches(source(part, shuffled=False))
    assert rows(batch) == [3, 1, 4, 15, 9]
    both = ConcatDataset([Numbers(2), Numbers(3)])
    (batch,) = batches(source(both, shuffled=False))
    assert rows(batch) == [0, 1, 0, 1, 2]


class Pair(NamedTuple):
    image: Tensor
    label: int


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (lambda i: i, torch.arange(3)),
        (lambda i: float(i), torch.arange(3.0).double()),
        (lambda i: np.full(2, i), torch.arange(3).unsqueeze(1).repeat(1, 2)),
        (lambda i: {"x": torch.tensor(i)}, {"x": torch.arange(3)}),
        (lambda i: Pair(torch.tensor(i), i), Pair(torch.arange(3), torch.arange(3))),  # type: ignore[arg-type]
        (lambda i: ["text"] * 2, [("text",) * 3] * 2),
    ],
)
def test_samples_may_be_numbers_arrays_dicts_and_tuples(
    sample: Callable[[int], Any], expected: Any
) -> None:
    class Made(Numbers):
        def __getitem__(self, index: int) -> Any:
            return sample(index)

    (batch,) = batches(source(Made(3), shuffled=False))
    assert type(batch) is type(expected)
    torch.testing.assert_close(list(tensors_in(batch)), list(tensors_in(expected)))


# --- errors ------------------------------------------------------------------------------------


class Faulty(Numbers):
    """Has one sample that cannot be read, one of another shape, or one that ends its process."""

    def __init__(
        self, fails: int | None = None, odd: int | None = None, kills: int | None = None
    ) -> None:
        super().__init__()
        self.fails, self.odd, self.kills = fails, odd, kills

    def __getitem__(self, index: int) -> Tensor:
        if index == self.fails:
            raise OSError("the file is corrupt")
        if index == self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3 if index == self.odd else 2)


class FaultyMany(Numbers):
    """Fails to fetch many at once, or forgets one."""

    def __init__(self, forgets: bool = False) -> None:
        super().__init__()
        self.forgets = forgets

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        if not self.forgets:
            raise OSError("the file is corrupt")
        return [torch.tensor([index, index]) for index in indices if index != 7]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_named(workers: int) -> None:
    told = refusal(source(Faulty(fails=7)), workers)
    assert "data.train (Faulty): sample 7: OSError: the file is corrupt" in told


def test_samples_that_cannot_be_fetched_together_are_named() -> None:
    made = source(FaultyMany(), micro=SAMPLES, shuffled=False)
    told = refusal(made)
    assert told.startswith("data.train (FaultyMany): samples [0, 1, 2, 3")
    assert told.endswith("OSError: the file is corrupt")


@pytest.mark.parametrize("odd", [0, 7, SAMPLES - 1])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_sample_of_the_wrong_shape_is_named(odd: int, workers: int) -> None:
    told = refusal(source(Faulty(odd=odd)), workers)
    assert (
        f"data.train (Faulty): sample {odd} is torch.float32 of shape (3,), others of its "
        "micro-batch are torch.float32 of shape (2,)"
    ) in told


@pytest.mark.parametrize(
    ("usual", "odd", "told"),
    [
        ((torch.zeros(2), 1), (torch.zeros(2, 1), 1), r"shape \(2, 1\)"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(4)}, r"\{x: .*shape \(4,\)\}"),
        ({"x": 1}, {"y": 1}, r"\{y: int\}"),
        ((1, 2), (1, 2, 3), r"\(int, int, int\)"),
        (torch.zeros(2), None, "NoneType"),
        (np.zeros(2), np.zeros(3), r"float64 of shape \(3,\)"),
    ],
)
def test_whatever_a_sample_is_the_odd_one_is_named(usual: Any, odd: Any, told: str) -> None:
    class Made(Numbers):
        def __getitem__(self, index: int) -> Any:
            return odd if index == 7 else usual

    told_now = refusal(source(Made(), micro=SAMPLES))
    assert re.search(rf"data\.train \(Made\): sample 7 is .*{told}", told_now)
    assert "\n" not in told_now


def test_a_set_that_returns_fewer_samples_than_asked_for_is_an_error() -> None:
    """Or a sample would be missing from its epoch without a word."""
    assert "data.train (FaultyMany)" in refusal(source(FaultyMany(forgets=True), micro=SAMPLES))


def test_a_worker_that_is_killed_is_an_error_that_names_the_data_set() -> None:
    assert "data.train (Faulty)" in refusal(source(Faulty(kills=7)), workers=2)


# --- random numbers ----------------------------------------------------------------------------


class Augmented(Numbers):
    """Adds noise from each of the three global generators."""

    def __getitem__(self, index: int) -> Tensor:
        noise = [random.random(), float(np.random.random()), torch.rand(()).item()]
        return torch.tensor([index, *noise], dtype=torch.float64)


class AugmentedMany(Augmented):
    """The same for many at once."""

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self[index] for index in indices])


class AugmentedTogether(Augmented):
    """A list of many at once."""

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("make", [Augmented, AugmentedMany])
def test_augmentation_is_the_same_on_any_number_of_workers(make: Callable[[], Any]) -> None:
    alone = batches(source(make()), workers=0, steps=2)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with_workers = batches(source(make()), workers=2, steps=2)
    assert len(alone) == len(with_workers) == 8
    for one, other in zip(alone, with_workers, strict=True):
        assert torch.equal(one, other)


def noise_by_sample(made: Source, epoch: int = 0) -> dict[int, tuple[float, ...]]:
    found = {}
    for batch in Fetcher(made, CPU).steps(epoch, epoch + 1, 0, 1):
        for index, *noise in batch.tolist():
            found[int(index)] = tuple(noise)
    return found


def test_augmentation_depends_on_seed_epoch_and_sample_and_on_nothing_else() -> None:
    first = noise_by_sample(source(Augmented()))
    assert first == noise_by_sample(source(Augmented(), micro=1))
    assert first == noise_by_sample(source(Augmented(), shuffled=False))
    others = [
        first,
        noise_by_sample(source(Augmented()), epoch=1),
        noise_by_sample(source(Augmented(), seed=2)),
    ]
    streams = [noise for other in others for noise in other.values()]
    assert len(set(streams)) == 3 * SAMPLES
    for generator in range(3):
        assert len({noise[generator] for noise in streams}) == 3 * SAMPLES


@pytest.mark.parametrize("make", [AugmentedMany, AugmentedTogether])
def test_many_at_once_differ_between_samples_epochs_and_micro_batches(
    make: Callable[[], Any],
) -> None:
    streams = [
        noise for epoch in range(2) for noise in noise_by_sample(source(make()), epoch).values()
    ]
    assert len(set(streams)) == 2 * SAMPLES


def test_splits_do_not_share_their_noise() -> None:
    train = source(Augmented())
    val = Source("val", Augmented(), train.plan)
    assert noise_by_sample(train) != noise_by_sample(val)


# --- iterating ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_together_fetch_what_one_rank_fetches(workers: int) -> None:
    made = source(Numbers(), micro=3)
    alone = [rows(batch) for batch in batches(made)]
    parts = [Fetcher(made, CPU, workers).steps(0, 1, rank, 3) for rank in range(3)]
    assert [rows(batch) for part in parts for batch in part] == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_may_fetch_its_micro_batches_again(workers: int) -> None:
    made = source(Numbers(), micro=3)
    fetched = Fetcher(made, CPU, workers).fetch(made.plan.micro_batches(0))
    first, second = ([rows(batch) for batch in fetched] for _ in range(2))
    assert first == second
    assert len(first) == 7


def test_steps_are_fetched_as_they_are_needed() -> None:
    """A run of 10^9 steps must not be listed, nor read ahead of where it is, without workers."""
    dataset = Numbers()
    steps: Iterator[Any] = Fetcher(source(dataset), CPU).steps(10**6, 10**9, 0, 1)
    next(steps)
    assert len(dataset.asked) == 5


def digest(made: Source, workers: int = 0) -> dict[str, Any]:
    return Fetcher(made, CPU, workers).digest()


def test_data_is_told_from_other_data() -> None:
    first = digest(source(Numbers()))
    assert first == digest(source(Numbers(), seed=9, micro=3))
    assert first["samples"] == SAMPLES
    assert first != digest(source(Numbers(SAMPLES + 1)))
    assert first["sha256"] != digest(source(Faulty()))["sha256"]
    assert digest(source(Augmented())) == digest(source(Augmented()))
    assert digest(source(InMemory()))["sha256"] == first["sha256"]


def test_a_digest_reads_sixteen_samples_at_most() -> None:
    dataset = Numbers(10_000)
    digest(source(dataset))
    assert len(dataset.asked) == 16
    assert digest(source(Numbers(1)))["samples"] == 1


def test_a_micro_batch_of_one_is_a_batch() -> None:
    made = source(InMemory())
    assert made.of_indices([3], MicroBatch(0, 0, 0, 0, 1))[0].shape == (1, 2)


class Arrays(Numbers):
    """Gives whole micro-batches as numpy arrays."""

    def __getitems__(self, indices: list[int]) -> Any:
        return {"x": np.array(indices), "names": [str(i) for i in indices]}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_task_receives_tensors_with_workers_and_without(workers: int) -> None:
    (batch,) = Fetcher(source(Arrays(), micro=SAMPLES), CPU, workers).steps(0, 1, 0, 1)
    assert isinstance(batch["x"], Tensor)
    assert batch["names"] == [str(int(i)) for i in batch["x"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_garbage_is_looked_for_once_data_is_loaded(workers: int) -> None:
    usual = gc.get_threshold()
    assert usual == garbage.STEADY
    garbage.defer()
    try:
        assert gc.get_threshold() == garbage.STARTING
        (batch,) = Fetcher(source(Thresholds()), CPU, workers).fetch([MicroBatch(0, 0, 0, 0, 1)])
        assert (tuple(batch[0].tolist()), gc.get_threshold()) == (usual, usual)
    finally:
        gc.set_threshold(*usual)


def test_a_command_defers_looking_for_garbage() -> None:
    program = "import runpy, sys; sys.argv = ['ddptrain', '--help']\n"
    program += "try: runpy.run_module('ddptrain', run_name='__main__')\n"
    program += "except SystemExit: import gc; print(gc.get_threshold()[0])"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.stdout.splitlines()[-1] == str(garbage.STARTING[0]), told.stderr
