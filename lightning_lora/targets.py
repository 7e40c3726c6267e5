"""Choose which layers of a model to adapt and what to train whole. Nothing here changes a model."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.config import LoRAConfig, matches, matches_pattern
from lightning_lora.errors import ConfigError, TargetError, listed
from lightning_lora.layers import ADAPTERS, LINEAR_LIKE, LoRALayer, adapter_for
from lightning_lora.names import named_modules, named_parameters

AUTOMATIC = ("all-linear", "all")
"""The words that ``target_modules`` knows besides expressions and lists."""

_SEE_ALL = "print(summarize(model)) shows every layer"


@dataclass(frozen=True)
class Selection:
    """What a configuration means on one model.

    Args:
        layers: The layers to adapt, by name, in the model's order; a shared layer once, under its first name.
    """

    layers: dict[str, nn.Module]


def select(model: nn.Module, config: LoRAConfig) -> Selection:
    """Return what ``config`` means on ``model``.

    Raises:
        TargetError: an entry of a pattern matches nothing, or a layer that cannot be adapted, or no layer is left.
        ConfigError: a layer is smaller than the rank it would get, or has no shape yet.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> list(select(model, LoRAConfig(target_modules=["2"])).layers)
        ['2']
        >>> select(model, LoRAConfig(target_modules=["fc"]))
        Traceback (most recent call last):
            ...
        lightning_lora.errors.TargetError: target_modules ['fc'] match no module of Sequential. Layers that can be \
adapted end in '0', '2'. Correct target_modules; print(summarize(model)) shows every layer.
    """
    lazy = [name for name, p in {**named_parameters(model), **dict(model.named_buffers())}.items() if is_lazy(p)]
    if lazy:
        raise ConfigError(
            f"{listed(lazy)} of {type(model).__name__} are lazy and have no shape yet. Run one batch through the model "
            "before it is adapted."
        )
    names = _Names(model)
    saved = names.find("modules_to_save", config.modules_to_save)
    excluded = names.find("exclude_modules", config.exclude_modules)
    outer = [names.modules.get(name.removesuffix(".weight")) for name in (*saved, *excluded)]
    left_out = {inner for module in outer if module is not None for inner in module.modules()}
    targets = set(_targets(names, config).values()) - left_out
    layers = {name: layer for name, layer in named_modules(model).items() if layer in targets}
    _check_supported(names, config, layers)
    _check_patterns(names, config, layers)
    _check_ranks(config, layers)
    return Selection(layers)


def saved_modules(model: nn.Module, config: LoRAConfig) -> Iterator[nn.Module]:
    """Yield the modules of ``model`` that ``modules_to_save`` names."""
    for name, module in named_modules(model, remove_duplicate=False).items():
        if is_saved(config, name):
            yield module


def is_saved(config: LoRAConfig, name: str) -> bool:
    """Whether ``modules_to_save`` means the module or the parameter called ``name``."""
    return any(matches(entry, name) for entry in config.modules_to_save or ())


class _Names:
    """A model's modules by name, a shared one under each of its names, and what to say when a name is not there."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.title = type(model).__name__
        self.modules = {name: module for name, module in named_modules(model, remove_duplicate=False).items() if name}

    def find(self, argument: str, pattern: object) -> list[str]:
        """Return every name that a pattern means: an expression for whole names, or a list.

        ``modules_to_save`` may name parameters too: those that a module holds by itself have no other name.

        Raises:
            TargetError: the expression, or any entry of the list, matches no module.
        """
        if pattern is None:
            return []
        known: Mapping[str, object] = self.modules
        if argument == "modules_to_save":
            known = {**known, **named_parameters(self.model, remove_duplicate=False)}
        meant: Iterable[str] = known
        if argument == "target_modules":
            meant = [name for name, layer in self.modules.items() if not _why_not(self, name, layer)]
        if isinstance(pattern, str):
            found = [name for name in known if re.fullmatch(pattern, name)]
            self.require(argument, {} if found else {pattern: meant})
            return found
        assert isinstance(pattern, tuple)
        found_by = {entry: [name for name in known if matches(entry, name)] for entry in pattern}
        self.require(argument, {entry: meant for entry, names in found_by.items() if not names})
        return [name for name in known if any(name in names for names in found_by.values())]

    def require(self, argument: str, missing: Mapping[str, Iterable[str]]) -> None:
        """Raise, if anything is ``missing``: entries, each with the names it might have meant."""
        if not missing:
            return
        near: dict[str, None] = {}
        for entry, known in missing.items():
            names: dict[str, list[str]] = {}
            for name in known:
                for part in {name, name.rpartition(".")[2]}:
                    names.setdefault(part, []).append(name)
            for part in difflib.get_close_matches(entry, names, n=3, cutoff=0.5):
                near[_one_or_many(part, names[part])] = None
        if near:
            hint = f"Nearest names: {', '.join(list(near)[:5])}."
        else:
            fit = (name for name, layer in self.modules.items() if not _why_not(self, name, layer))
            layers = dict.fromkeys(name.rpartition(".")[2] for name in fit)
            hint = (
                f"Layers that can be adapted end in {listed(layers, most=8)}."
                if layers
                else "It has no layer to adapt."
            )
        words = AUTOMATIC if argument == "target_modules" else ()
        meant = [word for entry in missing for word in difflib.get_close_matches(entry, words, n=1)]
        hint += f" Or did you mean the word {meant[0]!r}?" if meant else ""
        raise TargetError(
            f"{argument} {list(missing)} match no module of {self.title}. {hint} Correct {argument}; {_SEE_ALL}."
        )


def _one_or_many(part: str, names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{part!r} ({len(names)} of them, such as {names[0]!r})"


def _targets(names: _Names, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that ``target_modules`` means, supported or not, before any is taken out."""
    targets = config.target_modules
    if targets not in AUTOMATIC:
        found = {name: names.modules[name] for name in names.find("target_modules", targets)}
        if isinstance(targets, str):  # an expression may run over containers and norms: it means the layers among them
            return {name: layer for name, layer in found.items() if adapter_for(layer)} or found
        return found
    inside_attention = {
        id(child) for outer in names.modules.values() if _is_attention(outer) for child in outer.modules()
    }
    heads = _output_heads(names) if targets == "all-linear" else set()
    kinds = LINEAR_LIKE if targets == "all-linear" else tuple(ADAPTERS.values())
    return {
        name: layer
        for name, layer in names.modules.items()
        if adapter_for(layer) in kinds and id(layer) not in heads and id(layer) not in inside_attention
    }


def _is_attention(module: nn.Module | None) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def _output_heads(names: _Names) -> set[int]:
    """The layers that turn a language model's features into words: those transformers names, and those tied."""
    weights = {module: _own_weight(module) for module in names.modules.values()}
    embeddings = {id(weight) for module, weight in weights.items() if isinstance(module, nn.Embedding)} - {id(None)}
    tied = {
        id(module) for module, weight in weights.items() if isinstance(module, nn.Linear) and id(weight) in embeddings
    }
    asked = (getattr(module, "get_output_embeddings", None) for module in names.model.modules())
    return tied | {id(head()) for head in asked if callable(head)}


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight that ``module`` has by itself, though it may show a merged one just now."""
    base = module.lora_base if isinstance(module, LoRALayer) else None
    # read as a parameter: a weight that is computed (by spectral_norm, say) may change when it is read as an attribute
    return base if isinstance(base, nn.Parameter) else module._parameters.get("weight")


def _check_supported(names: _Names, config: LoRAConfig, layers: dict[str, nn.Module]) -> None:
    shown = list(config.target_modules) if isinstance(config.target_modules, tuple) else config.target_modules
    if not layers:
        raise TargetError(
            f"target_modules {shown!r} leave no layer of {names.title} to adapt. Expected at least one "
            f"{_supported_types()} layer that exclude_modules and modules_to_save do not take out. "
            f"Correct target_modules; {_SEE_ALL}."
        )
    refused = {name: why for name, layer in layers.items() if (why := _why_not(names, name, layer))}
    if refused:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in list(refused.items())[:5])
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        remedy = f", or leave these out: exclude_modules={list(refused)[:5]}" if len(refused) < len(layers) else ""
        raise TargetError(
            f"target_modules {shown!r} match layers of {names.title} that cannot be adapted ({reasons}{more}). "
            f"Supported are {_supported_types()} and their subclasses. Name other layers{remedy}."
        )


def _why_not(names: _Names, name: str, layer: nn.Module) -> str | None:
    """Why ``layer`` cannot be adapted, if so."""
    kind = adapter_for(layer)
    if isinstance(layer, LoRALayer):
        return None
    if kind is None:
        inside = (f"{name}.{inner}" for inner in named_modules(layer) if inner)
        fit = [inner for inner in inside if not _why_not(names, inner, names.modules[inner])]
        return f"a {type(layer).__name__} is not supported{f', but inside it {listed(fit)}' if fit else ''}"
    if _is_attention(names.modules.get(name.rpartition(".")[0])):
        return "its nn.MultiheadAttention reads the weight and never calls the layer"
    if "forward" in vars(layer):
        return "its forward is replaced on the instance, which would bypass the adapter"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed (weight_norm, spectral_norm, parametrize or prune), so no update can be merged"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    if weight.dtype.itemsize == 1:
        return f"its weight is {weight.dtype}, with which torch does not compute"
    if hasattr(layer, "lora_A"):
        return "it has a lora_A of another library"
    return kind.lora_refusal(layer)


def _supported_types() -> str:
    return ", ".join(str(kind.lora_layer_type).rpartition(".")[2].removesuffix("'>") for kind in ADAPTERS.values())


def _check_patterns(names: _Names, config: LoRAConfig, layers: dict[str, nn.Module]) -> None:
    for argument, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        unused = [key for key in pattern or {} if not any(matches_pattern(key, name) for name in layers)]
        names.require(argument, dict.fromkeys(unused, layers))


def _check_ranks(config: LoRAConfig, layers: dict[str, nn.Module]) -> None:
    small = {}
    for name, layer in layers.items():
        kind = adapter_for(layer)
        assert kind is not None
        if config.rank(name) > min(kind.lora_features(layer)):
            small[name] = (config.rank(name), min(kind.lora_features(layer)))
    if small:
        shown = ", ".join(f"{name!r} (r={r}, at most {limit})" for name, (r, limit) in list(small.items())[:5])
        limits = {name: limit for name, (_, limit) in list(small.items())[:5]}
        raise ConfigError(
            f"The rank is too large for {shown}{f' and {len(small) - 5} more' if len(small) > 5 else ''}. If "
            f"they are new, such as a head, train them whole: modules_to_save={list(limits)}. Otherwise set "
            f"rank_pattern={limits}, or "
            f"exclude_modules={list(limits)}, or lower r."
        )
