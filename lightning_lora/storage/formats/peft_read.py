"""Read a PEFT adapter for a model.

The layers come from the names of the tensors, the numbers from the configuration.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, LoRAWarning, listed
from lightning_lora.model.view import View
from lightning_lora.storage.formats.libraries import PEFT_CONFIG, PEFT_WEIGHTS
from lightning_lora.storage.formats.peft_config import read_numbers
from lightning_lora.storage.formats.peft_keys import plain, sorted_by_layer
from lightning_lora.storage.formats.peft_layers import updates_in, with_rows
from lightning_lora.storage.formats.updates import Foreign, Update, assembled, base_value, place_of, uses_of
from lightning_lora.tensors.names import join


def weights_of(path: Path) -> Path:
    """Return the file with the tensors.

    It is ``path`` itself, or in the folder ``path``.

    Raises:
        AdapterFileError: the folder holds no adapters.
    """
    if not os.path.isdir(path):  # noqa: PTH112  # Path raises if a name is too long
        return path
    found = [path / name for name in PEFT_WEIGHTS if (path / name).is_file()]
    if not found:
        raise AdapterFileError(
            f"{path} is not a file, and as a folder it holds no adapters of PEFT. Expected {PEFT_CONFIG} and "
            f"{PEFT_WEIGHTS[0]}. Otherwise pass a .safetensors file or a Trainer's .ckpt file."
        )
    return found[0]


def read_peft(view: View, tensors: Mapping[str, Tensor], path: Path) -> Foreign:
    """Return what a PEFT file is in this package.

    Args:
        view: The model, which is not merged.
        tensors: The tensors of the file.
        path: The file. Its configuration is beside it.

    Raises:
        AdapterFileError: the file or its configuration cannot be used.
        AdapterMismatchError: it does not fit the model.
        BaseMismatchError: it holds frozen weights that are not those of the model.

    Warns:
        LoRAWarning: it is not clear which alpha a layer was trained with.
    """
    numbers = read_numbers(path.parent / PEFT_CONFIG)
    found = sorted_by_layer(tensors, path)
    place = place_of(view, [plain(name) for name in found.layers], list(found.rest))
    unclear = [name for name in map(plain, found.layers) if numbers.is_unclear(name)]
    if unclear:
        warnings.warn(
            f"Several keys of alpha_pattern fit {listed(unclear)}. The first one in the file is used, as in "
            "PEFT. But PEFT sorts the keys when it saves: in training, it may have been another one.",
            LoRAWarning,
            stacklevel=6,
        )
    rows: dict[str, Tensor] = {}
    for name, tensors_of_layer in list(found.layers.items()):
        tied = uses_of(view, join(place.name_here(name), "weight"))
        if "tokens" in tensors_of_layer and len(tied) > 1 and _is_tied_there(view):
            rows |= dict.fromkeys(tied, with_rows(view, name, place.name_here(name), found.layers.pop(name), numbers))
    updates = updates_in(view, found, numbers, place)
    rest = rows | {place.name_here(name): value for name, value in found.rest.items()}
    by_name = {update.name: update for update in updates}
    for name, tensors_of_layer in found.layers.items():
        if "bias" in tensors_of_layer:
            rest |= _with_bias(view, by_name.get(place.name_here(name)), tensors_of_layer["bias"], rest)
    settings = LoRAConfig(dropout=numbers.dropout, init=numbers.init, use_rslora=numbers.use_rslora)
    return assembled(view, updates, rest, settings, numbers.modules_to_save)


def _is_tied_there(view: View) -> bool:
    """Whether PEFT trains rows of an embedding in its other use too: in models that say that both are tied."""
    return any(
        getattr(getattr(module, "config", None), "tie_word_embeddings", False) for module in view.modules.values()
    )


def _with_bias(view: View, update: Update | None, bias: Tensor, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer's own bias, with that of B (PEFT's ``lora_bias``) in it."""
    name = join(update.name, "bias") if update else ""
    if update is None or update.magnitude is not None or name not in view.base:
        raise AdapterMismatchError(
            f"lora_B of {update.name if update else 'a layer'!r} has a bias (lora_bias=True), which can only become a "
            "part of the layer's own bias. The layer has none, or has DoRA. Merge it with PEFT, and use the merged "
            "model."
        )
    own = rest.get(name, base_value(view, name)).cpu()
    return {name: own + (update.scaling * bias.double()).to(own.dtype)}
