"""Select the layers of a model to adapt."""

from collections.abc import Collection, Mapping, Set

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError
from lightning_lora.layers import AdaptedMatrix, LoRALayer, LoRAParameters, LoRATokens, adapter_for
from lightning_lora.targets import checks
from lightning_lora.targets.adaptable import has_forward, has_matrices
from lightning_lora.targets.arguments import AUTOMATIC
from lightning_lora.targets.automatic import automatic_targets
from lightning_lora.targets.choice import Choice, choose
from lightning_lora.targets.lookup import Names
from lightning_lora.targets.slices import sliced
from lightning_lora.targets.token_rows import token_rows
from lightning_lora.tensors.dicts import only, where
from lightning_lora.tensors.names import owner_of, starts_of, submodule, with_all_inside

Matrices = tuple[AdaptedMatrix, ...]


def select(model: nn.Module, config: LoRAConfig) -> dict[str, Choice]:
    """Return the layers that ``config`` adapts, by name and in the model's order. A shared layer appears once."""
    names = Names(model)
    checks.check_not_lazy(names)
    selection = _Selection(names, config)
    checks.check_supported(names, config, selection.layers, selection.targets)
    choices = selection.choices()
    if not choices:
        lost_targets = names.first_names(selection.named_targets & selection.excluded_modules)
        raise checks.no_layer_selected(names, config, selection.excluded_modules, lost_targets)
    checks.check_patterns(names, config, choices)
    checks.check_factor_names(choices)
    checks.check_methods(config, choices)
    checks.check_merges(choices)
    return choices


class _Selection:
    """What the arguments mean in one model.

    - ``excluded_modules``: ``exclude_modules`` or ``modules_to_save`` means them. The next two are without these.
    - ``parameters``: those of ``target_parameters``, by the module that reads them.
    - ``targets``: ``target_modules`` means them. A layer that holds one of ``parameters`` is none.
    - ``token_rows``: embeddings in ``trainable_token_indices``, and the heads that are tied to them. They get no other
      adapter.
    """

    def __init__(self, names: Names, config: LoRAConfig) -> None:
        self.names = names
        self.config = config
        saved = names.find("modules_to_save", config.modules_to_save)
        excluded = names.find("exclude_modules", config.exclude_modules)
        self.excluded_names = {*saved, *excluded}  # of modules and parameters, as they are given
        self.excluded_modules = _modules_of(names, self.excluded_names)  # with all inside them
        self.parameters = _parameters_by_reader(names, config, self.excluded_modules)
        self.layers_of_parameters = _layers_of(self.parameters)  # that hold them: a reader may be around these
        self.named_targets = _named_by_target_modules(names, config)  # before any is excluded
        self.targets = self.named_targets - self.excluded_modules - self.layers_of_parameters
        self.token_rows = token_rows(names, config, self._named_elsewhere(saved))
        self.layers = names.first_names(self._adapted())  # all that get an adapter

    def _named_elsewhere(self, saved: Collection[str]) -> set[nn.Module]:
        """The modules that another argument names: no single rows of them may train."""
        modules = self.layers_of_parameters | _modules_of(self.names, saved)
        if self.config.target_modules in AUTOMATIC:  # the words leave embeddings to their rows
            return modules
        return modules | self.targets

    def _adapted(self) -> set[nn.Module]:
        """The layers that get an adapter. One in which rows train gets no other."""
        targets = self.targets - self.token_rows.layers
        return targets.union(self.parameters, self.token_rows.matrices)

    def choices(self) -> dict[str, Choice]:
        """Return how each layer is adapted, by name. One of which all is left out, or empty, has no adapter."""
        choices = {}
        for name, layer in self.layers.items():
            kind, matrices = self._adapter(name, layer)
            adapted = [matrix for matrix in matrices if self._is_adapted(name, matrix)]
            if adapted:
                choices[name] = choose(self.config, name, layer, kind, tuple(adapted))
        return choices

    def _adapter(self, name: str, layer: nn.Module) -> tuple[type[LoRALayer], Matrices]:
        """The class of a layer's adapter, and the matrices that arguments name, or all."""
        if layer in self.token_rows.matrices:
            return LoRATokens, (self.token_rows.matrices[layer],)
        if layer in self.parameters:
            read_matrices = [LoRAParameters.lora_matrix_of(layer, inner) for inner in self.parameters[layer]]
            return LoRAParameters, tuple(read_matrices)
        kind = adapter_for(layer)
        assert kind is not None  # others have been refused
        matrices = kind.lora_matrices_of(layer)
        slices = self.config.slices(name)
        if slices:
            matrices = sliced(self.names, name, kind, matrices, slices)
        return kind, matrices

    def _is_adapted(self, name: str, matrix: AdaptedMatrix) -> bool:
        """Whether a matrix of a layer has numbers, and neither it nor a module around it in the layer is left out."""
        around = starts_of(f"{name}.{matrix.weight}")
        inside_layer = around[len(starts_of(name)) :]
        return matrix.largest_rank > 0 and self.excluded_names.isdisjoint(inside_layer)


def _modules_of(names: Names, named: Collection[str]) -> set[nn.Module]:
    """The named modules, or the layers of named weights, and all modules inside them.

    Of a layer with several weights, one that is named takes out its own matrix alone (:meth:`_Selection._is_adapted`).
    """
    modules = {name.removesuffix(".weight") for name in named}
    return with_all_inside(only(names.modules, modules).values())


# target_modules


def _named_by_target_modules(names: Names, config: LoRAConfig) -> set[nn.Module]:
    """The modules that ``target_modules`` names, supported or not."""
    targets = config.target_modules
    if targets in AUTOMATIC:
        found = automatic_targets(names, str(targets))
        fitting = where(found, has_matrices)  # a word does not mean weights that are computed or empty
    else:
        found = only(names.modules, set(names.find("target_modules", targets)))
        fitting = where(found, adapter_for)  # an expression does not mean containers and norms
    is_list = not isinstance(targets, str)  # a list means each of its names
    if is_list or not fitting:  # an error says why what is found does not fit
        return set(found.values())
    return set(fitting.values())


# target_parameters


def _parameters_by_reader(
    names: Names, config: LoRAConfig, excluded_modules: Set[nn.Module]
) -> dict[nn.Module, list[str]]:
    """The ``target_parameters`` by the module that reads them, with their names in it."""
    by_reader: dict[nn.Module, list[str]] = {}
    for name in names.find("target_parameters", config.target_parameters):
        reader = _reader_of(names, name)
        why = _why_not_there(names, name, reader)
        if why:
            given = config.to_dict()["target_parameters"]
            raise TargetError(f"target_parameters {given} match {name!r}, but {why}.")
        module = names.modules[reader]
        if module not in excluded_modules:
            by_reader.setdefault(module, []).append(name.removeprefix(f"{reader}."))
    return by_reader


def _layers_of(parameters: Mapping[nn.Module, list[str]]) -> set[nn.Module]:
    """The modules that hold these parameters: they get no other adapter."""
    layers: set[nn.Module] = set()
    for reader, inner_names in parameters.items():
        for name in inner_names:
            layers.add(submodule(reader, owner_of(name)))
    return layers


def _reader_of(names: Names, parameter: str) -> str:
    """The module that reads a parameter: the one that holds it, or the one around a layer. The model has no name.

    A parameter of a layer is meant where the module around it reads it, as a router its ``self.gate.weight``:
    ``target_modules`` would adapt the layer itself.
    """
    owner = owner_of(parameter)
    module = names.all_modules[owner]
    reads_its_own = adapter_for(module) is None or isinstance(module, nn.MultiheadAttention)
    return owner if reads_its_own else owner_of(owner)


def _why_not_there(names: Names, name: str, reader: str) -> str:
    """Why a parameter that a module reads cannot be adapted, or nothing."""
    if not reader:
        return (
            f"{names.title} itself may read it: move it into a module, or name its layer in target_modules, with "
            "target_slices for one of several weights"
        )
    module = names.modules[reader]
    class_name = type(module).__name__
    parameter = names.parameters[name]
    if adapter_for(module):
        return f"its {class_name} is adapted as a layer: name {reader!r} in target_modules"
    if parameter.dim() not in (2, 3) or not parameter.is_floating_point():
        return f"it is {tuple(parameter.shape)}, {parameter.dtype}, neither a matrix nor a stack of matrices"
    if not has_forward(module):
        return f"its {class_name} has no forward of its own, so other code reads it"
    if "forward" in vars(module) and not isinstance(module, LoRALayer):
        return "its forward is replaced on the instance, which would bypass the adapter"
    return ""
