"""What PEFT's files cannot hold is refused before anything is written: layers, and what trains in full."""

from collections.abc import Collection

from lightning_lora.errors import ExportError, listed
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.naming.wrappers import trained_biases
from lightning_lora.storage.formats.peft.refusals.refused_layers import (
    adapted_around,
    refused_layers,
)
from lightning_lora.storage.renaming import entries_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import names_not_in

_LEAVE_OUT = (
    "A training without these layers (exclude_modules) can be exported. The whole "
    "merged model is for any code: save_merged(model, path)."
)


def refuse_what_peft_cannot_hold(export: Export) -> None:
    """Refuse what PEFT cannot hold, or would compute otherwise."""
    # this property comes before all else, because it refuses a file that lacks tensors
    saved = export.saved_tensors
    _refuse_layers(export)
    _check_modules_to_save(export)
    _check_is_in_root(export.stored)
    _check_entries(export.stored, saved)
    export.stored.check_finite()


# Layers


def _refuse_layers(export: Export) -> None:
    """Refuse layers that have a reason, all of them at once."""
    reasons = list[str]()
    for reason, names in refused_layers(export).items():
        reasons.append(f"{listed(names)}: {reason}")
    if reasons:
        raise ExportError(
            f"PEFT's format cannot hold all adapters of {export.stored.source}. "
            f"{' '.join(reasons)} {_LEAVE_OUT}"
        )


# What trains in full


def _check_modules_to_save(export: Export) -> None:
    """Refuse modules that PEFT would not find, and names by which it would save others too.

    PEFT saves each module whose name ends as an entry: ``head`` saves ``overhead``.
    """
    saved_for_reader = list(map(export.name_for_reader, export.stored.saved))
    others = names_not_in(export.stored_modules, saved_for_reader)
    for module in export.stored.saved:
        around = adapted_around(module, export.stored)
        if around:
            raise ExportError(
                f"modules_to_save names {module!r}, inside of {listed(around)}, whose "
                f"parameters are adapted: PEFT would not find it. {_LEAVE_OUT}"
            )
        name = export.name_for_reader(module)
        alike = [other for other in others if other.endswith(name)]
        if alike:
            raise ExportError(
                f"modules_to_save names {module!r}, and PEFT would also save "
                f"{listed(alike)}, because these names end alike. Name all, or rename "
                "one."
            )


def _check_is_in_root(stored: StoredAdapters) -> None:
    """Refuse what was trained outside of the module that the reader has."""
    outside = without(stored.state, entries_inside(stored.root, stored.state))
    if outside:
        raise ExportError(
            f"{listed(outside)} were trained outside of {stored.root!r}, and a file "
            "for that module cannot hold them. "
            'For a file of the whole module, set root="" (--root ""): '
            "PeftModel.from_pretrained(module, folder)."
        )


def _check_entries(stored: StoredAdapters, saved: Collection[str]) -> None:
    """Refuse what PEFT's file cannot hold.

    It has adapters, biases and the entries of modules trained whole.
    """
    exportable = stored.adapter_names().union(saved, trained_biases(stored))
    left = names_not_in(stored.state, exportable)
    if left:
        raise ExportError(
            f"PEFT's format has no place for {listed(left)}: it takes whole modules "
            "that are not tied to others, and no single parameters or buffers. Load a "
            "file onto its model and export that, or save the whole model."
        )
