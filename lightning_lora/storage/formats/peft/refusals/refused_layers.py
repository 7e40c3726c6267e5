"""What PEFT's files cannot hold, or its models would compute otherwise. It is refused before anything is written."""

from collections.abc import Callable, Collection
from itertools import chain

from lightning_lora.errors import ExportError, listed
from lightning_lora.layers.kinds import LoRALinear
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.peft.counterparts import peft_layer, why_not
from lightning_lora.storage.formats.peft.naming.when_loaded import loading_of
from lightning_lora.storage.formats.peft.naming.wrappers import stand_ins_of, trained_biases
from lightning_lora.storage.formats.peft.refusals.refused_rows import why_not_rows, why_not_rows_of_file
from lightning_lora.storage.formats.writing import Source
from lightning_lora.storage.renaming import entries_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import join, names_not_in, owner_of, starts_of

_LEAVE_OUT = "Train without it (exclude_modules), or call merge_adapters and save the whole model."


def check_exportable(source: Source) -> None:
    """Refuse what PEFT cannot hold, or would compute otherwise."""
    saved = source.saved  # before all else: this refuses a file that lacks some of them
    _refuse_layers(source)
    _check_modules_to_save(source)
    _check_is_in_root(source.stored)
    _check_entries(source.stored, saved)
    source.stored.check_finite()


# Layers


def _refuse_layers(source: Source) -> None:
    """Refuse layers by the reasons below, all of them at once."""
    reasons = list[str]()
    for why, names in refused_layers(source).items():
        reasons.append(f"{listed(names)}: {why}")
    if reasons:
        raise ExportError(
            f"PEFT's format cannot hold all adapters of {source.stored.source}. {' '.join(reasons)} {_LEAVE_OUT}"
        )


def refused_layers(source: Source) -> dict[str, list[str]]:
    """Return the layers that PEFT cannot hold, or would compute otherwise, by the reason."""
    refused = dict[str, list[str]]()
    model = _ReaderModel(source)
    for layer in source.stored.layers.values():
        why = _why_refused(layer, source) or model.why_refused(layer)
        if why:
            refused.setdefault(why, []).append(layer.name)
    return refused


def _why_refused(layer: StoredLayer, source: Source) -> str:
    """The first reason why PEFT cannot hold a layer, or nothing."""
    for rule in _RULES:
        why = rule(layer, source)
        if why:
            return why
    return ""


def _why_not_of_its_kind(layer: StoredLayer, source: Source) -> str:
    """Why PEFT has no counterpart for such a layer, or one that computes something else."""
    magnitude = layer.matrices[0].parameter_name(Role.MAGNITUDE)
    return why_not(layer, source.stored.state.get(join(layer.name, magnitude)))


def _why_not_in_its_place(layer: StoredLayer, source: Source) -> str:
    """Why PEFT adapts no layer in its place, or with its values."""
    if layer.name == source.stored.root:
        return 'PEFT adapts layers inside a module, not the module itself. Pass root="", or the module around it.'
    if "out_proj.weight" in layer.shapes:
        leaf = layer.name.rpartition(".")[2]
        without_it = f"target_slices={{{leaf!r}: ['q', 'k', 'v']}}"
        return f"PEFT 0.21 adds the update of an attention's output projection twice; {without_it} leaves that out."
    around = _adapted_around(layer.name, source.stored)
    if around and peft_layer(layer).is_parameter:
        return f"PEFT finds no parameters inside of {listed(around)}, whose parameters are adapted too."
    return ""


def _adapted_around(name: str, stored: StoredAdapters) -> list[str]:
    """The adapted layers in which a module lies."""
    return [outer for outer in starts_of(owner_of(name)) if outer in stored.layers]


def _why_not_with_its_rows(layer: StoredLayer, source: Source) -> str:
    """Why PEFT computes something else with single rows that train."""
    if not layer.tokens:
        return ""
    if source.modules_for_reader:
        return why_not_rows(source.modules_for_reader, source.name_for_reader(layer.name))
    return why_not_rows_of_file(layer, source)


_RULES: tuple[Callable[[StoredLayer, Source], str], ...] = (
    _why_not_of_its_kind,
    _why_not_in_its_place,
    _why_not_with_its_rows,
)
"""Each says why PEFT cannot hold a layer, or nothing."""


class _ReaderModel:
    """The reader's model, onto which PEFT loads the layers: it may refuse some, or take them for others."""

    def __init__(self, source: Source) -> None:
        self.config = source.stored.config
        self.loading = loading_of(source)
        stand_ins = stand_ins_of(source)
        tensors = dict(chain.from_iterable(map(dict.items, stand_ins.values())))
        arriving = self.loading.names_in_file(tensors)
        self.lost = [name for name, names in stand_ins.items() if names_not_in(names, arriving)]

    def why_refused(self, layer: StoredLayer) -> str:
        """Return why PEFT refuses a layer in this model, or loads it as another one, or nothing."""
        if layer.name in self.lost:
            return f"PEFT gives their tensors other names when it loads a model of type {self.loading.model_type!r}."
        if peft_layer(layer).is_parameter:
            return ""
        return self.loading.why_refused(layer.name) or self._why_not_as_parameter(layer)

    def _why_not_as_parameter(self, layer: StoredLayer) -> str:
        """Why a layer that PEFT takes for experts cannot be named as a parameter, which stays what it is."""
        if not self.loading.is_taken_for_experts(layer.name):
            return ""
        if layer.adapter_class is LoRALinear and not self.config.use_dora and not self.config.dropout:
            return ""
        return (
            f"PEFT takes them for experts in a model of type {self.loading.model_type!r}, unless target_parameters "
            "names them, which it refuses with DoRA, dropout or a quantised weight. Train with use_dora=False and "
            "dropout=0."
        )


# What trains in full


def _check_modules_to_save(source: Source) -> None:
    """Refuse modules that PEFT would not find, and names by which it would save others too: it takes any ending."""
    saved_for_reader = list(map(source.name_for_reader, source.stored.saved))
    others = names_not_in(source.described, saved_for_reader)
    for module in source.stored.saved:
        around = _adapted_around(module, source.stored)
        if around:
            raise ExportError(
                f"modules_to_save names {module!r}, inside of {listed(around)}, whose parameters are adapted: PEFT "
                f"would not find it. {_LEAVE_OUT}"
            )
        name = source.name_for_reader(module)
        alike = [other for other in others if other.endswith(name)]
        if alike:
            raise ExportError(
                f"modules_to_save names {module!r}, and PEFT would also save {listed(alike)}, because these names end "
                "alike. Name all, or rename one."
            )


def _check_is_in_root(stored: StoredAdapters) -> None:
    """Refuse what was trained outside of the module that the reader has."""
    outside = without(stored.state, entries_inside(stored.root, stored.state))
    if outside:
        raise ExportError(
            f"{listed(outside)} were trained outside of {stored.root!r}, and a file for that module cannot hold them. "
            'For a file of the whole module, set root="" (--root ""): PeftModel.from_pretrained(module, folder).'
        )


def _check_entries(stored: StoredAdapters, saved: Collection[str]) -> None:
    """Refuse what PEFT's file cannot hold. It has adapters, biases and the entries of modules trained whole."""
    exportable = stored.adapter_names().union(saved, trained_biases(stored))
    left = names_not_in(stored.state, exportable)
    if left:
        raise ExportError(
            f"PEFT's format has no place for {listed(left)}: it takes whole modules that are not tied to others, and "
            "no single parameters or buffers. Load a file onto its model and export that, or save the whole model."
        )
