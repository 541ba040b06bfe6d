"""Brings a micro-batch from a data set: whole where the set can, else sample by sample."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate, default_convert

from ddptrain import garbage, pulse
from ddptrain.data.plan import MicroBatch, Plan
from ddptrain.errors import DataAway, DataError, LostWorker
from ddptrain.files import may_pass
from ddptrain.generators import key_generators
from ddptrain.keys import derive
from ddptrain.parent import SIGNALS, end_with_parent


@dataclass
class Source:
    """One split: fetches micro-batches of ``dataset`` by index, keyed and with errors that tell.

    A data set may offer ``__getitems__(indices)``: if it returns a list, that is samples to be
    collated; anything else is taken as the finished batch. A ``TensorDataset`` is indexed whole.
    Before each sample (each micro-batch, where they come whole) the global generators of Python,
    numpy and torch are keyed from (seed, epoch, index), so that augmentation depends neither on
    ranks nor on workers nor on a restart.
    """

    name: str
    dataset: Any
    plan: Plan

    def __post_init__(self) -> None:
        self.in_memory = type(self.dataset).__getitem__ is TensorDataset.__getitem__
        self.fetches_many = hasattr(self.dataset, "__getitems__")

    def batch(self, micro_batch: MicroBatch) -> Any:
        """Return the collated samples of ``micro_batch``. Raises ``DataError``."""
        indices = self.plan.indices(micro_batch)
        if self.in_memory:
            rows = torch.from_numpy(indices)
            return tuple(tensor.index_select(0, rows) for tensor in self.dataset.tensors)
        return self.of_indices(indices.tolist(), micro_batch)

    def of_indices(self, indices: list[int], micro_batch: MicroBatch) -> Any:
        """Return the collated samples at ``indices``, with the random keys of ``micro_batch``."""
        if self.in_memory:
            return self.dataset[torch.tensor(indices)]
        if not self.fetches_many:
            return self._collate([self._sample(i, micro_batch.epoch) for i in indices], indices)
        self._key(micro_batch.epoch, indices[0])
        try:
            fetched = self.dataset.__getitems__(indices)
        except Exception as error:
            raise self._failure(f"samples {indices}", error) from error
        if not isinstance(fetched, list):
            return default_convert(fetched)  # type: ignore[no-untyped-call]
        if len(fetched) != len(indices):
            raise DataError(
                f"{self.label}: {len(fetched)} samples came of {len(indices)} asked for"
            )
        return self._collate(fetched, indices)

    def _sample(self, index: int, epoch: int) -> Any:
        self._key(epoch, index)
        try:
            return self.dataset[index]
        except Exception as error:
            raise self._failure(f"sample {index}", error) from error

    def _key(self, epoch: int, index: int) -> None:
        key_generators(derive(self.plan.seed, f"sample/{self.name}", epoch, index))

    def _collate(self, samples: Sequence[Any], indices: list[int]) -> Any:
        try:
            return default_collate(list(samples))
        except Exception as error:
            shapes = [_shape(sample) for sample in samples]
            usual = Counter(shapes).most_common(1)[0][0]
            odd = [i for i, shape in zip(indices, shapes, strict=False) if shape != usual]
            if not odd:
                raise self._failure(f"samples {indices}", error) from error
            raise DataError(
                f"{self.label}: sample {odd[0]} is {shapes[indices.index(odd[0])]}, "
                f"others of its micro-batch are {usual}; samples must have one shape and type"
            ) from error

    @property
    def label(self) -> str:
        return f"data.{self.name} ({type(self.dataset).__name__})"

    def _failure(self, where: str, error: Exception) -> DataError:
        kind = DataAway if may_pass(error) else DataError
        return kind(f"{self.label}: {where}: {type(error).__name__}: {error}")


def _shape(sample: Any) -> str:
    if isinstance(sample, Tensor | np.ndarray):
        return f"{sample.dtype} of shape {tuple(sample.shape)}"
    if isinstance(sample, tuple | list):
        return f"({', '.join(map(_shape, sample))})"
    if isinstance(sample, dict):
        return f"{{{', '.join(f'{k}: {_shape(v)}' for k, v in sample.items())}}}"
    return type(sample).__name__


class _ByMicroBatch:
    """Gives torch's DataLoader, which asks a data set for samples, whole micro-batches instead."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, micro_batch: MicroBatch) -> Any:
        return self.source.batch(micro_batch)


class Fetcher:
    """Fetches micro-batches in order, moved to ``device``; with workers, ahead of their use.

    One iterator serves all epochs of a training, and one set of workers all evaluations, so that
    workers start once and an epoch's end costs nothing.
    """

    def __init__(self, source: Source, device: torch.device, workers: int = 0) -> None:
        self.source = source
        self.device = device
        self.workers = workers

    def fetch(self, micro_batches: Iterable[MicroBatch]) -> Iterable[Any]:
        """Return the batches of ``micro_batches``; as often iterable as those are."""
        if self.workers == 0:
            return _InThisProcess(self.source, micro_batches, self.device)
        on_gpu = self.device.type == "cuda"
        loader: DataLoader[Any] = DataLoader(
            _ByMicroBatch(self.source),  # type: ignore[arg-type]
            sampler=micro_batches,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=on_gpu,
            persistent_workers=True,
            worker_init_fn=_serve_the_rank,
        )
        watched = _Watched(loader, self.source.label)
        return _Moved(watched, self.device) if on_gpu else watched

    def digest(self) -> dict[str, Any]:
        """Tell this data from other data: its length, and a hash of 16 samples spread over it.

        By the same road as batches: where workers open the files, this process must not.
        """
        count = self.source.plan.samples
        whole = replace(self.source, plan=Plan(count, count, 1, shuffled=False))
        digest = sha256()
        # One by one: samples that no micro-batch holds together need not have one shape.
        starts = sorted({count * i // 16 for i in range(16)})
        micro_batches = [MicroBatch(0, start, 0, start, start + 1) for start in starts]
        for batch in Fetcher(whole, self.device, self.workers).fetch(micro_batches):
            pulse.enter(pulse.LOADING)
            for tensor in tensors_in(batch):
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                flat = tensor.cpu().contiguous().view(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        return {"samples": count, "sha256": digest.hexdigest()}

    def steps(self, first: int, last: int, rank: int, world_size: int) -> Iterator[Any]:
        """The batches that ``rank`` trains on in the steps ``first`` to ``last - 1``."""
        plan = self.source.plan
        return iter(
            self.fetch(
                chain.from_iterable(
                    plan.micro_batches(step, rank, world_size) for step in range(first, last)
                )
            )
        )


def _serve_the_rank(_: int) -> None:
    """Live as long as the rank that this worker loads for, and no longer.

    A signal to the whole process group (Ctrl-C, scancel) asks the rank to stop after its step, for
    which it needs this worker. SIGTERM counts if it comes from the rank.
    """
    end_with_parent()
    ignored = set(SIGNALS) - {signal.SIGTERM}
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
    threading.Thread(target=_end_when_told, args=[os.getppid()], daemon=True).start()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait: one that came between the fork of a worker and its first line would end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_when_told(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)


@dataclass
class _InThisProcess:
    source: Source
    micro_batches: Iterable[MicroBatch]
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        garbage.resume()
        batches = map(self.source.batch, self.micro_batches)
        return batches if self.device.type == "cpu" else iter(_Moved(batches, self.device))


@dataclass
class _Watched:
    """Says whose worker it was that died; what a worker raises says so itself."""

    batches: Iterable[Any]
    label: str

    def __iter__(self) -> Iterator[Any]:
        garbage.resume()  # in workers as well
        try:
            with _signals_held():
                batches = iter(self.batches)  # where workers are forked
            yield from batches
        except RuntimeError as error:
            raise LostWorker(f"{self.label}: a loading worker died: {error}") from error


@dataclass
class _Moved:
    batches: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        return (to_device(batch, self.device) for batch in self.batches)


def to_device(batch: Any, device: torch.device) -> Any:
    """Copy every tensor of a batch to ``device``, without waiting for it to arrive."""
    if isinstance(batch, Tensor):
        return _pinned(batch, device).to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The same values where a GPU can fetch them itself; else a large copy waits for the stream."""
    is_on_host = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if device.type != "cuda" or not is_on_host or not tensor.is_contiguous():
        return tensor
    return tensor.pin_memory()


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        yield from chain.from_iterable(map(tensors_in, batch.values()))
    elif isinstance(batch, tuple | list):
        yield from chain.from_iterable(map(tensors_in, batch))
