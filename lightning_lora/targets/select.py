"""Select the layers of a model to adapt."""

from collections.abc import Collection, Mapping, Set

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError
from lightning_lora.layers import AdaptedMatrix, LoRALayer, LoRAParameters, LoRATokens, adapter_for
from lightning_lora.targets import checks
from lightning_lora.targets.adaptable import has_forward, has_matrices
from lightning_lora.targets.automatic import automatic_targets
from lightning_lora.targets.choice import Choice, choose
from lightning_lora.targets.lookup import AUTOMATIC, Names
from lightning_lora.targets.slices import sliced
from lightning_lora.targets.token_rows import token_rows
from lightning_lora.tensors.named import only, where
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
        taken = names.first_names(selection.named & selection.untouched)
        raise checks.no_layer_selected(names, config, selection.untouched, taken)
    checks.check_patterns(names, config, choices)
    checks.check_factor_names(choices)
    checks.check_methods(config, choices)
    checks.check_merges(choices)
    return choices


class _Selection:
    """What the arguments mean in one model."""

    def __init__(self, names: Names, config: LoRAConfig) -> None:
        self.names = names
        self.config = config
        saved = names.find("modules_to_save", config.modules_to_save)
        excluded = names.find("exclude_modules", config.exclude_modules)
        self.left_out = {*saved, *excluded}  # names of modules and parameters
        self.untouched = _modules_of(names, self.left_out)
        self.parameters = _parameters_by_reader(names, config, self.untouched)  # those in ``target_parameters``
        self.layers_of_parameters = _layers_of(self.parameters)
        self.named = _named_by_target_modules(names, config)
        self.targets = self.named - self.untouched - self.layers_of_parameters
        self.token_rows = token_rows(names, config, self._without_token_rows(saved))
        self.layers = names.first_names(self._adapted())

    def _without_token_rows(self, saved: Collection[str]) -> set[nn.Module]:
        """The modules in which no single rows may train, as another argument means them."""
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
        return matrix.largest_rank > 0 and self.left_out.isdisjoint(inside_layer)


def _modules_of(names: Names, named: Collection[str]) -> set[nn.Module]:
    """The named modules, or the layers of named weights, and all modules inside them."""
    modules = {name.removesuffix(".weight") for name in named}
    return with_all_inside(only(names.modules, modules).values())


# target_modules


def _named_by_target_modules(names: Names, config: LoRAConfig) -> set[nn.Module]:
    """The modules that ``target_modules`` names, supported or not."""
    targets = config.target_modules
    if targets in AUTOMATIC:
        found = automatic_targets(names, str(targets))
        fitting = where(found, has_matrices)
    else:
        found = only(names.modules, set(names.find("target_modules", targets)))
        fitting = where(found, adapter_for)
    # a word leaves out computed and empty weights, an expression containers and norms: unless there is nothing else
    if fitting and isinstance(targets, str):
        found = fitting
    return set(found.values())


# target_parameters


def _parameters_by_reader(names: Names, config: LoRAConfig, untouched: Set[nn.Module]) -> dict[nn.Module, list[str]]:
    """The ``target_parameters`` by the module that reads them, with their names in it."""
    by_reader: dict[nn.Module, list[str]] = {}
    for name in names.find("target_parameters", config.target_parameters):
        reader = _reader_of(names, name)
        why = _why_not_there(names, name, reader)
        if why:
            given = config.to_dict()["target_parameters"]
            raise TargetError(f"target_parameters {given} match {name!r}, but {why}.")
        module = names.modules[reader]
        if module not in untouched:
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
    """The module that reads a parameter: the one that holds it, or the one around a layer. The model has no name."""
    owner = owner_of(parameter)
    module = names.with_model[owner]
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
