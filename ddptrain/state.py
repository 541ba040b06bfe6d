"""What is saved: the state of a run as named tensors and a few numbers, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddptrain.errors import CheckpointError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """A run after ``step`` steps: tensors by file and name, as they are now, and what is no tensor.

    The tensors are the living ones: who keeps them must copy them before the next step.
    """

    step: int
    files: dict[str, Tensors]
    numbers: dict[str, Any]


def on_host(state: State) -> State:
    """A copy of ``state`` in memory of its own."""
    files = {
        file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        for file, tensors in state.files.items()
    }
    return State(state.step, files, state.numbers)


def model_tensors(task: nn.Module) -> Tensors:
    """Parameters and persistent buffers by name; names that DDP or compile add never appear."""
    return {name: tensor.detach() for name, tensor in task.state_dict().items()}


def unshared(tensors: Tensors) -> Tensors:
    """The same values, each in memory of its own, as safetensors wants them: tied weights twice."""
    seen: set[int] = set()
    alone: Tensors = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        alone[name] = tensor.clone() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return alone


def optimizer_tensors(task: nn.Module, optimizer: Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """The optimiser's state as tensors named ``<parameter>/<key>``, and what is no tensor.

    Some optimisers count in their groups: those entries are named ``#<group>/<key>``.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in task.named_parameters()}
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in _entries(state):
            where = tensors if isinstance(value, Tensor) else numbers
            where[f"{names[parameter]}/{key}"] = value
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"#{index}/{key}"] = value
            elif isinstance(value, bool | int | float) and key != "lr":
                numbers[f"#{index}/{key}"] = value
    return tensors, numbers


def _entries(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What an optimiser keeps of a parameter; of a list its length and what is in it, by place."""
    for key, value in state.items():
        if isinstance(value, list):
            yield f"{key}[]", len(value)
            yield from ((f"{key}[{i}]", each) for i, each in enumerate(value) if each is not None)
        else:
            yield key, value


def _place(state: dict[str, Any], key: str, value: Any) -> None:
    """Put back what ``_entries`` took, in whatever order."""
    name, bracket, place = key.partition("[")
    if not bracket:
        state[key] = value
        return
    listed = state.setdefault(name, [])
    wanted = int(value) if place == "]" else int(place[:-1]) + 1
    listed.extend([None] * (wanted - len(listed)))
    if place != "]":
        listed[wanted - 1] = value


def load_model(task: nn.Module, tensors: Tensors) -> None:
    """Put named tensors into a module. Raises ``CheckpointError`` naming the first that differs."""
    own = task.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(
            f"the checkpoint is of another model: it lacks {missing[:3]} and has {unknown[:3]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"the checkpoint is of another model: {name} is {tuple(tensor.shape)} there, "
                f"{tuple(own[name].shape)} here"
            )
    task.load_state_dict(tensors)


def load_optimizer(
    task: nn.Module, optimizer: Optimizer, tensors: Tensors, numbers: dict[str, Any]
) -> None:
    """Put back what ``optimizer_tensors`` took; learning rates are the schedule's, not state."""
    parameters = dict(task.named_parameters())
    optimizer.state.clear()
    for full, value in {**tensors, **numbers}.items():
        name, _, key = full.rpartition("/")
        if name.startswith("#"):
            value = value.clone() if isinstance(value, Tensor) else value
            optimizer.param_groups[int(name[1:])][key] = value
            continue
        parameter = parameters[name]
        if isinstance(value, Tensor):
            # A step counter may live on the host while its parameter is on a device.
            on_host = key == "step" and not _counts_on_device(optimizer)
            value = value.clone() if on_host else value.to(parameter.device, copy=True)
        _place(optimizer.state[parameter], key, value)


def _counts_on_device(optimizer: Optimizer) -> bool:
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


def fingerprint(task: nn.Module) -> str:
    """SHA-256 over parameters and buffers in name order, as little-endian bytes."""
    from hashlib import sha256

    digest = sha256()
    for _, tensor in sorted(model_tensors(task).items()):
        flat = tensor.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
