"""What PEFT cannot hold, or would compute otherwise.

Each is refused by name before anything is written.
"""

import re
from typing import Any

from torch import Tensor

from lightning_lora.errors import ExportError, listed
from lightning_lora.layers import ADAPTERS, LoRALayer, LoRAParameters
from lightning_lora.layers.attention import LoRAAttention
from lightning_lora.layers.bilinear import LoRABilinear
from lightning_lora.layers.convolution import LoRAConvNd, LoRAConvTransposeNd
from lightning_lora.layers.embedding import LoRAEmbeddingBag
from lightning_lora.layers.matrices import Role
from lightning_lora.layers.recurrent import LoRARecurrent
from lightning_lora.storage.formats.peft_source import Source
from lightning_lora.storage.formats.updates import CONTAINERS
from lightning_lora.storage.stored_layers import ALSO, StoredLayer
from lightning_lora.tensors.names import join

_LEAVE_OUT = "Train without it (exclude_modules), or call merge_adapters and save the whole model."

_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""The types of models in which PEFT adapts no out_proj and no conv1d."""


def check_exportable(source: Source) -> None:
    """Refuse what has no counterpart in PEFT.

    Raises:
        ExportError: there is something of that kind.
    """
    _check_root(source)
    wrong: dict[str, list[str]] = {}
    for layer in source.layers:
        why = _why_not(layer, source)
        if why:
            wrong.setdefault(why, []).append(layer.name)
    if wrong:
        raise ExportError(
            f"PEFT's format cannot hold all adapters of {source.title}. "
            + " ".join(f"{listed(names)}: {why}" for why, names in wrong.items())
        )
    _check_saved(source)
    _check_rest(source)
    broken = [name for name, value in source.state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ExportError(
            f"{listed(broken)} hold NaN or infinite values: the training has diverged. Train again with a lower "
            "learning rate, or use an earlier checkpoint."
        )


def _check_root(source: Source) -> None:
    """Refuse what was trained beside the module that the reader has."""
    outside = [name for name in source.state if source.root and not name.startswith(f"{source.root}.")]
    if outside:
        raise ExportError(
            f"{listed(outside)} were trained outside of {source.root!r}, and a file for that module cannot hold them. "
            'Pass root="" for a file that fits the whole module: PeftModel.from_pretrained(module, directory).'
        )


def _why_not(layer: StoredLayer, source: Source) -> str | None:
    """Why PEFT would not compute what this layer computes, or None."""
    kind = layer.adapter_class
    if kind is None or layer.layer_class in _users_own():
        return f"PEFT does not know the class {layer.layer_class}. {_LEAVE_OUT}"
    if issubclass(kind, LoRAConvTransposeNd | LoRAEmbeddingBag | LoRABilinear):
        return f"PEFT has no adapters for {layer.layer_class.rpartition('.')[2]}. {_LEAVE_OUT}"
    if why := _why_not_there(layer, source):
        return why
    if issubclass(kind, LoRAParameters | LoRARecurrent):
        return _why_not_inside(layer, source) or _why_not_parameters(layer)
    if issubclass(kind, LoRAAttention):
        return _why_not_attention(layer)
    if not layer.is_additive:
        return (
            f"{layer.layer_class} has a forward of its own, and PEFT would add the update outside of it, with other "
            f"results. {_LEAVE_OUT}"
        )
    if issubclass(kind, LoRAConvNd) and (why := _why_not_convolution(layer, source)):
        return why
    magnitude = source.state.get(join(layer.name, layer.matrices[0].parameter(Role.MAGNITUDE)))
    if isinstance(magnitude, Tensor) and (magnitude == 0).any():
        return f"PEFT scales an output whose magnitude is zero by zero; here it is not scaled. {_LEAVE_OUT}"
    return None


def _why_not_there(layer: StoredLayer, source: Source) -> str | None:
    """Why PEFT adapts no layer in its place, or None."""
    if not source.own_name(layer.name):
        return 'PEFT adapts layers inside a module, not the module itself. Pass root="", or the module around it.'
    if layer.options.get(ALSO):
        return (
            f"the layer is used as {listed(layer.options[ALSO])} too, and PEFT would adapt the first use alone. "
            f"{_LEAVE_OUT}"
        )
    model_type = getattr(getattr(source.inner, "config", None), "model_type", None)
    if model_type in _MAMBA and layer.name.rpartition(".")[2] in ("out_proj", "conv1d"):
        return f"PEFT refuses this layer in models of the type {model_type!r}. {_LEAVE_OUT}"
    return None


def _users_own() -> set[str]:
    """The names of classes that a user has registered."""
    known = ("torch.", "transformers.", "bitsandbytes.")
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in ADAPTERS if isinstance(cls, type)}
    return {name for name in names if not name.startswith(known)}


def _why_not_convolution(layer: StoredLayer, source: Source) -> str | None:
    options = layer.options
    if any(step != 1 for step in _each(options.get("dilation", 1))):
        return f"it has dilation={options['dilation']}, with which PEFT fails. {_LEAVE_OUT}"
    if options.get("padding_mode", "zeros") != "zeros":
        return f"it has padding_mode={options['padding_mode']!r}, which PEFT ignores. {_LEAVE_OUT}"
    if options.get("groups", 1) > 1 and source.config.use_dora:
        return f"PEFT takes DoRA's norms of another matrix if there are groups. {_LEAVE_OUT}"
    return None


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _why_not_attention(layer: StoredLayer) -> str | None:
    if any(part.weight not in ("in_proj_weight", "out_proj.weight") for part in layer.matrices):
        return f"PEFT does not support kdim and vdim. {_LEAVE_OUT}"
    if any(part.weight == "out_proj.weight" for part in layer.matrices):
        own = layer.name.rpartition(".")[2]
        return (
            f"PEFT 0.21 adds the update of an attention's output projection twice. Train with target_slices={{{own!r}: "
            "['q', 'k', 'v']}, or call merge_adapters and save the whole model."
        )
    return None


def _why_not_inside(layer: StoredLayer, source: Source) -> str | None:
    around = [other.name for other in source.layers if layer.name.startswith(f"{other.name}.")]
    if around:
        return f"PEFT finds no parameters inside of {around[0]!r}, whose parameters are adapted too. {_LEAVE_OUT}"
    return None


def _why_not_parameters(layer: StoredLayer) -> str | None:
    inside = [part.weight for part in layer.matrices if "." in part.weight]
    if inside:
        return (
            f"{listed(inside)} belong to layers inside it. PEFT would update them where the layers are called, not "
            f"where {layer.name!r} reads them. {_LEAVE_OUT}"
        )
    if any(len(part.stack) > 1 for part in layer.matrices):
        return f"PEFT adapts matrices and stacks of matrices, not stacks of stacks. {_LEAVE_OUT}"
    if any(part.stack == (1,) for part in layer.matrices) and layer.options.get("is_transposed"):
        return f"PEFT adds the update of one transposed expert the wrong way round. {_LEAVE_OUT}"
    return None


def _check_saved(source: Source) -> None:
    """Refuse modules trained whole that PEFT would not find, or would find elsewhere too."""
    wrapped = [layer.name for layer in source.layers if (kind := layer.adapter_class) and _is_wrapper(kind)]
    for module in source.description.get("saved", {}):
        own = source.own_name(module)
        found = source.modules.get(own)
        if isinstance(found, CONTAINERS):
            raise ExportError(
                f"modules_to_save names {module!r}, a {type(found).__name__}, which PEFT cannot save. Train with the "
                "names of the modules inside it."
            )
        if any(module.startswith(f"{outer}.") for outer in wrapped):
            raise ExportError(
                f"modules_to_save names {module!r}, inside of a module whose parameters are adapted: PEFT would not "
                f"find it. {_LEAVE_OUT}"
            )
        alike = [name for name in source.modules if name.endswith(own) and name != own]
        if alike:
            raise ExportError(
                f"modules_to_save names {module!r}, and PEFT would also save {listed(alike)}, because these names end "
                "alike. Rename one of them in the model."
            )


def _is_wrapper(kind: type[LoRALayer]) -> bool:
    return issubclass(kind, LoRAParameters | LoRARecurrent | LoRAAttention)


def _check_rest(source: Source) -> None:
    """Refuse tensors that are neither adapters, nor biases, nor modules trained whole."""
    saved = source.saved()
    kept = {name for entries in saved.values() for name in entries}
    odd = [name for entries in saved.values() for name, value in entries.items() if not isinstance(value, Tensor)]
    changed = [name for name in source.description["changed"] if name not in kept]
    adapters = {join(layer.name, factor) for layer in source.layers for factor in _own_of(layer)}
    rest = [
        name
        for name, value in source.state.items()
        if name not in adapters and name not in kept and name not in changed and not is_bias(name, source)
    ]
    odd += [name for name, value in source.state.items() if not isinstance(value, Tensor) and name not in rest]
    if odd:
        raise ExportError(f"{listed(odd)} are not tensors, and PEFT's format holds tensors alone.")
    if changed:
        raise ExportError(
            f"Code other than an optimizer changed frozen weights in training: {listed(changed)}. PEFT's format has no "
            "place for them. Call merge_adapters and save the whole model."
        )
    if rest:
        raise ExportError(
            f"PEFT's format has no place for {listed(rest)}: buffers that moved in training, single parameters in "
            "modules_to_save, or a weight tied to one of a module there. Name whole modules in modules_to_save, or "
            "call merge_adapters and save the whole model."
        )


def _own_of(layer: StoredLayer) -> list[str]:
    """The names that the parameters of an adapter may have."""
    return [matrix.parameter(role) for matrix in layer.matrices for role in Role]


def is_bias(name: str, source: Source) -> bool:
    """Whether ``name`` is a bias that was trained."""
    return source.config.bias != "none" and re.search(r"bias[^.]*$", name) is not None
