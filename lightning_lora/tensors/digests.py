"""Hashes of tensors, to tell their contents apart."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.private import count_modes
from lightning_lora.tensors.shards import (
    first_local,
    full_tensor,
    is_dtensor,
    is_one_run_of_values,
    sharding_dims,
    to_local,
)

_CHUNK = 1 << 18  # integers whose products stay in a cache
_RANGE = 1 << 63  # a digest is smaller than this

# The dtype of the integers by the bytes of an element. Wider elements are read as int32:
# one for 4 bytes, two for 8.
_INTEGERS = {1: torch.uint8, 2: torch.int16}


def digest(tensor: Tensor) -> int:
    """Return a 63-bit hash of the tensor's bits.

    The bytes are read as integers of at most 32 bits. Each is multiplied by an odd
    number that depends on its position, and all products are summed. A change of one
    element always changes the sum. Other changes go unnoticed with a probability of
    about ``2**-63``. The cost is about one pass over the tensor. It guards against
    mistakes, not against forged weights.

    The integers are in chunks of 2**18, and there are as many odd numbers m
    (:func:`_multipliers`). Integer i of chunk c is multiplied by m[i] · m[-1 - c]. So
    the sum of a chunk's products m[i] · x[i] is multiplied once, by m[-1 - c]. The
    number of integers is added at the end.

    Collective for a DTensor: it is the hash of the full tensor.
    """
    if is_dtensor(tensor):
        return digests([tensor])[0]
    if holds_inner_tensors(tensor):
        return _digest_of_inner(tensor)
    if tensor.layout is not torch.strided:
        return _digest_of_sparse(tensor)
    return _digest_of_integers(_integers(tensor))


def holds_inner_tensors(tensor: Tensor) -> bool:
    """Whether a tensor holds its values in other tensors, as a quantised one does."""
    return hasattr(tensor, "__tensor_flatten__")


def inner_tensors(tensor: Any) -> list[Tensor]:
    """Return the tensors that hold the values of a tensor which consists of others."""
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def _digest_of_inner(tensor: Tensor) -> int:
    total = 0
    for inner in inner_tensors(tensor):
        total = (3 * total + digest(inner)) % _RANGE
    return total


def _digest_of_sparse(tensor: Tensor) -> int:
    # the dense tensor may be too large
    sparse = tensor.detach().to_sparse_coo().coalesce()
    indices = digest(sparse.indices())
    values = digest(sparse.values())
    return (3 * indices + values) % _RANGE


def _digest_of_integers(integers: Tensor) -> int:
    """The hash of a vector of integers. The program waits for the device only once."""
    count = integers.numel()
    if count > _CHUNK:
        return _total(_sums_of_chunks(integers), count)
    # Each look at a tensor hashes samples, which are one chunk. To stack its sum, as
    # _total does, would take longer than to hash it.
    multipliers = _multipliers(integers.device)
    total = _sum_of_products(integers, multipliers[:count]) * _multiplier_of_chunk(
        0, multipliers
    )
    return (count + int(total)) % _RANGE


# Digests of many tensors


def digests(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[int]:
    """Return the digests of tensors in ``dtype``.

    Collective if there are DTensors. Each process hashes its shards. All DTensors
    with the same placement share the messages that add up their sums. A DTensor whose shards are not
    one run of its values is gathered instead.
    """
    found = [0] * len(tensors)
    distributed: dict[Any, list[int]] = {}  # by placement: the indices of DTensors
    for index, tensor in enumerate(tensors):
        if is_dtensor(tensor) and is_one_run_of_values(tensor):
            placement = (tensor.device_mesh, sharding_dims(tensor))
            distributed.setdefault(placement, []).append(index)
        else:
            found[index] = digest(_converted(full_tensor(tensor), dtype))
    for (mesh, dims), indices in distributed.items():
        sums = _sums_over_processes(
            [tensors[index] for index in indices], dtype, mesh, dims
        )
        for index, total in zip(indices, sums, strict=True):
            tensor = tensors[index]
            count = tensor.numel() * _integers_per_element(dtype or tensor.dtype)
            found[index] = (count + total) % _RANGE
    return found


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _integers_per_element(dtype: torch.dtype) -> int:
    return max(1, dtype.itemsize // 4)


def _sums_over_processes(
    tensors: Sequence[Tensor], dtype: torch.dtype | None, mesh: Any, dims: Sequence[int]
) -> list[int]:
    """The sums of products of DTensors in ``dtype``, over all processes that hold shards of them."""
    local_sums = [_sum_of_shard(_converted(tensor, dtype)) for tensor in tensors]
    sums = torch.stack(local_sums).to(mesh.device_type)
    for dim in dims:
        torch.distributed.all_reduce(sums, group=mesh.get_group(dim))
    totals: list[int] = sums.tolist()
    return totals


def _sum_of_shard(tensor: Tensor) -> Tensor:
    """The sum of the products of a DTensor's local shard, modulo 2**64."""
    shard = to_local(tensor)
    integers = _integers(shard)
    multipliers = _multipliers(shard.device)
    total = multipliers.new_zeros(())
    # where the next integer is in the full tensor
    place = first_local(tensor) * _integers_per_element(shard.dtype)
    # a shard may begin inside a chunk of the full tensor
    missing_in_chunk = -place % _CHUNK
    end_of_chunk = integers[:missing_in_chunk]
    later_chunks = integers[missing_in_chunk:].split(_CHUNK)
    for piece in (end_of_chunk, *later_chunks):
        chunk, offset = divmod(place, _CHUNK)
        products = _sum_of_products(piece, multipliers[offset : offset + len(piece)])
        total += products * _multiplier_of_chunk(chunk, multipliers)
        place += len(piece)
    return total


def digests_as(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> list[int]:
    """Return a floating-point tensor's digests in other dtypes.

    The tensor is read once, and not copied as a whole. Its chunks of 2**18 elements are
    as many integers, or twice as many in a dtype of 64 bits: then each gives the sums of
    two chunks of integers.
    """
    is_plain = tensor.layout is torch.strided and not holds_inner_tensors(tensor)
    if not is_plain:
        return [digest(tensor.to(dtype)) for dtype in dtypes]
    sums = defaultdict[torch.dtype, list[Tensor]](list)
    counts = Counter[torch.dtype]()
    for chunk in tensor.detach().contiguous().reshape(-1).split(_CHUNK):
        for dtype in dtypes:
            integers = _integers(chunk.to(dtype))
            sums[dtype] += _sums_of_chunks(integers)
            counts[dtype] += integers.numel()
    return [_total(sums[dtype], counts[dtype]) for dtype in dtypes]


# The arithmetic


def _integers(tensor: Tensor) -> Tensor:
    """The bits of a tensor, as a vector of integers of at most 32 bits."""
    values = tensor.detach().resolve_conj().resolve_neg()
    values = values.contiguous().reshape(-1)
    return values.view(_INTEGERS.get(values.element_size(), torch.int32))


def _sums_of_chunks(integers: Tensor) -> list[Tensor]:
    """The sum of the products of each chunk, not yet multiplied by the chunk's own multiplier."""
    multipliers = _multipliers(integers.device)
    chunks = integers.split(_CHUNK)
    return [_sum_of_products(chunk, multipliers[: chunk.numel()]) for chunk in chunks]


def _total(sums: list[Tensor], count: int) -> int:
    """The hash of ``count`` integers with these sums of their chunks."""
    multipliers = _multipliers(sums[0].device)
    # these are what _multiplier_of_chunk returns for 0, 1, 2 and so on
    multipliers_of_chunks = multipliers[-len(sums) :].flip(0)
    total = (torch.stack(sums) * multipliers_of_chunks).sum()
    return (count + int(total)) % _RANGE


def _multiplier_of_chunk(chunk: int, multipliers: Tensor) -> Tensor:
    """The number by which the sum of a chunk is multiplied: the last one for the first chunk, and so on."""
    return multipliers[-1 - chunk]


def _sum_of_products(integers: Tensor, multipliers: Tensor) -> Tensor:
    """The sum of integers times multipliers, modulo 2**64.

    On a CPU, ``dot`` is a third faster. Other devices have no ``dot`` for integers.
    """
    if integers.device.type == "cpu":
        return torch.dot(integers.long(), multipliers)
    return (integers * multipliers).sum()


_MULTIPLIERS: dict[torch.device, Tensor] = {}


def _multipliers(device: torch.device) -> Tensor:
    """Odd 64-bit numbers, as good as random, by SplitMix64's mixing function (Steele et al. 2014, section 5).

    Its constants are written as negative numbers: torch's integers of 64 bits have a
    sign.
    """
    if device in _MULTIPLIERS:
        return _MULTIPLIERS[device]
    mixed = torch.arange(1, _CHUNK + 1, device=device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    made = (mixed ^ (mixed >> 31)) | 1
    tensors_may_be_fake = count_modes() > 0
    if not tensors_may_be_fake:
        _MULTIPLIERS[device] = made
    return made
