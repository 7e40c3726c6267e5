"""What PEFT has: one table of our adapters and of PEFT's counterparts.

An adapter that is not in the table is refused, so a new one has to be put into it before it is written or read.
"""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from operator import methodcaller
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import ExportError, listed, warn
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import INITIALISATIONS, kinds
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.renaming import Renaming
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import ALSO, StoredLayer
from lightning_lora.tensors.names import held_parameter, join, named_modules, owner_of, starts_of

Shape = tuple[int, ...]
Options = Mapping[str, Any]


def _same(factors: Factors, _: Shape, __: Options) -> Factors:
    return factors


@dataclass(frozen=True)
class PeftLayer:
    """PEFT's counterpart of one of our adapters."""

    why_not: Callable[[StoredLayer], str | None]  # why PEFT computes something else for one such layer
    there: Callable[[Factors, Shape, Options], Factors] = _same  # our factors of a weight as PEFT has them
    here: Callable[[Factors, Shape, Options], Factors] = _same  # PEFT's factors as ours
    keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")  # the ends of the names of A and B
    is_parameter: bool = False  # whether PEFT wraps a parameter (target_parameters), not a layer


def why_not(layer: StoredLayer, magnitude: Tensor | None = None) -> str | None:
    """Return why PEFT has no counterpart for a layer's adapter, or one that computes something else. Or None."""
    own = _PEFT_LAYERS.get(layer.adapter_class)
    if own is None or _is_registered(layer.layer_class):
        return f"PEFT has no counterpart for our adapter of {layer.layer_class.rpartition('.')[2]}."
    if layer.options.get(ALSO):
        return f"the layer is used as {listed(layer.options[ALSO])} too, and PEFT would adapt the first use alone."
    if magnitude is not None and (magnitude == 0).any():  # the base has a row of zeros
        return "with use_dora, PEFT scales an output whose magnitude is zero by zero; here it is not scaled."
    return own.why_not(layer)


def has_layer(kind: type[kinds.LoRALayer] | None) -> bool:
    """Return whether PEFT wraps layers that have this adapter here."""
    return kind in _PEFT_LAYERS and not _PEFT_LAYERS[kind].is_parameter


def peft_layer(layer: StoredLayer) -> PeftLayer:
    """Return PEFT's counterpart of a layer's adapter, after :func:`why_not`."""
    return _PEFT_LAYERS[layer.adapter_class]


def _is_registered(layer_class: str) -> bool:
    """Whether a user has registered this class of layers."""
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in kinds.ADAPTERS if isinstance(cls, type)}
    return layer_class in names and not layer_class.startswith(("torch.", "transformers.", "bitsandbytes."))


def _added(layer: StoredLayer) -> str | None:
    computes_the_same = "transformers.models.falcon.modeling_falcon.FalconLinear"
    if not (layer.is_additive or layer.layer_class == computes_the_same):
        title = layer.layer_class.rpartition(".")[2]
        return f"{title} has a forward of its own, and PEFT adds the update outside of it, with other results."
    return None


def _embedding(layer: StoredLayer) -> str | None:
    is_scaled = layer.layer_class.startswith("transformers.") and layer.layer_class.endswith("ScaledWordEmbedding")
    return None if is_scaled else _added(layer)  # PEFT scales the update too


def why_not_rows(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Return why PEFT computes something else with rows of this layer, or None."""
    weight = modules[name]._parameters["weight"]
    uses = {module: name for name, module in modules.items() if held_parameter(module, "weight") is weight}
    if biased := [name for module, name in uses.items() if getattr(module, "bias", None) is not None]:
        return f"{listed(biased)} has a bias, which PEFT leaves out with trainable_token_indices."
    configs = [getattr(module, "config", None) for module in modules.values()]
    if len(uses) > 1 and not any(getattr(config, "tie_word_embeddings", False) for config in configs):
        return f"{listed(uses.values())} have one weight, and PEFT knows that only from config.tie_word_embeddings."
    return None


def _convolution(layer: StoredLayer) -> str | None:
    options = layer.options
    dilation = options.get("dilation", 1)
    if set(dilation if isinstance(dilation, list | tuple) else [dilation]) != {1}:
        return f"it has dilation={dilation}, with which PEFT fails."
    if options.get("padding_mode", "zeros") != "zeros":
        return f"it has padding_mode={options['padding_mode']!r}, which PEFT ignores."
    if options.get("groups", 1) > 1:
        return f"it has groups={options['groups']}. PEFT's A reads the channels of all groups; here, those of one."
    return _added(layer)


def _with_kernel(factors: Factors, shape: Shape, _: Options) -> Factors:
    a, b = factors
    return a.view(-1, *shape[1:]), b.view(*b.shape, *(1,) * (len(shape) - 2))


def _without_kernel(factors: Factors, _: Shape, __: Options) -> Factors:
    a, b = factors
    return a.flatten(1), b.flatten(1)


def _attention(layer: StoredLayer) -> str | None:
    is_plain = layer.shapes.keys() <= {"in_proj_weight", "out_proj.weight"}
    return None if is_plain else "PEFT does not support an attention with kdim or vdim."


def _parameters(layer: StoredLayer) -> str | None:
    for matrix in layer.matrices:
        if "." in matrix.weight:
            return f"{matrix.weight!r} belongs to a layer inside it. PEFT would update it only where that is called."
        if matrix.stack == (1,) and layer.options.get("is_transposed"):
            return "PEFT adds the update of one transposed expert the wrong way round."
    return None


def _stack_there(factors: Factors, shape: Shape, options: Options) -> Factors:
    """A by experts, B with the expert running fastest. In a transposed stack, each weight is (in, out)."""
    if len(shape) == 2:
        return factors
    a, b = factors
    if options.get("is_transposed"):
        a, b = b.mT, a.mT
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _stack_here(factors: Factors, shape: Shape, options: Options) -> Factors:
    if len(shape) == 2:
        return factors
    a, b = factors
    experts = math.prod(shape[:-2])
    a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(len(b), -1, experts).permute(2, 0, 1)
    return (b.mT, a.mT) if options.get("is_transposed") else (a, b)


_PEFT_LAYERS: dict[type[kinds.LoRALayer] | None, PeftLayer] = {  # None: a user's own adapter
    kinds.LoRALinear: PeftLayer(_added),
    kinds.LoRALinear4bit: PeftLayer(_added),
    kinds.LoRALinear8bit: PeftLayer(_added),
    kinds.LoRAConv1D: PeftLayer(_added),
    kinds.LoRAEmbedding: PeftLayer(_embedding, keys=("lora_embedding_A", "lora_embedding_B")),
    kinds.LoRATokens: PeftLayer(_embedding),
    kinds.LoRAConvNd: PeftLayer(_convolution, _with_kernel, _without_kernel),
    kinds.LoRAAttention: PeftLayer(_attention),
    kinds.LoRARecurrent: PeftLayer(_parameters, is_parameter=True),
    kinds.LoRAParameters: PeftLayer(_parameters, _stack_there, _stack_here, is_parameter=True),
}


# What PEFT's files cannot hold

_LEAVE_OUT = "Train without it (exclude_modules), or call merge_adapters and save the whole model."


def check_exportable(stored: StoredAdapters, modules: Mapping[str, nn.Module], saved: Collection[str]) -> None:
    """Refuse what PEFT cannot hold, or would compute otherwise.

    ``modules`` are those that the reader has, if they are known. ``saved`` are the entries of modules trained whole.
    """
    if wrong := refused_layers(stored, modules):
        reasons = [f"{listed(names)}: {why}" for why, names in wrong.items()]
        raise ExportError(
            f"PEFT's format cannot hold all adapters of {stored.source}. {' '.join(reasons)} {_LEAVE_OUT}"
        )
    for module in stored.saved:
        if why := _why_not_saved(module, stored, modules):
            raise ExportError(f"modules_to_save names {module!r}, {why}")
    _check_entries(stored, saved)
    stored.check_finite()


def refused_layers(stored: StoredAdapters, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return the layers that PEFT cannot hold, or would compute otherwise, by the reason."""
    wrong: dict[str, list[str]] = {}
    for layer in stored.layers.values():
        magnitude = stored.state.get(join(layer.name, layer.matrices[0].parameter(Role.MAGNITUDE)))
        why = why_not(layer, magnitude) or _why_not_there(layer, stored) or _why_not_of_type(layer, stored, modules)
        if layer.tokens and modules and not why:
            why = why_not_rows(modules, Renaming(stored.root, "").name_here(layer.name))
        if why:
            wrong.setdefault(why, []).append(layer.name)
    return wrong


def _why_not_of_type(layer: StoredLayer, stored: StoredAdapters, modules: Mapping[str, nn.Module]) -> str | None:
    """Why PEFT adapts no layer of this name in this type of model. Only an installed PEFT can say so."""
    if peft_layer(layer).is_parameter:
        return None
    kind, leaf = getattr(getattr(modules.get(""), "config", None), "model_type", None), layer.name.rpartition(".")[2]
    named = (name for each in stored.base for name in each.get("rounded", ()))
    if not modules and leaf in ("gate_proj", "up_proj", "down_proj") and any(".experts." in name for name in named):
        return "only the model's type says whether PEFT takes it for experts. Load the file onto it, and export that."
    if kind is None or not any(map(methodcaller("endswith", (".experts", ".conv1d")), modules)):
        return None  # to import PEFT takes seconds
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check
        from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
    except ImportError:
        return None
    if leaf in (matrices := _MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(kind, ""), ())):
        names = list(filter("gate".__ne__, matrices))
        return f"PEFT takes them for experts in a model of type {kind!r} (leave out: exclude_modules={names})."
    with suppress(ValueError):
        check(LoraConfig(), modules[""], leaf)
        return None
    return f"PEFT refuses {leaf!r} in a model of type {kind!r} (leave out: exclude_modules={[leaf]})."


def without_zeros(stored: StoredAdapters, modules: Mapping[str, nn.Module]) -> StoredAdapters:
    """Leave out layers that PEFT cannot hold, if their update is zero: no batch has reached them."""
    config, layers, state = stored.config, dict(stored.layers), dict(stored.state)
    is_plain = not (INITIALISATIONS[config.init].is_difference or config.use_dora)  # B alone tells
    for name in chain.from_iterable(refused_layers(stored, modules).values()) if is_plain else ():
        own = layers[name].parameters(config)
        if not (layers[name].tokens or any(state[own[b]].any() for b in own if b.startswith("lora_B"))):
            del layers[name]
            for parameter in own.values():
                del state[parameter]
    if not layers or len(layers) == len(stored.layers):
        return stored
    warn(f"{listed(stored.layers.keys() - layers)} have updates of zero, and PEFT cannot hold them: they are left out.")
    return replace(stored, layers=layers, state=state)


def with_tied(stored: StoredAdapters, model: nn.Module | None) -> StoredAdapters:
    """Save modules whole that share a weight with such a module (a tied head): PEFT takes each by itself."""
    if model is None or not stored.saved:
        return stored
    modules, saved, trained = named_modules(model, remove_duplicate=False), dict(stored.saved), set[nn.Parameter]()
    whole = set(map(modules.__getitem__, map(owner_of, chain.from_iterable(saved.values()))))
    for module in whole:
        trained.update(module.parameters(recurse=False))
    for owner in dict.fromkeys(map(owner_of, stored.state)):
        module = modules.get(owner, nn.Module())
        if not (module in whole or owner in stored.layers or trained.isdisjoint(module.parameters(recurse=False))):
            saved[owner] = list(map(f"{owner}.".__add__, module.state_dict()))
    return replace(stored, saved=saved)


def _check_entries(stored: StoredAdapters, saved: Collection[str]) -> None:
    """Refuse what PEFT's file cannot hold. It has adapters, biases and whole modules, all inside of the root."""
    adapters, outside, left = stored.adapter_names(), list[str](), list[str]()
    for name in stored.state:
        if stored.root and not name.startswith(f"{stored.root}."):
            outside.append(name)
        elif not (name in adapters or name in saved or (is_bias(name, stored) and name not in stored.changed)):
            left.append(name)
    if outside:
        raise ExportError(
            f"{listed(outside)} were trained outside of {stored.root!r}, and a file for that module cannot hold them. "
            'For a file of the whole module, set root="" (--root ""): PeftModel.from_pretrained(module, folder).'
        )
    if left:
        raise ExportError(
            f"PEFT's format has no place for {listed(left)}: it takes whole modules that are not tied to others, and "
            "no single parameters or buffers. Load a file onto its model and export that, or save the whole model."
        )


def _why_not_there(layer: StoredLayer, stored: StoredAdapters) -> str | None:
    """Why PEFT adapts no layer in its place, or with its values."""
    if layer.name == stored.root:
        return 'PEFT adapts layers inside a module, not the module itself. Pass root="", or the module around it.'
    if "out_proj.weight" in layer.shapes:
        without = f"target_slices={{{layer.name.rpartition('.')[2]!r}: ['q', 'k', 'v']}}"
        return f"PEFT 0.21 adds the update of an attention's output projection twice; {without} leaves that out."
    around = stored.layers.keys() & starts_of(owner_of(layer.name))
    if around and peft_layer(layer).is_parameter:
        return f"PEFT finds no parameters inside of {listed(around)}, whose parameters are adapted too."
    return None


def _why_not_saved(module: str, stored: StoredAdapters, modules: Mapping[str, nn.Module]) -> str | None:
    """Why PEFT would not find just this module that is trained whole."""
    name, *saved = map(Renaming(stored.root, "").name_here, (module, *stored.saved))
    around = stored.layers.keys() & starts_of(owner_of(module))
    if around:
        return f"inside of {listed(around)}, whose parameters are adapted: PEFT would not find it. {_LEAVE_OUT}"
    if alike := [other for other in modules if other.endswith(name) and other not in saved]:
        return f"and PEFT would also save {listed(alike)}, because these names end alike. Name all, or rename one."
    return None


def is_bias(name: str, stored: StoredAdapters) -> bool:
    """Whether an entry is a bias that was trained."""
    return stored.config.bias != "none" and "bias" in name.rpartition(".")[2]
