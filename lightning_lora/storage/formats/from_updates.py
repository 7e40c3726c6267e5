"""What all formats of other libraries share as they are read: from updates of layers to adapters of this package.

A file holds updates, and the *rest*: tensors that were trained in full, and copies of
the base's. The code of each format gives both by their names in the model.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    listed,
    misfits,
    warn,
)
from lightning_lora.model.view import View
from lightning_lora.storage.formats.layer_updates import LayerUpdate
from lightning_lora.storage.formats.trained_in_full import (
    TrainedInFull,
    check_ties,
    find_trained,
    is_value_of_base,
)
from lightning_lora.storage.renaming import SAME_NAMES, Renaming, find_renamings
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.whole_names import by_whole_names
from lightning_lora.tensors.dicts import only, without
from lightning_lora.tensors.names import names_joined, names_not_in, owner_of

# Where a file's names lie in the model


def renaming_of(
    view: View, layers: Collection[str], entries: Collection[str], root: str
) -> Renaming:
    """Return how a file's names of layers and other tensors become those of the model: by one prefix.

    ``root`` is the module of the model for which the file may be. A file with the
    model's own names, or with those in its root, is nothing to warn of.
    """
    names = [*layers, *entries]
    known = {**view.modules, **view.base_parameters, **view.buffers}
    title = view.title
    found = find_renamings(names, known, root_here=root)
    if len(found) > 1:
        places = [renaming.here for renaming in found]
        raise AdapterMismatchError(
            f"The names in the file fit in {title} below {listed(places)}. Pass one of "
            "these modules instead of the whole model."
        )
    if not found:
        wrong = misfits({"unexpected": names_not_in(names, known)})
        raise AdapterMismatchError(
            f"These adapters do not fit {title}: {wrong}. Pass the model that they "
            "were trained on."
        )
    (renaming,) = found
    into_root = Renaming(there="", here=root)
    if renaming not in (SAME_NAMES, into_root):
        warn(renaming.told(title))
    return renaming


# All that a file holds


def stored_from_updates(
    view: View,
    updates: Collection[LayerUpdate],
    rest: Mapping[str, Tensor],
    settings: LoRAConfig,
    modules_to_save: Collection[str] | None = None,
) -> StoredAdapters:
    """Return what a file holds, as adapters of this package.

    Their configuration says how each layer is adapted. It cannot say which single rows
    train, so layers with some are described beside it.

    Args:
        view: The model.
        updates: The updates in the file.
        rest: The other tensors in it, by their names in the model.
        settings: What the file says of the training. Only its tensors say what trains
            in full, and whether DoRA is used.
        modules_to_save: The ends of the names of modules that train in full. None: the
            file does not say which.
    """
    if not updates:
        raise AdapterFileError(
            "The file holds no update of a layer. Load what it trains in full yourself."
        )
    _check_floating(updates)
    adapted_weights = _adapted_weights(updates)
    _check_copied_weights(view, rest, adapted_weights)
    trained = find_trained(view, without(rest, adapted_weights), modules_to_save)
    check_ties(view, trained.values)
    settings = _with_what_tensors_say(settings, updates, trained, adapted_weights)
    layers = [replace(update.layer, r=update.r) for update in updates]
    config = by_whole_names(layers, settings, view.modules.keys())
    state = dict[str, Any](trained.values)
    for update in updates:
        state |= update.tensors()
    layers_with_rows = {layer.name: layer for layer in layers if layer.tokens}
    return StoredAdapters(config, state, layers_with_rows)


def _check_floating(updates: Iterable[LayerUpdate]) -> None:
    """Refuse updates that other code has rounded to integers."""
    for update in updates:
        for factor in chain.from_iterable(update.factors):
            if not factor.is_floating_point() and not factor.is_complex():
                raise AdapterFileError(
                    f"The file holds the update of {update.layer.name!r} in "
                    f"{factor.dtype}: its values were rounded to "
                    "integers. Use the file as it was written, or write it again with "
                    "the values of .float()."
                )


def _with_what_tensors_say(
    settings: LoRAConfig,
    updates: Iterable[LayerUpdate],
    trained: TrainedInFull,
    adapted_weights: Collection[str],
) -> LoRAConfig:
    """The settings of a file, with those that only its tensors say."""
    return replace(
        settings,
        modules_to_save=[*trained.modules, *trained.parameters] or None,
        bias=_bias_argument(trained.biases, adapted_weights),
        use_dora=any(update.magnitude is not None for update in updates),
    )


def _adapted_weights(updates: Iterable[LayerUpdate]) -> set[str]:
    """The names of the weights that have an update."""
    names = set[str]()
    for update in updates:
        names.update(names_joined(update.layer.name, update.layer.shapes))
    return names


def _check_copied_weights(
    view: View, rest: Mapping[str, Tensor], adapted_weights: Collection[str]
) -> None:
    """Refuse copies of adapted weights that are not the model's.

    PEFT writes such copies of resized embeddings.
    """
    for name, value in only(rest, adapted_weights).items():
        if not is_value_of_base(view, name, value):
            shape = tuple(view.base_parameters[name].shape)
            raise BaseMismatchError(
                f"The file's copy of the base's {name!r} {tuple(value.shape)} differs "
                f"from that of {view.title} {shape}. Load the same weights, with "
                "embeddings of the same size."
            )


def _bias_argument(biases: Collection[str], adapted_weights: Collection[str]) -> Any:
    """The ``bias`` of a configuration that trains these biases: ``all``, if some are not of adapted layers."""
    if not biases:
        return "none"
    adapted_layers = set(map(owner_of, adapted_weights))
    are_of_adapted = adapted_layers.issuperset(map(owner_of, biases))
    return "lora_only" if are_of_adapted else "all"
