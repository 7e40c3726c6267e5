"""What PEFT's files cannot hold, or its models would compute otherwise. It is refused before anything is written."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain

from torch import Tensor, nn

from lightning_lora.errors import ExportError, listed, warn
from lightning_lora.layers import INITIALISATIONS
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.peft.peft_layers import peft_layer, why_not, why_not_rows
from lightning_lora.storage.renaming import Renaming, entries_inside
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.named import joined, names_by, only, without
from lightning_lora.tensors.names import join, named_modules, owner_of, starts_of

Modules = Mapping[str, nn.Module]  # those that the reader has, by their names there; of a file, none are known

_LEAVE_OUT = "Train without it (exclude_modules), or call merge_adapters and save the whole model."


def check_exportable(stored: StoredAdapters, modules: Modules, saved: Collection[str]) -> None:
    """Refuse what PEFT cannot hold, or would compute otherwise. ``saved``: the entries of modules trained whole."""
    wrong = refused_layers(stored, modules)
    if wrong:
        reasons = [f"{listed(names)}: {why}" for why, names in wrong.items()]
        raise ExportError(
            f"PEFT's format cannot hold all adapters of {stored.source}. {' '.join(reasons)} {_LEAVE_OUT}"
        )
    _check_modules_to_save(stored, modules)
    _check_entries(stored, saved)
    stored.check_finite()


# Layers


def refused_layers(stored: StoredAdapters, modules: Modules) -> dict[str, list[str]]:
    """Return the layers that PEFT cannot hold, or would compute otherwise, by the reason."""
    reasons = {layer.name: _why_refused(layer, stored, modules) for layer in stored.layers.values()}
    return {why: names for why, names in names_by(reasons).items() if why is not None}


def _why_refused(layer: StoredLayer, stored: StoredAdapters, modules: Modules) -> str | None:
    """The first reason why PEFT cannot hold a layer. The last ones ask its model, or PEFT itself."""
    magnitude = stored.state.get(join(layer.name, layer.matrices[0].parameter(Role.MAGNITUDE)))
    why = why_not(layer, magnitude) or _why_not_there(layer, stored) or _why_not_of_type(layer, stored, modules)
    if why is None and layer.tokens and modules:
        name = _name_there(layer.name, stored)
        return why_not_rows(modules, name)
    return why


def _name_there(name: str, stored: StoredAdapters) -> str:
    """A name in the module that the reader has."""
    return Renaming(stored.root, "").name_here(name)


def _why_not_there(layer: StoredLayer, stored: StoredAdapters) -> str | None:
    """Why PEFT adapts no layer in its place, or with its values."""
    if layer.name == stored.root:
        return 'PEFT adapts layers inside a module, not the module itself. Pass root="", or the module around it.'
    if "out_proj.weight" in layer.shapes:
        leaf = layer.name.rpartition(".")[2]
        without = f"target_slices={{{leaf!r}: ['q', 'k', 'v']}}"
        return f"PEFT 0.21 adds the update of an attention's output projection twice; {without} leaves that out."
    around = _adapted_around(layer.name, stored)
    if around and peft_layer(layer).is_parameter:
        return f"PEFT finds no parameters inside of {listed(around)}, whose parameters are adapted too."
    return None


def _adapted_around(name: str, stored: StoredAdapters) -> list[str]:
    """The adapted layers in which a module lies."""
    return [outer for outer in starts_of(owner_of(name)) if outer in stored.layers]


# Types of models for which PEFT has rules of its own


def _why_not_of_type(layer: StoredLayer, stored: StoredAdapters, modules: Modules) -> str | None:
    """Why PEFT adapts no layer of this name in this type of model. Only an installed PEFT can say so."""
    if peft_layer(layer).is_parameter:
        return None
    leaf = layer.name.rpartition(".")[2]
    if not modules:
        return _why_not_of_unknown_type(leaf, stored)
    config = getattr(modules[""], "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None or not _has_rules(modules):
        return None  # to import PEFT takes seconds
    try:
        return _why_not_by_rules(leaf, model_type, modules[""])
    except ImportError:
        return None


def _why_not_of_unknown_type(leaf: str, stored: StoredAdapters) -> str | None:
    """Why a layer of this name may be one of experts. A file says only of rounded weights which others there are."""
    if leaf not in ("gate_proj", "up_proj", "down_proj"):
        return None
    for fingerprint in stored.base:
        if any(".experts." in name for name in fingerprint.get("rounded", ())):
            return (
                "only the model's type says whether PEFT takes it for experts. Load the file onto it, and export that."
            )
    return None


def _has_rules(names: Iterable[str]) -> bool:
    """Whether there is a module of experts or of Mamba, for which PEFT has rules."""
    return any(name.endswith((".experts", ".conv1d")) for name in names)


def _why_not_by_rules(leaf: str, model_type: str, model: nn.Module) -> str | None:
    """Why PEFT's own rules for a type of model refuse a layer of this name, or mean another."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    pattern = _MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    experts = _MOE_TARGET_MODULE_MAPPING.get(pattern, ())
    if leaf in experts:
        names = [name for name in experts if name != "gate"]
        return f"PEFT takes them for experts in a model of type {model_type!r} (leave out: exclude_modules={names})."
    with suppress(ValueError):
        check(LoraConfig(), model, leaf)
        return None
    return f"PEFT refuses {leaf!r} in a model of type {model_type!r} (leave out: exclude_modules={[leaf]})."


# Layers that no batch has reached


def without_zeros(stored: StoredAdapters, modules: Modules) -> StoredAdapters:
    """Leave out layers that PEFT cannot hold, if their update is zero: no batch has reached them."""
    config = stored.config
    if config.use_dora or INITIALISATIONS[config.init].is_difference:  # B alone does not tell
        return stored
    refused = chain.from_iterable(refused_layers(stored, modules).values())
    zeros = [name for name in refused if _has_zero_b(stored.layers[name], stored.state)]
    if not zeros or len(zeros) == len(stored.layers):
        return stored
    warn(f"{listed(zeros)} have updates of zero, and PEFT cannot hold them: they are left out.")
    left_out = replace(stored, layers=only(stored.layers, zeros))
    state = without(stored.state, left_out.adapter_names())
    return replace(stored, layers=without(stored.layers, zeros), state=state)


def _has_zero_b(layer: StoredLayer, state: Mapping[str, Tensor]) -> bool:
    """Whether each B of a layer is zero. Single rows have none."""
    if layer.tokens:
        return False
    in_layer = [matrix.parameter(Role.B) for matrix in layer.matrices]
    return not any(state[name].any() for name in joined(layer.name, in_layer))


# What trains in full


def with_tied(stored: StoredAdapters, model: nn.Module | None) -> StoredAdapters:
    """Save modules whole that share a weight with such a module (a tied head): PEFT takes each by itself."""
    if model is None:
        return stored
    modules = named_modules(model, remove_duplicate=False)
    entries = chain.from_iterable(stored.saved.values())
    owners_of_saved = set(map(owner_of, entries))
    whole = set(only(modules, owners_of_saved).values())
    trained = {parameter for module in whole for parameter in module.parameters(recurse=False)}
    saved = dict(stored.saved)
    owners = dict.fromkeys(map(owner_of, stored.state))
    for owner in without(only(owners, modules), stored.layers):
        module = modules[owner]
        if module not in whole and not trained.isdisjoint(module.parameters(recurse=False)):
            saved[owner] = joined(owner, module.state_dict())
    return replace(stored, saved=saved)


def _check_modules_to_save(stored: StoredAdapters, modules: Modules) -> None:
    """Refuse modules that PEFT would not find, and names by which it would save others too: it takes any ending."""
    names_there = {module: _name_there(module, stored) for module in stored.saved}
    others = without(modules, names_there.values())
    for module, name in names_there.items():
        around = _adapted_around(module, stored)
        if around:
            raise ExportError(
                f"modules_to_save names {module!r}, inside of {listed(around)}, whose parameters are adapted: PEFT "
                f"would not find it. {_LEAVE_OUT}"
            )
        alike = [other for other in others if other.endswith(name)]
        if alike:
            raise ExportError(
                f"modules_to_save names {module!r}, and PEFT would also save {listed(alike)}, because these names end "
                "alike. Name all, or rename one."
            )


def _check_entries(stored: StoredAdapters, saved: Collection[str]) -> None:
    """Refuse what PEFT's file cannot hold. It has adapters, biases and whole modules, all inside of the root."""
    outside = without(stored.state, entries_inside(stored.root, stored.state))
    if outside:
        raise ExportError(
            f"{listed(outside)} were trained outside of {stored.root!r}, and a file for that module cannot hold them. "
            'For a file of the whole module, set root="" (--root ""): PeftModel.from_pretrained(module, folder).'
        )
    others = without(stored.state, stored.adapter_names().union(saved))
    left = [name for name in others if name in stored.changed or not is_bias(name, stored)]
    if left:
        raise ExportError(
            f"PEFT's format has no place for {listed(left)}: it takes whole modules that are not tied to others, and "
            "no single parameters or buffers. Load a file onto its model and export that, or save the whole model."
        )


def is_bias(name: str, stored: StoredAdapters) -> bool:
    """Whether an entry is a bias that was trained."""
    return stored.config.bias != "none" and "bias" in name.rpartition(".")[2]
