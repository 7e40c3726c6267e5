"""A file of this package whose names differ from the model's by one prefix."""

from collections.abc import Sequence
from dataclasses import replace

from lightning_lora.errors import AdapterMismatchError, listed, warn
from lightning_lora.model.view import View, root_of
from lightning_lora.storage.renaming import Renaming, find_renamings, is_inside, renamed_config
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.names import owner_of


def with_names_of(view: View, stored: StoredAdapters) -> StoredAdapters:
    """Return adapters by a model's names, which may differ by one prefix. Only those of a file of this package."""
    found = find_renamings(list(stored.layers), view.modules, root_there=stored.root, root_here=root_of(view.model))
    if len(found) == 1 and _is_all_inside(view, found[0].here):
        if found[0] != stored.renaming:
            stored = _renamed(view, replace(stored, renaming=found[0]))
    else:
        _refuse_parts(view, found)
    _check_present(view, stored)
    return stored


def _is_all_inside(view: View, prefix: str) -> bool:
    """Whether all weights of a model have this prefix."""
    return all(is_inside(name, prefix) for name in (*view.parameters, *view.buffers))


def _refuse_parts(view: View, found: Sequence[Renaming]) -> None:
    """Refuse a model of which only a part is that of the file."""
    places = [renaming.here for renaming in found if renaming.here]
    if places:
        raise AdapterMismatchError(
            f"The names in the file fit in {view.title} below {listed(places)}, and it holds other weights too. Load "
            f"the file onto that part: load_adapter(model.get_submodule({places[0]!r}), path)."
        )


def _renamed(view: View, stored: StoredAdapters) -> StoredAdapters:
    """Return what a file holds by the model's names."""
    title, renaming = view.title, stored.renaming
    _refuse_outside(stored, title)
    warn(renaming.told(title))
    return replace(
        stored,
        config=renamed_config(stored.config, stored.layers.values(), renaming, view),
        state=renaming.with_names_here(stored.state),
        changed=[renaming.name_here(name) for name in stored.changed],
        random=[renaming.name_here(name) for name in stored.random],
    )


def _refuse_outside(stored: StoredAdapters, title: str) -> None:
    """Refuse a file that holds other modules too, for which the model has no place."""
    prefix = stored.renaming.there
    outside = [owner_of(name) or name for name in stored.state if not is_inside(name, prefix)]
    if outside:
        raise AdapterMismatchError(
            f"The file's adapters fit {title}, but it also holds {listed(dict.fromkeys(outside))}, outside of "
            f"{prefix!r}. Load it onto the whole model that it was saved from, and take this module from there."
        )


def _check_present(view: View, stored: StoredAdapters) -> None:
    """Refuse a file with modules that the model lacks, before it is adapted."""
    absent = _absent(view, stored)
    if absent:
        title = view.title
        raise AdapterMismatchError(
            f"The file does not fit {title}: it holds {listed(absent)}, which {title} does not have. Load it onto the "
            "model that it was saved from. If the module makes them in setup, call model.setup('fit') first."
        )


def _absent(view: View, stored: StoredAdapters) -> list[str]:
    """The modules of a file that a model lacks, and then its tensors."""
    present = {*view.parameters, *view.buffers}
    owners = dict.fromkeys(map(owner_of, stored.state))
    absent = [owner for owner in owners if owner not in view.modules]
    absent += [name for name in stored.state if name not in present and stored.config.is_saved(name)]
    absent += [name for name in stored.filled if name not in present and owner_of(name) in view.modules]
    return absent
