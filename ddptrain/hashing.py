"""Hashes of tensors, made where the tensors lie: equal bits give equal hashes, on any device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

BLOCK = 1 << 20
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""By bytes of an element: 32 bits, times an odd number, leave no bit where only carries go."""
_odd: dict[torch.device, Tensor] = {}


def hash_tensor(tensor: Tensor) -> Tensor:
    """A 64-bit hash of the bits of ``tensor``, as a scalar int64 tensor on its device.

    Each element's bits times an odd number of its own, its upper half then folded into its lower,
    added up modulo 2⁶⁴: integer arithmetic, so the device's order does not matter, and one flipped
    bit always shows. Elements that change places show too, and signs that do. It is no defence
    against someone who wants two tensors to hash alike.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    bits = flat.view(INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for index, block in enumerate(torch.split(bits, BLOCK)):
        products = block * _multipliers(block)
        folded = (products >> 32).bitwise_and_(0xFFFF_FFFF).bitwise_xor_(products)
        total += folded.sum() * (2 * index + 1)
    return total


def hash_all(tensors: Iterable[Tensor]) -> Tensor:
    """The hashes of ``tensors``, int64, one each."""
    return torch.stack([hash_tensor(tensor) for tensor in tensors])


def hash_alike(tensors: Iterable[Tensor]) -> Tensor:
    """Hashes, int64, one each, to hold against those of tensors on devices of the same kind.

    On a host at the speed of memory, a tenth of what ``hash_all`` takes there.
    """
    tensors = list(tensors)
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return hash_all(tensors)
    flat = (t.detach().contiguous().view(-1).view(torch.uint8).numpy().data for t in tensors)
    return torch.tensor([xxh3_64_intdigest(each) - (1 << 63) for each in flat])


def _multipliers(block: Tensor) -> Tensor:
    device = block.device
    if device not in _odd or len(_odd[device]) < len(block):
        # 2⁶⁴ / φ, made odd, times an odd number: neighbours differ in all their digits.
        count = min(BLOCK, 1 << (len(block) - 1).bit_length())
        _odd[device] = torch.arange(1, 2 * count, 2, device=device) * -7046029254386353131
    return _odd[device][: len(block)]
