"""Hashes of tensors, to tell their contents apart."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.private import count_modes
from lightning_lora.tensors.shards import first_local, full_tensor, is_dtensor, is_one_run, split_dims, to_local

_BITS = 18
_CHUNK = 1 << _BITS  # elements whose products stay in a cache


def digest(tensor: Tensor) -> int:
    """Return a 63-bit hash of the tensor's bits.

    The bytes are read as integers of at most 32 bits. Each is multiplied by an odd number that depends on its position,
    and all products are summed. A change of one element always changes the sum. Other changes go unnoticed with a
    probability of about ``2**-63``. The cost is about one pass over the tensor. It guards against mistakes, not against
    forged weights.

    Collective for a DTensor: it is the hash of the full tensor.
    """
    if is_dtensor(tensor):
        return digests([tensor])[0]
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor that consists of others, such as a quantised one
        total = 0
        for name in tensor.__tensor_flatten__()[0]:
            total = (3 * total + digest(getattr(tensor, name))) % (1 << 63)
        return total
    if tensor.layout is not torch.strided:
        sparse = tensor.detach().to_sparse_coo().coalesce()  # the dense tensor may be too large
        return (3 * digest(sparse.indices()) + digest(sparse.values())) % (1 << 63)
    return _digest_of_integers(_integers(tensor))


def digests(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[int]:
    """Return the digests of tensors in ``dtype``. DTensors take one message a placement, or are gathered."""
    tensors = [full_tensor(each) if is_dtensor(each) and not is_one_run(each) else each for each in tensors]
    found = [0 if is_dtensor(tensor) else digest(tensor.to(dtype or tensor.dtype)) for tensor in tensors]
    placed: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if is_dtensor(tensor):
            placed.setdefault((tensor.device_mesh, split_dims(tensor)), []).append(place)
    for (mesh, dims), places in placed.items():
        sums = torch.stack([_local_sum(tensors[place].to(dtype or tensors[place].dtype)) for place in places])
        sums = sums.to(mesh.device_type)
        for dim in dims:
            torch.distributed.all_reduce(sums, group=mesh.get_group(dim))
        for place, total in zip(places, sums.tolist(), strict=True):
            itemsize = (dtype or tensors[place].dtype).itemsize
            found[place] = (tensors[place].numel() * max(1, itemsize // 4) + total) % (1 << 63)
    return found


def _local_sum(tensor: Tensor) -> Tensor:
    """The sum of the products of a DTensor's local shard, modulo 2**64."""
    integers, multipliers = _integers(to_local(tensor)), _multipliers(to_local(tensor).device)
    place, total = first_local(tensor) * max(1, tensor.element_size() // 4), multipliers.new_zeros(())
    for piece in (integers[: -place % _CHUNK], *integers[-place % _CHUNK :].split(_CHUNK)):
        chunk, offset = divmod(place, _CHUNK)
        total += _sum_of_products(piece, multipliers[offset : offset + len(piece)]) * multipliers[-1 - chunk]
        place += len(piece)
    return total


def digests_as(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> list[int]:
    """Return a floating-point tensor's digests in other dtypes. It is read once, and not copied as a whole."""
    if tensor.layout is not torch.strided or hasattr(tensor, "__tensor_flatten__") or not tensor.numel():
        return [digest(tensor.to(dtype)) for dtype in dtypes]
    sums, counts = {dtype: list[Tensor]() for dtype in dtypes}, dict.fromkeys(dtypes, 0)
    for chunk in tensor.detach().contiguous().reshape(-1).split(_CHUNK):
        for dtype in dtypes:
            integers = _integers(chunk.to(dtype))
            sums[dtype] += _sums(integers)
            counts[dtype] += integers.numel()
    return [_total(sums[dtype], counts[dtype]) for dtype in dtypes]


def _integers(tensor: Tensor) -> Tensor:
    """The bits of a tensor, as a vector of integers of at most 32 bits."""
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return values.view({1: torch.uint8, 2: torch.int16}.get(values.element_size(), torch.int32))


def _digest_of_integers(integers: Tensor) -> int:
    """The hash of a vector of integers. A device is waited for once."""
    count = integers.numel()
    if 0 < count <= _CHUNK:  # one chunk, as in every look at a tensor: to stack it would take longer than to hash it
        multipliers = _multipliers(integers.device)
        return (count + int(_sum_of_products(integers, multipliers[:count]) * multipliers[-1])) % (1 << 63)
    return _total(_sums(integers), count) if count else 0


def _sums(integers: Tensor) -> list[Tensor]:
    """The sum of products of each chunk."""
    multipliers = _multipliers(integers.device)
    return [_sum_of_products(chunk, multipliers[: chunk.numel()]) for chunk in integers.split(_CHUNK)]


def _total(sums: list[Tensor], count: int) -> int:
    """The hash of ``count`` integers with these sums of their chunks."""
    total = (torch.stack(sums) * _multipliers(sums[0].device)[-len(sums) :].flip(0)).sum()
    return (count + int(total)) % (1 << 63)


def _sum_of_products(integers: Tensor, multipliers: Tensor) -> Tensor:
    """The sum modulo 2**64. On a CPU, ``dot`` is a third faster; other devices have none for integers."""
    if integers.device.type == "cpu":
        return torch.dot(integers.long(), multipliers)
    return (integers * multipliers).sum()


_MULTIPLIERS: dict[torch.device, Tensor] = {}


def _multipliers(device: torch.device) -> Tensor:
    """Odd 64-bit numbers, as good as random, by SplitMix64's mixing function (Steele et al. 2014, section 5)."""
    if device in _MULTIPLIERS:
        return _MULTIPLIERS[device]
    mixed = torch.arange(1, _CHUNK + 1, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    made = (mixed ^ (mixed >> 31)) | 1
    if not count_modes():  # whose tensors may be fake
        _MULTIPLIERS[device] = made
    return made
