"""The tensors of a base that are compared: all that training does not change."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora.layers import is_quantised, quantised_entries, repacks
from lightning_lora.model.base_values import base_values
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import of_type, where, with_values, without
from lightning_lora.tensors.names import join, names_joined

Tensors = Mapping[str, Tensor]  # by name


def base_tensors(view: View) -> dict[str, Tensor]:
    """Return the base's tensors: all frozen parameters, and buffers with the values from before training.

    Adapted weights are among them: of a merged one, the values without its update.

    Rows that train by themselves are zero here: resizing an embedding draws others each
    time. Embeddings with ``max_norm`` are left out: their own forward rescales the
    rows, always to the same values. So are the scales of four-bit weights: bitsandbytes
    may round them when it changes the layout for inference and back.
    """
    left_out = _rescaled_embeddings(view) | _repacked_scales(view)
    tensors = without(base_values(view), left_out)
    return {**tensors, **_with_zero_rows(tensors, rows_of(view))}


def _rescaled_embeddings(view: View) -> set[str]:
    """All names of the weights that embeddings with ``max_norm`` rescale."""
    embeddings = of_type(view.modules, nn.Embedding).values()
    rescaled = {
        embedding.weight for embedding in embeddings if embedding.max_norm is not None
    }
    return set(with_values(view.base_parameters, rescaled))


def _repacked_scales(view: View) -> set[str]:
    """The names of the entries of layers that bitsandbytes may pack in another way."""
    return _names_of_entries(where(view.modules, repacks))


def _names_of_entries(modules: Mapping[str, nn.Module]) -> set[str]:
    """The names of the extra state dict entries of quantised layers."""
    names = set[str]()
    for prefix, module in modules.items():
        names.update(names_joined(prefix, quantised_entries(module)))
    return names


def _with_zero_rows(
    tensors: Tensors, rows: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Copies of the embeddings whose ``rows`` train by themselves, with zeros in these rows.

    An embedding with several names has one copy.
    """
    copies = dict[int, Tensor]()
    copies_by_name = dict[str, Tensor]()
    for name, tokens in rows.items():
        weight = tensors[name]
        if id(weight) not in copies:
            places = torch.tensor(tokens, device=weight.device)
            copies[id(weight)] = weight.index_fill(0, places, 0)
        copies_by_name[name] = copies[id(weight)]
    return copies_by_name


def rows_of(view: View) -> dict[str, tuple[int, ...]]:
    """Return which rows of embeddings train by themselves, by all names of the weights."""
    rows_by_weight = dict[Tensor, tuple[int, ...]]()
    for layer, matrices in view.matrices.items():
        first = matrices[0]  # if single rows train, they are their layer's only matrix
        weight = view.base_parameters.get(join(layer, first.weight))
        if weight is not None:
            rows_by_weight[weight] = first.tokens
    rows = {
        name: rows_by_weight.get(weight, ())
        for name, weight in view.base_parameters.items()
    }
    return where(rows, bool)


def quantised_names(view: View) -> set[str]:
    """Return the names of quantised weights and their entries."""
    names = _names_of_entries(view.modules)
    for prefix, module in view.modules.items():
        for name in module._parameters.keys():  # noqa: SIM118  # a scripted module's is no iterable
            if is_quantised(module, name):
                names.add(join(prefix, name))
    return names


def dtypes_of(tensors: Tensors) -> list[str]:
    """Return the names of the dtypes of some tensors."""
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    return sorted(names)


def is_convertible(tensor: Tensor) -> bool:
    """Return whether a tensor has values in half precision."""
    return tensor.is_floating_point() and not tensor.is_meta
