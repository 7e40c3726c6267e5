"""A model's layers by name: which can be adapted, and which names are similar to a wrong one."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lora.errors import TargetError, listed
from lightning_lora.layers import ADAPTERS, LoRALayer, adapter_for, name_of_kind
from lightning_lora.targets.meant import several_names, wildcards
from lightning_lora.tensors.names import join, named_modules, own_parameter, owner_of, parameters_of

AUTOMATIC = ("all-linear", "all")  # the keywords that ``target_modules`` accepts, besides regular expressions and lists

OUTPUT_HEAD = "lm_head"  # the name that language models of many packages have for it

COMPUTED = "computed (weight_norm, spectral_norm, parametrize or prune)"

SEE_ALL = "print(lightning_lora.summarize(model)) shows every layer"


class Names:
    """The modules and parameters of a model by name. A shared module appears under each of its names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.title = type(model).__name__
        modules = named_modules(model, remove_duplicate=False)
        self.parameters = parameters_of(modules)
        self.modules = {name: module for name, module in modules.items() if name}

    def find(self, argument: str, pattern: object) -> list[str]:
        """Return every name that an argument's pattern matches: an expression for full names, or a list of names."""
        if pattern is None:
            return []
        known: Mapping[str, object] = self.parameters if argument == "target_parameters" else self.modules
        if argument == "modules_to_save":
            known = {**known, **self.parameters}
        meant = self._meant(argument, known)
        if isinstance(pattern, str):
            found = [name for name in known if re.fullmatch(pattern, name)]
            ends = {end: None for name in known for end in _ends_of(name) if re.fullmatch(pattern, end)}
            if not found and ends:
                raise TargetError(
                    f"{argument}={pattern!r} is an expression, which must match the whole name of a module of "
                    f"{self.title}, and matches none. To match ends of names, give a list: {argument}={[*ends]}."
                )
            self.require(argument, {} if found else {pattern: meant}, given=pattern)
            return found
        assert isinstance(pattern, tuple)
        matching = {name: {*pattern}.intersection(_ends_of(name)) for name in known}
        matched = set[str]().union(*matching.values())
        self.require(argument, {entry: meant for entry in pattern if entry not in matched}, given=pattern)
        return [name for name, entries in matching.items() if entries]

    def _meant(self, argument: str, known: Iterable[str]) -> list[str]:
        """The names that an argument could mean."""
        if argument == "target_modules":
            return self.adaptable()
        if argument == "trainable_token_indices":
            return [name for name in known if isinstance(self.modules[name], nn.Embedding)]
        return list(known)

    def first_names(self, modules: Collection[nn.Module]) -> dict[str, nn.Module]:
        """Return these modules by the first of their names, in the model's order."""
        first: dict[nn.Module, str] = {}
        for name, module in self.modules.items():
            if module in modules:
                first.setdefault(module, name)
        return {name: module for module, name in first.items()}

    def endings(self, parameters: Collection[str]) -> list[str]:
        """Return a list for ``target_parameters`` that means these: the ends of names, if they mean nothing else."""
        short = tuple(dict.fromkeys(".".join(name.split(".")[-2:]) for name in parameters))
        return list(short if {*self.find("target_parameters", short)} == {*parameters} else parameters)

    def require(self, argument: str, missing: Mapping[str, Iterable[str]], *, given: str | Sequence[str] = ()) -> None:
        """Raise an error if there are entries that match nothing. Each comes with the names that it could mean.

        ``given`` is the whole pattern, if it is one expression or a list.
        """
        if not missing:
            return
        entries = list(missing)
        what = "parameter" if argument == "target_parameters" else "module"
        near = _nearest(missing)
        hint = f"Nearest names: {', '.join(near[:5])}." if near else self._hint_of_endings(argument)
        if argument == "modules_to_save" and not near:
            outer = [name for name in self.modules if name and "." not in name]
            hint = f"Its modules are {listed(outer)}, and those inside."
        if argument == "target_modules":
            held = [name for name in self.parameters if _ends_with(name, entries)]
            hint += f" {held[0]!r} is a parameter: name it in target_parameters." if held else ""
            words = [word for entry in entries for word in difflib.get_close_matches(entry, AUTOMATIC, n=1)]
            hint += f" Or did you mean the word {words[0]!r}?" if words else ""
        if argument == "target_parameters":
            held = [name for name in self.parameters if _ends_with(owner_of(name), entries)]
            hint = f"Name parameters, such as {held[0]!r}." if held else hint
        known = list(dict.fromkeys(name for names in missing.values() for name in names))
        meant = several_names(argument, entries, known) or wildcards(argument, given, entries, known)
        if isinstance(given, str):
            found = f"{argument}={given!r} is an expression, and matches no whole name of a {what} of {self.title}."
        else:
            found = f"{argument} {entries} match no {what} of {self.title}."
        raise TargetError(f"{found} {meant or hint} Correct {argument}; {SEE_ALL}.")

    def adaptable(self) -> list[str]:
        """Return the layers that can be adapted."""
        return [name for name, layer in self.modules.items() if not why_not(self, name, layer)]

    def _hint_of_endings(self, argument: str) -> str:
        if argument == "trainable_token_indices":
            embeddings = self._meant(argument, self.modules)
            return f"Its embeddings are {listed(embeddings)}." if embeddings else "It has no nn.Embedding."
        endings = dict.fromkeys(name.rpartition(".")[2] for name in self.adaptable())
        some = f"Layers that can be adapted end in {listed(endings, most=8)}."
        return some if endings else "It has no layer to adapt."


def _nearest(missing: Mapping[str, Iterable[str]]) -> list[str]:
    """Names, or their ends, that are similar to the missing entries, each once."""
    near, shown = list[str](), set[str]()
    for entry, known in missing.items():
        names: dict[str, list[str]] = {}
        for name in dict.fromkeys(known):
            for end in {name, name.rpartition(".")[2], ".".join(name.split(".")[-2:])}:
                names.setdefault(end, []).append(name)
        for end in difflib.get_close_matches(entry, names, n=3, cutoff=0.5):
            if not shown.issuperset(names[end]):
                first, number = names[end][0], len(names[end])
                near.append(repr(first) if number == 1 else f"{end!r} ({number} of them, such as {first!r})")
                shown.update(names[end])
    return near


def _ends_of(name: str) -> list[str]:
    """All list entries that would match ``name``: the full name and its ends."""
    ends = [name]
    while "." in ends[-1]:
        ends.append(ends[-1].partition(".")[2])
    return ends


def _ends_with(name: str, entries: Iterable[str]) -> bool:
    return not set(_ends_of(name)).isdisjoint(entries)


def why_not(names: Names, name: str, layer: nn.Module) -> str | None:
    """Return why ``layer`` cannot be adapted, or None."""
    kind = adapter_for(layer)
    if isinstance(layer, LoRALayer):
        return None
    if kind is None:
        inside = (f"{name}.{inner}" for inner, each in named_modules(layer).items() if inner and adapter_for(each))
        fit = [inner for inner in inside if not why_not(names, inner, names.modules[inner])]
        held = own_matrices(name, layer)
        layers = f" (layers inside it are: {listed(fit)})" if fit else ""
        parameters = f", but target_parameters can adapt its {listed(held)}" if held else ""
        return f"a {class_of(layer)} is not supported{layers}{parameters}"
    outer = owner_of(name)
    if isinstance(names.modules.get(outer), nn.MultiheadAttention):
        return (
            f"its nn.MultiheadAttention reads the weight and never calls the layer: name {outer!r}, with "
            f"target_slices={{{outer!r}: ['out']}} if nothing else of it is to be adapted"
        )
    replaced = [method for method in kind.lora_methods if method in vars(layer)]
    if replaced:
        return f"its {replaced[0]} is replaced on the instance, which would bypass the adapter"
    if hasattr(layer, "lora_A"):
        return "it has a lora_A of another library"
    return kind.lora_refusal(layer) or _why_not_weight(layer, kind)


def _why_not_weight(layer: nn.Module, kind: type[LoRALayer]) -> str | None:
    if is_computed(layer):
        return f"its weight is {COMPUTED}, so no update can be merged"
    if not has_matrices(layer):
        return "it has no weights"
    for name in dict.fromkeys(matrix.weight for matrix in kind.lora_matrices_of(layer)):
        dtype = kind.lora_dtype(layer, own_parameter(layer, name))
        if not dtype.is_floating_point:
            return f"its {name} is {dtype}, not floating point"
        if dtype.itemsize == 1:
            return f"its {name} is {dtype}, with which torch does not compute"
    return None


def is_computed(layer: nn.Module) -> bool:
    """Whether a weight of a layer is computed from others. A parametrization holds these for another layer."""
    kind = adapter_for(layer)
    try:
        return isinstance(layer, ParametrizationList) if kind is None else not kind.lora_matrices_of(layer)
    except AttributeError:  # a weight is not a parameter
        return True


def has_matrices(layer: nn.Module) -> bool:
    """Whether a layer has matrices to update, which are neither computed nor empty."""
    kind = adapter_for(layer)
    return bool(kind and not is_computed(layer) and any(each.largest_rank for each in kind.lora_matrices_of(layer)))


def own_matrices(name: str, layer: nn.Module) -> list[str]:
    """Return the names of what ``target_parameters`` can adapt in a module of no supported kind."""
    if not name or adapter_for(layer) or is_computed(layer) or not has_forward(layer):
        return []
    held = {leaf: p for leaf, p in layer._parameters.items() if p is not None and p.is_floating_point()}
    return [join(name, leaf) for leaf, p in held.items() if p.dim() == 2 or (p.dim() == 3 and len(p) > 1)]


def has_forward(module: nn.Module) -> bool:
    """Whether a module's own Python code reads its parameters: not a container's, nor a scripted module's."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is not nn.Module.forward


def class_of(layer: nn.Module) -> str:
    """Return the name of a layer's class, with its package if it is not torch's: others have a ``Linear`` too."""
    return re.sub(r"^torch\.nn\.(\w+\.)*", "", name_of_kind(type(layer)))


def supported_types() -> str:
    """Return the names of all types that can be adapted."""
    return ", ".join(getattr(kind, "__name__", str(kind)).rpartition(".")[2] for kind in ADAPTERS)
