"""Read what a file holds, of this package or of another library. No code in it is run.

What is returned, its contents, is one of these:

=========================================  ================================================
a safetensors file of this package         ``{"state_dict": {name: tensor}, KEY: description}``
another safetensors file                   ``{name: tensor, ..., HEADER: what its header says}``
an archive of torch, such as a checkpoint  what was saved
=========================================  ================================================
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.storage.beside_adapters import reduce_to_adapters
from lightning_lora.storage.formats.format import HEADER
from lightning_lora.storage.on_disk import (
    archives,
    places,
    plain_pickles,
    read_errors,
    safetensors_bytes,
)
from lightning_lora.storage.stored import KEY
from lightning_lora.tensors.dicts import of_type, only, where_not
from lightning_lora.tensors.values import is_computable


def read_contents(path: str | Path | IO[bytes]) -> Any:
    """Return a file's contents. Of a checkpoint, objects of classes are not built."""
    return _read_with(path, partial(_load_plain, path))


def read_checkpoint(
    path: str | Path | IO[bytes], *, weights_only: bool, map_location: Any = "cpu"
) -> Any:
    """Return the contents of a checkpoint, with hyperparameters and all else in it.

    ``map_location`` is that of ``torch.load``.
    """
    remedy = (
        "If you trust it, pass weights_only=False to load_from_checkpoint. If not, "
        "build the model yourself, and call load_adapter(model, path): it reads only "
        "the adapters."
    )
    load = partial(torch.load, map_location=map_location, weights_only=weights_only)
    return _read_with(path, load, remedy=remedy)


def check_computable(contents: Mapping[Any, Any], path: object) -> None:
    """Refuse tensors with which torch cannot compute, in a file's contents or in a dict inside of them."""
    odd = list[str]()
    for group in (contents, *of_type(contents, dict).values()):
        tensors = of_type(group, Tensor)
        odd += where_not(tensors, _has_usable_values)
    if odd:
        raise AdapterFileError(
            f"{path} holds {listed(map(str, odd))}, with which nothing can be "
            "computed: they are sparse, of 8 bits, or have no values. Write the file "
            "again with the values of .to_dense() or .float()."
        )


def _has_usable_values(tensor: Tensor) -> bool:
    """Whether torch can compute with a tensor."""
    return is_computable(tensor) and not tensor.is_quantized and not tensor.is_meta


def _read_with(
    path: str | Path | IO[bytes], load: Callable[[Any], Any], remedy: str = ""
) -> Any:
    """The contents of a file. An archive of torch is read by ``load``.

    Messages have ``path``, as the user gave it. ``local`` is where the file lies on this
    machine.
    """
    if not places.is_open_file(path):
        places.check_path(path)
    with read_errors.reading(path, remedy), places.on_this_machine(path) as local:
        archives.check_is_file(local, path)
        # it is opened once, because another process may replace it at any time
        with places.opened(local) as file:
            kind = archives.kind_of(file)
            if kind is archives.Kind.SAFETENSORS:
                return _read_safetensors(file.read())
            _check_is_archive(file, kind, path)
            contents = load(file)
            # this changes the contents: what else lies in their state, such as a merged
            # model, is taken out
            reduce_to_adapters(contents)
            return contents


def _check_is_archive(file: Any, kind: archives.Kind, path: object) -> None:
    """Refuse an open file that is not a whole archive of torch."""
    archives.check_new_format(kind, path)
    if kind is archives.Kind.OTHER:
        found = archives.what_it_is(file)
        raise AdapterFileError(
            f"{path} is no archive of torch, and no file of safetensors: {found}"
        )
    archives.check_archive(file, path)


def _load_plain(path: object, file: Any) -> Any:
    """The contents of an archive, without objects of classes. Among adapters, these are refused."""
    contents = plain_pickles.load_plain(file)
    if not isinstance(contents, dict):
        return contents
    # training loops of other libraries save a state as "model"
    with_adapters = only(contents, ("state_dict", KEY, "model"))
    unread = plain_pickles.unread_in(with_adapters)
    if unread:
        raise AdapterFileError(
            f"{path} holds {listed(unread)} among its adapters, which must be plain "
            "tensors. Pass a file that save_adapter or a Trainer with LoRACallback "
            "wrote."
        )
    return contents


def _read_safetensors(contents: bytes) -> dict[str, Any]:
    """The tensors of a safetensors file, and what its header says."""
    # sorted, because the library gives them in another order each time
    tensors = dict(sorted(load_tensors(contents).items()))
    header = safetensors_bytes.header_in(contents).get(HEADER, {})
    description = json.loads(header.get(KEY, "null"))
    if description is None:
        return {**tensors, HEADER: header}
    return {"state_dict": tensors, KEY: description}
