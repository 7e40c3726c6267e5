"""The updates in a PEFT file, as this package's factors."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.config import matches
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, listed
from lightning_lora.layers import LoRALayer, LoRAParameters, adapter_for
from lightning_lora.layers.attention import LoRAAttention
from lightning_lora.layers.conv1d import LoRAConv1D
from lightning_lora.layers.convolution import LoRAConvNd
from lightning_lora.layers.embedding import LoRAEmbedding, LoRAEmbeddingBag
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.recurrent import LoRARecurrent
from lightning_lora.model.view import View
from lightning_lora.storage.formats.peft_config import Numbers
from lightning_lora.storage.formats.peft_keys import PeftTensors, plain
from lightning_lora.storage.formats.updates import Update, base_value
from lightning_lora.storage.names import Renaming
from lightning_lora.tensors.inplace import combined
from lightning_lora.tensors.names import join

Tensors = Mapping[str, Tensor]


def updates_in(view: View, found: PeftTensors, numbers: Numbers, place: Renaming) -> list[Update]:
    """Return the updates of a PEFT file.

    Args:
        view: The model, which may be adapted already.
        found: The tensors of the file.
        numbers: What its configuration says.
        place: How its names become those of the model.

    Raises:
        AdapterMismatchError: a layer of the model is of another kind or shape.
        AdapterFileError: the file contradicts its configuration, or holds what this package does not have.
    """
    wrappers: dict[str, dict[str, Tensors]] = {}
    for wrapper, tensors in found.layers.items():
        wrappers.setdefault(_layer_of(view, plain(wrapper), place), {})[wrapper] = tensors
    return [_update(view, name, wrapped, numbers, place) for name, wrapped in wrappers.items()]


def _layer_of(view: View, name: str, place: Renaming) -> str:
    """The plain name of the layer. An attention's output projection belongs to the attention."""
    outer, _, inner = name.rpartition(".")
    above = view.modules.get(place.name_here(outer))
    return outer if inner == "out_proj" and isinstance(above, nn.MultiheadAttention) else name


def _update(view: View, there: str, wrapped: Mapping[str, Tensors], numbers: Numbers, place: Renaming) -> Update:
    name = place.name_here(there)
    layer = view.modules[name]
    kind, own_class = adapter_for(layer), layer.overlaid[0] if isinstance(layer, LoRALayer) else None
    if own_class is LoRAParameters or kind is None or kind is LoRARecurrent:
        return _parameters(view, there, wrapped, numbers, place)
    if kind is LoRAAttention:
        return _attention(view, there, wrapped, numbers, place)
    if len(wrapped) != 1:
        raise AdapterFileError(f"The file holds {listed(wrapped)}: two updates of one {type(layer).__name__}.")
    (tensors,) = wrapped.values()
    if "tokens" in tensors:
        return _tokens(view, there, name, tensors, numbers)
    a, b = _as_matrices(layer, kind, there, tensors, numbers)
    parts = kind.lora_matrices_of(layer)
    said = f"{there}.weight" if _is_named(there, numbers) else there  # patterns mean a parameter by its own name
    _rank(said, a, numbers, most=min(parts[0].reads, parts[0].writes))
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1:
        a = _shared_by_groups(layer, there, a)
    _check_shapes(name, layer, (parts[0].reads, parts[0].writes), a, b)
    return Update(name, kind, parts, ((a, b),), numbers.scaling(said), tensors.get("magnitude"))


def _is_named(there: str, numbers: Numbers) -> bool:
    """Whether ``target_parameters`` names the weight of this layer."""
    return any(matches(entry, f"{there}.weight") for entry in numbers.target_parameters)


def _as_matrices(
    layer: Any, kind: type[LoRALayer], there: str, tensors: Tensors, numbers: Numbers
) -> tuple[Tensor, Tensor]:
    """A and B of a layer, as matrices."""
    layer_class = layer.overlaid[1] if isinstance(layer, LoRALayer) else type(layer)
    if not issubclass(kind, LoRALinear | LoRAEmbedding | LoRAConvNd) or issubclass(kind, LoRAEmbeddingBag):
        raise AdapterMismatchError(
            f"The file has an update of {there!r}. In this model it is a {layer_class.__name__}, which PEFT does not "
            "adapt in this form. Pass the model that the file was trained on."
        )
    check_computes_alike(there, layer, kind)
    if "embedding_A" in tensors or "embedding_B" in tensors:
        return _pair(there, tensors, "embedding_")
    a, b = _pair(there, tensors)
    if issubclass(kind, LoRAEmbedding):  # named in target_parameters: a matrix (num, dim)
        return b.T, a.T
    if kind is LoRAConv1D and numbers.init == "olora":
        raise AdapterMismatchError(
            f"{there!r} is a Conv1D, trained with init_lora_weights='olora'. PEFT starts it from another matrix "
            "than its weight, so its update cannot be computed again. Merge it with PEFT, and use the merged model."
        )
    if kind is LoRAConv1D and _is_named(there, numbers):  # likewise: a matrix (in, out)
        return b.T, a.T
    if issubclass(kind, LoRAConvNd):
        if layer.groups == 1:
            a = a.flatten(1)
        b = b.flatten(1)
    return a, b


def check_computes_alike(name: str, layer: Any, kind: type[LoRALayer]) -> None:
    """Refuse a layer with which PEFT computes something else.

    Args:
        name: The name of the layer.
        layer: The layer, which may be adapted already.
        kind: Its adapter class.

    Raises:
        AdapterMismatchError: PEFT's update of its output is no update of its weight.
    """
    layer_class = layer.overlaid[1] if isinstance(layer, LoRALayer) else type(layer)
    if issubclass(kind, LoRAAttention):
        return
    if not cast(type[LoRALayer], combined(kind, layer_class))._lora_is_additive and not hasattr(layer, "embed_scale"):
        raise AdapterMismatchError(
            f"{name!r} is a {layer_class.__name__} with a forward of its own. PEFT adds the update to its output; "
            "here the layer runs on the updated weight, which may give other numbers. Merge it with PEFT, and use the "
            "merged model."
        )
    if issubclass(kind, LoRAConvNd) and (any(step != 1 for step in layer.dilation) or layer.padding_mode != "zeros"):
        raise AdapterMismatchError(
            f"{name!r} has dilation={layer.dilation} and padding_mode={layer.padding_mode!r}. PEFT's update of it "
            "has neither, so it is no update of its weight. It cannot be read."
        )


def _pair(there: str, tensors: Tensors, prefix: str = "") -> tuple[Tensor, Tensor]:
    """A and B of one wrapper."""
    pair = tensors.get(f"{prefix}A"), tensors.get(f"{prefix}B")
    if pair[0] is None or pair[1] is None:
        raise AdapterFileError(f"The file holds only one of A and B of {there!r}: it is damaged or was changed.")
    return pair[0], pair[1]


def _rank(pattern_name: str, a: Tensor, numbers: Numbers, *, most: int, stack: int = 1) -> int:
    """The rank of A, after a check that the configuration says the same."""
    rank, said = a.shape[0] // stack, numbers.rank(pattern_name)
    cut = min(said, most) if numbers.init in ("pissa", "olora") else said  # their start has no more
    if a.shape[0] != rank * stack or rank not in (said, cut):
        raise AdapterFileError(
            f"lora_A of {pattern_name!r} has rank {a.shape[0] / stack:g}, but the configuration says {said}: the "
            "scaling is not known. Use the adapter_config.json that was written with these tensors."
        )
    return rank


def _check_shapes(name: str, layer: nn.Module, sizes: tuple[int, int], a: Tensor, b: Tensor) -> None:
    reads, writes = sizes
    fits = a.dim() == b.dim() == 2 and (a.shape[1], b.shape[0]) == (reads, writes) and a.shape[0] == b.shape[1]
    if not fits:
        raise AdapterMismatchError(
            f"The file's update of {name!r} has factors {tuple(a.shape)} and {tuple(b.shape)}. This "
            f"{type(layer).__name__} reads {reads} features and writes {writes}. Pass the model that it was trained on."
        )


def _shared_by_groups(layer: Any, there: str, a: Tensor) -> Tensor:
    """A of a grouped convolution. PEFT's reads all channels; here, one A reads those of each group."""
    groups, width = layer.groups, layer.in_channels // layer.groups
    r = a.shape[0] // groups
    blocks = [a[i * r : (i + 1) * r, i * width : (i + 1) * width] for i in range(groups)]
    same = a.shape[0] == r * groups and all(torch.equal(block, blocks[0]) for block in blocks)
    if not same or int(a.count_nonzero()) != sum(int(block.count_nonzero()) for block in blocks):
        raise AdapterMismatchError(
            f"{there!r} is a convolution with groups={groups}, and its lora_A reads the channels of all groups. "
            "Here each group reads its own, so this update cannot be kept. Train it here, or use it with PEFT."
        )
    return blocks[0].flatten(1)


def _attention(view: View, there: str, wrapped: Mapping[str, Tensors], numbers: Numbers, place: Renaming) -> Update:
    """An nn.MultiheadAttention: q, k and v share A, and lie one after the other in B.

    PEFT adds the output projection's update twice, in its forward and in its merge.
    """
    name = place.name_here(there)
    layer: Any = view.modules[name]
    parts = {part.name: part for part in LoRAAttention.lora_matrices_of(layer)}
    width, used, factors = layer.embed_dim, [], []
    for wrapper, tensors in wrapped.items():
        a, b = _pair(wrapper, tensors)
        if "magnitude" in tensors or "bias" in tensors or not layer._qkv_same_embed_dim:
            raise AdapterMismatchError(
                f"{there!r} is an nn.MultiheadAttention with DoRA, lora_bias, kdim or vdim, which PEFT does not adapt. "
                "Pass the model that the file was trained on."
            )
        _rank(there, a, numbers, most=width)
        is_out = wrapper.endswith(".base_layer.out_proj")
        if plain(wrapper) != there and not is_out:
            raise AdapterMismatchError(
                f"The file has an update of {wrapper!r}, which its nn.MultiheadAttention never calls. PEFT ignores it. "
                f"Train {there!r} instead."
            )
        _check_shapes(name, layer, (width, width if is_out else 3 * width), a, b)
        if is_out:
            used.append(parts["out"])
            factors.append((a, 2 * b))
        else:
            used += [parts[letter] for letter in "qkv"]
            factors += [(a, block) for block in b.chunk(3)]
    return Update(name, LoRAAttention, tuple(used), tuple(factors), numbers.scaling(there))


def _tokens(view: View, there: str, name: str, tensors: Tensors, numbers: Numbers) -> Update:
    """Rows of an embedding that train: an update with one rank for each of them."""
    layer, weight = view.modules[name], base_value(view, join(name, "weight")).cpu()
    b = (with_rows(view, there, name, tensors, numbers).double() - weight.double()).T
    indices = _indices(there, numbers)
    a = torch.zeros(len(indices), len(weight))
    a[torch.arange(len(indices)), torch.tensor(indices)] = 1
    kind = adapter_for(layer)
    assert kind is not None
    return Update(name, kind, kind.lora_matrices_of(layer), ((a, b[:, indices].float()),), 1.0)


def _indices(there: str, numbers: Numbers) -> list[int]:
    """The rows of an embedding that train."""
    rows: list[int] | dict[str, list[int]] = numbers.tokens
    if isinstance(rows, dict):
        return next((value for key, value in rows.items() if there.endswith(key)), [])
    return rows


def with_rows(view: View, there: str, name: str, tensors: Tensors, numbers: Numbers) -> Tensor:
    """Return an embedding's weight with the file's rows in it.

    Args:
        view: The model.
        there: The name of the embedding in the file.
        name: Its name in the model.
        tensors: Its tensors in the file.
        numbers: What the configuration says.

    Raises:
        AdapterMismatchError: they are not rows of this embedding.
        AdapterFileError: the embedding has another update too.
    """
    layer, rows = view.modules[name], tensors["tokens"]
    if len(tensors) > 1 or not isinstance(layer, nn.Embedding):
        raise AdapterFileError(f"{there!r} trains single rows, and has another update too. That cannot be read.")
    indices = _indices(there, numbers)
    weight = base_value(view, join(name, "weight")).cpu()
    in_range = all(0 <= index < len(weight) for index in indices)
    if len(indices) != len(rows) or rows.shape[1:] != weight.shape[1:] or not in_range:
        raise AdapterMismatchError(
            f"The file holds {len(rows)} rows of {there!r}, and the configuration names {len(indices)} for an "
            f"embedding of {tuple(weight.shape)}. Pass the model and the adapter_config.json of the training."
        )
    weight = weight.to(torch.promote_types(weight.dtype, rows.dtype), copy=True)
    weight[indices] = rows.to(weight.dtype)
    return weight


# Parameters of modules


def _parameters(view: View, there: str, wrapped: Mapping[str, Tensors], numbers: Numbers, place: Renaming) -> Update:
    """Parameters of a module.

    PEFT wraps the module once for each of them, in the module's own order, so the last one is outermost.
    """
    name = place.name_here(there)
    layer = view.modules[name]
    own = [leaf for leaf, p in layer._parameters.items() if p is not None and not leaf.startswith("lora_")]
    named = [leaf for leaf in own if any(matches(entry, f"{there}.{leaf}") for entry in numbers.target_parameters)]
    inside_out = sorted(wrapped, key=len, reverse=True)
    if len(named) != len(wrapped):
        raise AdapterMismatchError(
            f"The file has {len(wrapped)} updates of {there!r}, a {type(layer).__name__} in this model, and "
            f"target_parameters in its configuration name {named or 'no parameter of it'}. Pass the model that it was "
            "trained on."
        )
    factors, scalings = [], []
    for leaf, wrapper in zip(named, inside_out, strict=True):
        factors.append(_stacked(layer, there, leaf, _pair(wrapper, wrapped[wrapper]), numbers))
        scalings.append(numbers.scaling(f"{there}.{leaf}"))
    if len(set(scalings)) > 1:
        factors = [(a, b * (scaling / scalings[0])) for (a, b), scaling in zip(factors, scalings, strict=True)]
    kind = adapter_for(layer)
    if kind is LoRARecurrent:
        by_weight = {part.weight: part for part in kind.lora_matrices_of(layer)}
        return Update(name, kind, tuple(by_weight[leaf] for leaf in named), tuple(factors), scalings[0])
    parts = tuple(LoRAParameters.lora_part(layer, leaf) for leaf in named)
    return Update(name, LoRAParameters, parts, tuple(factors), scalings[0])


def _stacked(
    layer: nn.Module, there: str, leaf: str, pair: tuple[Tensor, Tensor], numbers: Numbers
) -> tuple[Tensor, Tensor]:
    """A and B of a parameter. In a stack, A holds expert after expert; in B, the expert runs fastest."""
    (a, b), (*stack, writes, reads) = pair, layer.get_parameter(leaf).shape
    experts, swapped = math.prod(stack), bool(stack) and getattr(layer, "is_transposed", False)
    r = _rank(f"{there}.{leaf}", a, numbers, most=min(writes, reads), stack=experts)
    _check_shapes(f"{there}.{leaf}", layer, (writes, reads) if swapped else (reads, writes), a, b)
    if not stack:
        return a, b
    a, b = a.reshape(experts, r, -1), b.reshape(-1, r, experts).permute(2, 0, 1)
    return (b.transpose(-1, -2), a.transpose(-1, -2)) if swapped else (a, b)
