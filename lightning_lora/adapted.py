"""An adapted model: what it remembers of the model it was, and how adapters go on and come off.

The memory lies on the model itself, in plain types, so that it survives copy and pickle and whoever meets the model
next (another Trainer, another callback, ``load_adapter``) finds it in a known state.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, LoRAWarning
from lightning_lora.functional import digest
from lightning_lora.layers import Adapter, LoRALayer, attach
from lightning_lora.targets import saved_modules

_ATTRIBUTE = "_lora"


@dataclass
class Record:
    """The memory of one adapted model; every mapping is keyed by the names of ``named_parameters`` and the like.

    Args:
        config: What it was adapted with.
        requires_grad: Whether each parameter of the base was to be trained.
        originals: The base's values of what training may change beside the adapters: modules trained whole, biases
            and persistent buffers.
        folded: The adapters, while they are off their layers and the layers show merged weights: a plain model.
        folded_digests: The digests of those merged weights, to notice if they are replaced.
        fingerprints: The forms in which this base was seen: as loaded, and as a Trainer's precision converted it.
    """

    config: LoRAConfig
    requires_grad: dict[str, bool] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    folded: dict[str, Adapter] = field(default_factory=dict)
    folded_digests: dict[str, int] = field(default_factory=dict)
    fingerprints: list[dict[str, object]] = field(default_factory=list)


# The memory


def find_record(model: nn.Module) -> Record | None:
    """Return the record of ``model``, or None if it has never been adapted."""
    record: Record | None = vars(model).get(_ATTRIBUTE)
    return record


def record_of(model: nn.Module) -> Record:
    """Return the record of ``model``.

    Raises:
        AdapterStateError: ``model`` has no adapters.
    """
    record = find_record(model)
    if record is None:
        inner = next((name for name, module in model.named_modules() if find_record(module)), None)
        remedy = (
            f"They are in its {inner!r}: pass that module." if inner else "Call inject_adapters(model, config) first."
        )
        raise AdapterStateError(f"{type(model).__name__} has no adapters. {remedy}")
    return record


def keep_record(model: nn.Module, record: Record | None) -> None:
    """Give ``model`` its record, or let it forget."""
    if record is None:
        vars(model).pop(_ATTRIBUTE, None)
    else:
        vars(model)[_ATTRIBUTE] = record


def absorb_inner_records(model: nn.Module, record: Record) -> None:
    """Take over what modules inside ``model``, adapted by hand before it, remember of themselves."""
    for prefix, module in model.named_modules():
        inner = find_record(module)
        if inner is not None and module is not model:
            record.requires_grad.update({f"{prefix}.{name}": flag for name, flag in inner.requires_grad.items()})
            record.originals.update({f"{prefix}.{name}": value for name, value in inner.originals.items()})
            keep_record(module, None)


# The parts of an adapted model


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the adapted layers of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that adapters added, by name, whether or not the adapters are on their layers just now."""
    record = find_record(model)
    folded = record.folded if record else {}
    off = {
        f"{name}.{factor}": p
        for name, a in folded.items()
        for factor, p in (("lora_A", a.lora_A), ("lora_B", a.lora_B))
    }
    return off or {
        f"{name}.{factor}": p
        for name, layer in adapted_layers(model).items()
        for factor, p in layer.adapter_parameters().items()
    }


def trained_base_parameters(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Parameter]:
    """Return those of the base's own parameters that train, by name: modules trained whole, and biases."""
    adapters = adapter_parameters(model)
    own = {name: p for name, p in model.named_parameters() if name not in adapters}
    trained = {id(p) for module in saved_modules(model, config) for p in module.parameters()}
    if config.bias == "all":
        trained |= {id(p) for name, p in own.items() if "bias" in name.rpartition(".")[2]}
    if config.bias == "lora_only":
        layers = {name.rpartition(".")[0] for name in adapters}
        trained |= {id(model.get_submodule(name)._parameters.get("bias")) for name in layers}
    return {name: p for name, p in own.items() if id(p) in trained}


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of ``model`` that its state dict holds, by every name that it holds them under."""
    return {
        f"{prefix}.{name}".removeprefix("."): buffer
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


# What is trained, and what is kept


def freeze(model: nn.Module, record: Record) -> None:
    """Let adapters and what else trains require gradients, and nothing else; remember how it was."""
    adapters, trained = adapter_parameters(model), trained_base_parameters(model, record.config)
    for name, parameter in model.named_parameters():
        if name not in adapters:
            record.requires_grad.setdefault(name, parameter.requires_grad)
            parameter.requires_grad_(name in trained)


def unfreeze(model: nn.Module, record: Record) -> None:
    """Let each parameter of the base require a gradient if it did before :func:`freeze`."""
    for name, parameter in model.named_parameters():
        if name in record.requires_grad:
            parameter.requires_grad_(record.requires_grad[name])


def keep_originals(model: nn.Module, record: Record) -> None:
    """Keep on the CPU the base's values of everything that training may change beside the adapters, where not kept."""
    changing = {**trained_base_parameters(model, record.config), **persistent_buffers(model)}
    kept = record.originals
    record.originals = {name: kept[name] if name in kept else _copy(tensor) for name, tensor in changing.items()}


def restore_originals(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Write the base's own values back, all of them or those of ``names``."""
    originals = record_of(model).originals
    present = {**dict(model.named_parameters()), **persistent_buffers(model)}
    for name in originals if names is None else names:
        present[name].data.copy_(originals[name])


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


# Adapters on and off


def attach_adapters(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Put adapters on the layers of ``model`` that they are named after."""
    for name, adapter in adapters.items():
        attach(model.get_submodule(name), adapter)
    for encoder in _encoder_layers(model):
        if any(isinstance(child, LoRALayer) for child in encoder.children()):
            vars(encoder).setdefault(_ACTIVATION, encoder.activation_relu_or_gelu)
            encoder.activation_relu_or_gelu = 0


def detach_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Take every adapter off ``model`` and return them by the names of their layers."""
    for encoder in _encoder_layers(model):
        encoder.activation_relu_or_gelu = vars(encoder).pop(_ACTIVATION, encoder.activation_relu_or_gelu)
    return {name: layer.detach() for name, layer in adapted_layers(model).items()}


_ACTIVATION = "_lora_activation"
"""Where an encoder layer keeps its ``activation_relu_or_gelu``. Torch's inference path is taken only if that is not 0:
it reads the weights of linear1 and linear2 and calls neither, so that adapters would be left out in eval mode."""


def _encoder_layers(model: nn.Module) -> list[nn.TransformerEncoderLayer]:
    return [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]


def merge_layers(model: nn.Module) -> None:
    """Merge every adapted layer of ``model``, or, if one fails (for want of memory), none."""
    layers = [layer for layer in adapted_layers(model).values() if layer.lora_base is None]
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    try:
        for layer in layers:
            layer.merge(tied=uses[id(layer.weight)] > 1)
    except BaseException:
        for layer in layers:
            layer.unmerge()
        raise


def fold(model: nn.Module) -> None:
    """Make ``model`` plain, its updates merged, and let it remember how to come back."""
    record = record_of(model)
    if not record.folded:
        merge_layers(model)
        unfreeze(model, record)
        record.folded = detach_adapters(model)
        record.folded_digests = {
            name: digest(model.get_submodule(name).get_parameter("weight")) for name in record.folded
        }


def unfold(model: nn.Module) -> bool:
    """Undo :func:`fold`: the exact base, the same adapters on it. Return whether there was anything to undo.

    If the merged weights are not those that folding left (someone loaded others), they are the base from now on.
    """
    record = find_record(model)
    if record is None or not record.folded:
        return False
    if not _still_as_folded(model, record):
        warnings.warn(
            f"The weights of {type(model).__name__} were replaced after its adapters were merged into them: they are "
            "taken as a new base, and the adapters of the earlier fine-tune are dropped.",
            LoRAWarning,
            stacklevel=2,
        )
        keep_record(model, None)
        return False
    adapters, record.folded, record.folded_digests = record.folded, {}, {}
    attach_adapters(model, adapters)
    for layer in adapted_layers(model).values():
        layer.unmerge()
    freeze(model, record)
    return True


def _still_as_folded(model: nn.Module, record: Record) -> bool:
    modules = dict(model.named_modules())
    return all(
        name in modules and digest(modules[name].get_parameter("weight")) == left
        for name, left in record.folded_digests.items()
    )
