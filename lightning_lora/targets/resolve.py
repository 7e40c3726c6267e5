"""Resolve the arguments in one model: names and expressions become its modules and parameters."""

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError
from lightning_lora.layers import LoRALayer, adapter_for
from lightning_lora.targets.adaptable import has_forward, has_matrices
from lightning_lora.targets.arguments import AUTOMATIC
from lightning_lora.targets.automatic import automatic_targets
from lightning_lora.targets.find_names import find_names
from lightning_lora.targets.lookup import Lookup
from lightning_lora.targets.token_rows import TokenRows, find_token_rows
from lightning_lora.tensors.dicts import only, where
from lightning_lora.tensors.names import owner_of, submodule, with_all_inside


@dataclass(frozen=True)
class ResolvedArguments:
    """What the arguments mean in one model: its modules and parameters in place of names."""

    left_out_names: set[str]
    """What ``exclude_modules`` and ``modules_to_save`` name: modules and parameters."""

    left_out_modules: set[nn.Module]
    """The modules of these names, with all inside them."""

    parameters: Mapping[nn.Module, list[str]]
    """What ``target_parameters`` names and nothing excludes: names in the module that reads them, by this module."""

    named_targets: set[nn.Module]
    """What ``target_modules`` names, before any of it is excluded."""

    remaining_targets: set[nn.Module]
    """Those of them that nothing leaves out, and that hold none of ``parameters``."""

    token_rows: TokenRows
    """The embeddings in ``trainable_token_indices``, and the layers that are tied to them."""

    def targets_left_out(self) -> set[nn.Module]:
        """Return the modules that ``target_modules`` and another argument name, and so get no adapter."""
        return self.named_targets & self.left_out_modules

    def layers_to_adapt(self) -> set[nn.Module]:
        """Return the modules that get an adapter.

        A module in which single rows train gets no other adapter.
        """
        targets = self.remaining_targets - self.token_rows.layers
        return targets.union(self.parameters, self.token_rows.matrices)


def resolve_arguments(lookup: Lookup, config: LoRAConfig) -> ResolvedArguments:
    """Find the modules and parameters that the arguments mean.

    In this order, because each depends on those before it:

    1. ``exclude_modules`` and ``modules_to_save`` leave out what they name.
    2. ``target_parameters`` means what is not left out. The modules that hold these
       parameters get no other adapter.
    3. ``target_modules`` means what remains.
    4. ``trainable_token_indices`` may not name a module of ``modules_to_save``, nor one
       that 2. or 3. adapts.

    A name that matches nothing is an error.
    """
    saved = find_names(lookup, "modules_to_save", config.modules_to_save)
    left_out_names = {
        *saved,
        *find_names(lookup, "exclude_modules", config.exclude_modules),
    }
    left_out_modules = _modules_of(lookup, left_out_names)
    parameters = _parameters_by_reader(lookup, config, left_out_modules)
    holders = _holders_of(parameters)
    named_targets = _named_by_target_modules(lookup, config)
    remaining_targets = named_targets - left_out_modules - holders

    named_elsewhere = holders | _modules_of(lookup, saved)
    # a word such as "all" names no module, and leaves embeddings to the last argument
    if config.target_modules not in AUTOMATIC:
        named_elsewhere |= remaining_targets
    token_rows = find_token_rows(lookup, config, named_elsewhere)
    return ResolvedArguments(
        left_out_names,
        left_out_modules,
        parameters,
        named_targets,
        remaining_targets,
        token_rows,
    )


def _modules_of(lookup: Lookup, named: Collection[str]) -> set[nn.Module]:
    """The named modules, or the layers of named weights, and all modules inside them.

    A layer with several weights is not meant by the name of one, such as
    ``attn.in_proj_weight``: it leaves out the matrices of this weight alone, in
    ``select``.
    """
    # the layer q_proj is meant by its weight too: q_proj.weight
    modules = {name.removesuffix(".weight") for name in named}
    return with_all_inside(only(lookup.modules, modules).values())


# target_modules


def _named_by_target_modules(lookup: Lookup, config: LoRAConfig) -> set[nn.Module]:
    """The modules that ``target_modules`` names, supported or not."""
    targets = config.target_modules
    if targets in AUTOMATIC:
        found = automatic_targets(lookup, str(targets))
        # a word does not mean weights that are computed or empty
        fitting = where(found, has_matrices)
    else:
        found = only(lookup.modules, set(find_names(lookup, "target_modules", targets)))
        is_list = not isinstance(targets, str)
        # a list means each of its names; an expression means no containers and norms
        fitting = found if is_list else where(found, adapter_for)
    if not fitting:  # a later error says why none of them can be adapted
        return set(found.values())
    return set(fitting.values())


# target_parameters


def _parameters_by_reader(
    lookup: Lookup, config: LoRAConfig, left_out_modules: Set[nn.Module]
) -> dict[nn.Module, list[str]]:
    """The ``target_parameters`` by the module that reads them, with their names in it."""
    by_reader: dict[nn.Module, list[str]] = {}
    for name in find_names(lookup, "target_parameters", config.target_parameters):
        reader = _reader_of(lookup, name)
        why = _why_not_as_parameter(lookup, name, reader)
        if why:
            given = config.to_dict()["target_parameters"]
            raise TargetError(f"target_parameters {given} match {name!r}, but {why}.")
        module = lookup.modules[reader]
        if module not in left_out_modules:
            by_reader.setdefault(module, []).append(name.removeprefix(f"{reader}."))
    return by_reader


def _holders_of(parameters: Mapping[nn.Module, Iterable[str]]) -> set[nn.Module]:
    """The modules that hold these parameters: they are the readers, or layers inside these."""
    holders: set[nn.Module] = set()
    for reader, inner_names in parameters.items():
        for name in inner_names:
            holders.add(submodule(reader, owner_of(name)))
    return holders


def _reader_of(lookup: Lookup, parameter: str) -> str:
    """The module that gets the adapter of a parameter: the one whose code reads it.

    This is the module that holds the parameter. But if that module is a layer, such as
    the ``gate`` of ``gate.weight``, it is the module around the layer: to adapt the
    layer itself, there is ``target_modules``. The model itself has the name ``""``.
    """
    owner = owner_of(parameter)
    module = lookup.all_modules[owner]
    reads_its_own = adapter_for(module) is None or isinstance(
        module, nn.MultiheadAttention
    )
    return owner if reads_its_own else owner_of(owner)


def _why_not_as_parameter(lookup: Lookup, name: str, reader: str) -> str:
    """Why a parameter that a module reads cannot be adapted, or nothing."""
    if not reader:
        return (
            f"{lookup.title} itself may read it: move it into a module, or name its "
            "layer in target_modules, with target_slices for one of several weights"
        )
    module = lookup.modules[reader]
    class_name = type(module).__name__
    parameter = lookup.parameters[name]
    if adapter_for(module):
        return (
            f"its {class_name} is adapted as a layer: name {reader!r} in target_modules"
        )
    if parameter.dim() not in (2, 3) or not parameter.is_floating_point():
        return (
            f"it is {tuple(parameter.shape)}, {parameter.dtype}, neither a matrix nor "
            "a stack of matrices"
        )
    if not has_forward(module):
        return f"its {class_name} has no forward of its own, so other code reads it"
    if "forward" in vars(module) and not isinstance(module, LoRALayer):
        return "its forward is replaced on the instance, which would bypass the adapter"
    return ""
