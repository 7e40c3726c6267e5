"""Values of tensors: copy, replace and compare them."""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.shards import is_dtensor, to_local


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value of a state is a tensor: a function for :func:`.where`."""
    return isinstance(value, Tensor)


def is_computable(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor with which torch can compute: not a sparse one, nor one in float8."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    is_float8 = value.dtype.itemsize == 1 and value.is_floating_point()
    return not is_float8


def detached(value: Any) -> Any:
    """Return a tensor without its graph, or another value as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def copy_to_host(tensor: Tensor) -> Tensor:
    """Return a copy in CPU memory. A tensor without values stays on the meta device."""
    return (
        tensor.detach().clone()
        if tensor.is_meta
        else tensor.detach().to("cpu", copy=True)
    )


def replace_values(tensor: Tensor, values: Tensor) -> None:
    """Replace the values of a tensor, which stays the same object.

    Nothing is copied, but to a DTensor.
    """
    if is_dtensor(tensor):
        _replace_distributed_values(tensor, values)
        return
    # a tensor of inference mode has no version counter: it takes values of that mode, or
    # torch refuses every use of it
    if tensor.is_inference() and not values.is_inference():
        with torch.inference_mode():
            values = values.clone()
    tensor.data = values


def _replace_distributed_values(tensor: Tensor, values: Tensor) -> None:
    """Copy into a DTensor's shard, or swap the whole tensor if its shard has another dtype or shape."""
    shard = to_local(tensor)
    new_shard = to_local(values)
    if tensor.dtype == values.dtype and shard.shape == new_shard.shape:
        shard.copy_(new_shard)  # FSDP2 sends this memory to the other processes
    else:
        torch.utils.swap_tensors(tensor, nn.Parameter(values, tensor.requires_grad))


def set_aside(tensor: Tensor) -> Tensor:
    """Return values to keep, in CPU memory, before :func:`replace_values`.

    They are copied only if necessary.
    """
    if is_dtensor(tensor):
        return copy_to_host(tensor)
    values = tensor.data.cpu()
    # a view of larger memory would keep all of it, which others may write to
    is_view = values.untyped_storage().nbytes() > values.nbytes
    return values.clone() if is_view else values


def put_back(tensor: Tensor, values: Tensor, device: torch.device) -> None:
    """Give a tensor on ``device`` the values that :func:`set_aside` has returned."""
    # this frees the device memory that the tensor holds, before the copy needs some
    replace_values(tensor, values)
    replace_values(tensor, values.to(device))


def set_requires_grad(tensor: Tensor, flag: bool) -> None:
    """Set ``requires_grad``, also of a tensor made in ``torch.inference_mode``."""
    with torch.inference_mode(tensor.is_inference()):
        tensor.requires_grad_(flag)


class PlaceInMemory(NamedTuple):
    """Where the values of a tensor are. Of two tensors with one place, each shows what is written into the other."""

    address: int
    size: int


def place_in_memory(tensor: Tensor) -> PlaceInMemory:
    """Return where the values of a tensor are.

    On meta they have no address, nor have those of other classes: then it is the
    tensor's own identity.
    """
    has_address = type(tensor) in (Tensor, nn.Parameter) and tensor.data_ptr() != 0
    address = tensor.data_ptr() if has_address else id(tensor)
    return PlaceInMemory(address, tensor.nbytes)


def same_bits(tensor: Tensor, original: Tensor) -> bool:
    """Whether two tensors have the same bits in the first one's dtype.

    Of a DTensor, the local shard is compared. The tensors may be on different devices:
    a digest is the same on each.
    """
    tensor, original = to_local(tensor), to_local(original)
    if tensor.is_meta or original.is_meta:
        return tensor.is_meta == original.is_meta
    if tensor.shape != original.shape:
        return False
    converted = original.to(tensor.dtype)
    return digest(tensor.cpu()) == digest(converted)
