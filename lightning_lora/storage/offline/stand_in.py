"""A model with the layers of a base.

A file of the base says which tensors there are. A PEFT file says which layers it adapts, and the shapes say what these
layers are. So a PEFT file can be read as for the model itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, AdapterMismatchError, listed
from lightning_lora.storage.foreign.peft.keys import PeftTensors, plain
from lightning_lora.storage.foreign.peft.numbers import Numbers
from lightning_lora.storage.offline.tensor_files import TensorFiles
from lightning_lora.storage.renaming import Renaming, common_lead
from lightning_lora.tensors.names import join, owner_of, starts_of

_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""Convolutions by the number of dimensions of their weight."""

_CONV1D = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
"""transformers' linear layer with a weight (in, out). It is known by its name, so transformers need not be there."""


def stand_in(files: TensorFiles, found: PeftTensors, numbers: Numbers) -> nn.Module:
    """Return a model with the tensors of a base.

    They have the names that a PEFT file has for them. Modules in ``modules_to_save`` that the base does not have, such
    as a new head, are added, with zeros.

    Args:
        files: The base.
        found: The tensors of the PEFT file.
        numbers: What its configuration says.

    Raises:
        AdapterFileError: the PEFT file adapts what cannot be told from files.
        AdapterMismatchError: the base does not have the adapted layers, or not in these shapes.
    """
    _check_told(found, numbers)
    tensors = _renamed(files, found)
    for name, value in found.rest.items():
        if name not in tensors and _is_saved(name, numbers):
            tensors[name] = torch.zeros_like(value)
    factors = {plain(name): own for name, own in found.layers.items()}
    return _built(files.path.resolve().name, tensors, _layers(files.path, factors, tensors, numbers))


def _check_told(found: PeftTensors, numbers: Numbers) -> None:
    """Refuse what only the model can tell."""
    tokens = [plain(name) for name, tensors in found.layers.items() if "tokens" in tensors]
    for what, names in (
        ("target_parameters, and the files do not say how their modules use them", numbers.target_parameters),
        ("trainable_token_indices, and the files do not say whether the output layer shares these rows", tokens),
    ):
        if names:
            raise AdapterFileError(
                f"The PEFT file adapts {listed(names)} by {what}. Load it onto its model with "
                "load_adapter(model, folder), and save it with save_adapter."
            )


def _is_saved(name: str, numbers: Numbers) -> bool:
    """Whether ``modules_to_save`` names a module around this tensor. PEFT compares the ends of names."""
    return any(module.endswith(entry) for module in starts_of(owner_of(name)) for entry in numbers.modules_to_save)


# Names


def _renamed(files: TensorFiles, found: PeftTensors) -> dict[str, Tensor]:
    """The tensors of the base, by the names that PEFT's model has: one prefix may be more there, or less."""
    names = list(files.file_of)
    modules = {name[:end] for name in names for end, letter in enumerate(name) if letter == "."}
    layers = [plain(name) for name in found.layers]
    place = _place(files, layers, modules)
    inside = [name for name in names if not place.here or name.startswith(f"{place.here}.")]
    renamed = {place.name_there(name): name for name in names}
    renamed |= {place.name_there(name): name for name in inside}  # which count more than the same names outside
    return {there: files.get(name) for there, name in renamed.items()}


def _place(files: TensorFiles, layers: list[str], modules: set[str]) -> Renaming:
    """How the names of PEFT's model become those of the base."""
    without = [Renaming(lead, "") for lead in common_lead(layers)]
    below = [Renaming("", module) for module in sorted(modules)]
    for ways in (without, below):
        fitting = [way for way in ways if all(way.name_here(layer) in modules for layer in layers)]
        if len(fitting) > 1 and ways is below:
            raise AdapterMismatchError(
                f"The layers of the PEFT file are in {files.path} in several places: "
                f"{listed(way.here for way in fitting)}. Pass a base that holds the model once."
            )
        if fitting:
            return fitting[0]
    missing = [layer for layer in layers if layer not in modules]
    raise AdapterMismatchError(
        f"{files.path} has no layers {listed(missing)}, which the PEFT file adapts. Its tensors are such as "
        f"{listed(files.file_of)}. Pass the base that the adapters were trained on."
    )


# Layers


def _layers(
    path: Path, factors: Mapping[str, Mapping[str, Tensor]], tensors: Mapping[str, Tensor], numbers: Numbers
) -> dict[str, nn.Module]:
    """The adapted layers, as their shapes tell, without values."""
    transposed, found = _transposed(factors, tensors, numbers), dict[str, nn.Module]()
    for name, own in factors.items():
        attention = _attention_around(name, tensors)
        if attention is not None:
            found[attention] = _attention(attention, tensors)
            continue
        weight = tensors.get(join(name, "weight"))
        if weight is None or not weight.is_floating_point():
            kind = "no weight" if weight is None else f"a weight of {weight.dtype}"
            raise AdapterMismatchError(
                f"{path} has {kind} of {name!r}, which the PEFT file adapts. Pass the base that the adapters were "
                "trained on, not quantised."
            )
        layer = _CONV1D() if name in transposed else _layer(own, weight)
        if layer is None:
            shapes = {what: tuple(value.shape) for what, value in own.items()}
            raise AdapterMismatchError(
                f"The weight of {name!r} is {tuple(weight.shape)} in {path}, and the PEFT file holds {shapes}: no "
                "layer that PEFT adapts fits both. Pass the base that the adapters were trained on."
            )
        found[name] = layer
    return found


def _attention_around(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The nn.MultiheadAttention that has this name, or this output projection."""
    outer, _, leaf = name.rpartition(".")
    attention = outer if leaf == "out_proj" else name
    weights = [tensors.get(join(attention, key)) for key in ("in_proj_weight", "out_proj.weight")]
    shapes = [tuple(weight.shape) for weight in weights if weight is not None and weight.is_floating_point()]
    width = shapes[0][-1] if shapes and shapes[0] else 0
    return attention if width and shapes == [(3 * width, width), (width, width)] else None


def _attention(name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    width = tensors[join(name, "in_proj_weight")].shape[1]
    return nn.MultiheadAttention(width, 1, bias=join(name, "in_proj_bias") in tensors, device="meta")


def _layer(factors: Mapping[str, Tensor], weight: Tensor) -> nn.Module | None:
    """A layer with this weight that PEFT adapts with these factors, or None."""
    is_embedding = "embedding_A" in factors
    a, b = (factors.get(f"embedding_{letter}" if is_embedding else letter) for letter in "AB")
    if a is None or b is None or min(each.dim() if each.numel() else 0 for each in (a, b, weight)) < 2:
        return None
    (reads, *kernel), writes, (rows, columns, *own_kernel) = a.shape[1:], b.shape[0], weight.shape
    if is_embedding:
        fits = (rows, columns) == (reads, writes) and not own_kernel
        return nn.Embedding(rows, columns, device="meta") if fits else None
    groups, rest = divmod(reads, columns)
    if rows != writes or kernel != own_kernel or rest or not groups or rows % groups:
        return None
    if weight.dim() == 2:
        return nn.Linear(columns, rows, bias=False, device="meta") if groups == 1 else None
    if weight.dim() not in _CONVOLUTIONS:
        return None
    layer: nn.Module = _CONVOLUTIONS[weight.dim()](reads, rows, tuple(kernel), groups=groups, bias=False, device="meta")
    return layer


def _transposed(
    factors: Mapping[str, Mapping[str, Tensor]], tensors: Mapping[str, Tensor], numbers: Numbers
) -> set[str]:
    """The adapted layers with a weight (in, out), which are transformers' Conv1D.

    The shapes tell, by the factors or the bias, except of a square weight. It is an nn.Linear if nothing speaks of
    Conv1D. Otherwise it is what other layers of this name are, as GPT-2's attn.c_proj is what mlp.c_proj is.
    """
    told, square = dict[str, bool](), list[str]()
    for name, weight in tensors.items():
        layer, _, leaf = name.rpartition(".")
        writing = factors.get(layer, {}).get("B", tensors.get(join(layer, "bias")))
        if leaf != "weight" or weight.dim() != 2 or writing is None or not writing.dim():
            continue
        if len(writing) not in weight.shape:  # no linear layer
            continue
        if weight.shape[0] != weight.shape[1]:
            told[layer] = len(writing) == weight.shape[1]
        elif "A" in factors.get(layer, {}):
            square.append(layer)
    if numbers.fan_in_fan_out or any(told.values()):
        alike = {layer: {told[other] for other in told if _leaf(other) == _leaf(layer)} for layer in square}
        unclear = [layer for layer, kinds in alike.items() if len(kinds) != 1]
        if unclear:
            raise AdapterFileError(
                f"The weights of {listed(unclear)} are square, and there are layers of transformers' Conv1D, whose "
                "weights are the other way round than those of nn.Linear: the files do not say which of them these "
                "are. Load the PEFT file onto its model with load_adapter(model, folder), and save it with "
                "save_adapter."
            )
        told |= {layer: kinds.pop() for layer, kinds in alike.items()}
    return {layer for layer, is_transposed in told.items() if is_transposed and layer in factors}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _built(title: str, tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> nn.Module:
    """A module with these tensors and layers. Its class has the name of the file, for errors."""
    model: nn.Module = type(title, (nn.Module,), {})()
    for layer in layers.values():
        for module in layer.modules():  # the base may have no bias
            module._parameters.update(dict.fromkeys(module._parameters))
    for name, value in tensors.items():
        *path, leaf = name.split(".")
        holder, place = model, ""
        for part in path:
            place = join(place, part)
            inner = holder._modules.get(part) or layers.get(place) or nn.Module()
            holder._modules[part] = inner
            holder = inner
        if value.is_floating_point():
            holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            holder._buffers[leaf] = value
    return model
