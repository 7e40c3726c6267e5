"""A file of this package whose names differ from the model's by one prefix."""

from dataclasses import replace

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, listed, misfits, warn
from lightning_lora.model.view import View
from lightning_lora.storage.inner_model import root_of
from lightning_lora.storage.renaming import (
    Renaming,
    entries_inside,
    find_renamings,
    names_without_prefix,
)
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.whole_names import by_whole_names
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import names_not_in, owner_of, owner_or_itself


def with_names_of(view: View, stored: StoredAdapters) -> StoredAdapters:
    """Return the adapters of a file of this package, by a model's names.

    These may differ by one prefix. A file is refused that holds modules which the model
    lacks.
    """
    if not view.modules.keys() >= stored.layers.keys():
        stored = _with_another_prefix(view, stored)
    _check_present(view, stored)
    return stored


def _with_another_prefix(view: View, stored: StoredAdapters) -> StoredAdapters:
    """Return adapters by a model's names, if these differ by one prefix.

    Otherwise they are returned as they are: the caller refuses them.
    """
    found = find_renamings(
        list(stored.layers),
        view.modules,
        root_there=stored.root,
        root_here=root_of(view.model),
    )
    if len(found) == 1 and _is_all_inside(view, found[0].here):
        return _renamed(view, stored, found[0])
    places = [renaming.here for renaming in found if renaming.here]
    if places:
        raise AdapterMismatchError(
            f"The names in the file fit in {view.title} below {listed(places)}, and it "
            "holds other weights too. Load the file onto that part: "
            f"load_adapter(model.get_submodule({places[0]!r}), path)."
        )
    return stored


def _is_all_inside(view: View, prefix: str) -> bool:
    """Whether all weights of a model have this prefix."""
    return not names_without_prefix(view.tensors, prefix)


def _renamed(view: View, stored: StoredAdapters, renaming: Renaming) -> StoredAdapters:
    """Return what a file holds by the model's names, and say so."""
    _refuse_outside(stored, renaming.there, view.title)
    warn(renaming.told(view.title))
    return stored.with_names_of_model(
        renaming, _config_for_model(view, stored, renaming)
    )


def _config_for_model(
    view: View, stored: StoredAdapters, renaming: Renaming
) -> LoRAConfig:
    """The configuration of a file, by the model's names.

    It names each layer and each module that trains in full: the file's own patterns might
    mean other modules here.
    """
    # the file's model is the module ``renaming.here`` of this model
    modules_and_parameters = {**view.modules, **view.parameters}
    names = without(
        entries_inside(renaming.here, modules_and_parameters), [renaming.here]
    )
    saved = [
        name for name in names if stored.config.is_saved(renaming.name_there(name))
    ]
    settings = replace(stored.config, modules_to_save=saved or None)
    layers = [layer.renamed(renaming.name_here) for layer in stored.layers.values()]
    return by_whole_names(layers, settings, view.modules.keys())


def _refuse_outside(stored: StoredAdapters, prefix: str, title: str) -> None:
    """Refuse a file that holds other modules too, for which the model has no place."""
    outside = [
        owner_or_itself(name) for name in names_without_prefix(stored.state, prefix)
    ]
    if outside:
        raise AdapterMismatchError(
            f"The file's adapters fit {title}, but it also holds "
            f"{listed(dict.fromkeys(outside))}, outside of {prefix!r}. Load it onto "
            "the whole model that it was saved from, and take this module from there."
        )


def _check_present(view: View, stored: StoredAdapters) -> None:
    """Refuse a file with modules that the model lacks, before it is adapted."""
    absent = _absent_modules(view, stored) + _absent_tensors(view, stored)
    if absent:
        wrong = misfits({"unexpected": absent})
        raise AdapterMismatchError(
            f"These adapters do not fit {view.title}: {wrong}. The model lacks "
            "them: build the module as it was built for training, with as many layers. "
            "If the module makes them in setup, call model.setup('fit') first."
        )


def _absent_modules(view: View, stored: StoredAdapters) -> list[str]:
    """The modules of a file that a model lacks."""
    owners = dict.fromkeys(map(owner_of, stored.state))
    return names_not_in(owners, view.modules)


def _absent_tensors(view: View, stored: StoredAdapters) -> list[str]:
    """What trains in full in a file, and the buffers that were filled there, if a model lacks them."""
    saved = [
        name
        for name in names_not_in(stored.state, view.tensors)
        if stored.config.is_saved(name)
    ]
    filled = [
        name
        for name in names_not_in(stored.filled_in_state, view.tensors)
        if owner_of(name) in view.modules
    ]
    return [*saved, *filled]
