"""The tensors that PEFT has for adapters, by its names.

PEFT wraps layers, so what is inside of a wrapped layer gets another name.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_lora.functional.factors import Factors
from lightning_lora.layers.kinds import LoRAAttention
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.counterparts import (
    counterpart_of,
    has_counterpart,
)
from lightning_lora.storage.formats.peft_names import TOKENS
from lightning_lora.storage.formats.weight_updates import WeightUpdate
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.dicts import where, without
from lightning_lora.tensors.names import is_bias, join, names_not_in

# the tensors of one wrapper, by the ends of their names: {"lora_A.weight": a, ...}
WrapperTensors = dict[str, Tensor]


def peft_tensors(export: Export, updates: Iterable[WeightUpdate]) -> dict[str, Tensor]:
    """Return all tensors of a file, by PEFT's names without its prefix.

    They are, in this order: A and B of all updates, rows that train, biases, and
    modules that train whole.
    """
    stored = export.stored
    wrappers = _wrappers_of(updates)
    tensors = wrappers.tensors()
    for name, layer in export.layers_with_rows.items():
        (rows,) = layer.parameters(stored.config).values()
        place = wrappers.name_inside(export.name_for_reader(name))
        tensors[f"{place}.{TOKENS}"] = stored.state[rows]
    for name in names_not_in(trained_biases(stored), export.saved_tensors):
        place = wrappers.name_inside(export.name_for_reader(name))
        tensors[place] = stored.state[name]
    for name, value in export.saved_tensors.items():
        place = export.name_for_reader(name)
        tensors[place] = value
    return tensors


def layers_by_tensor(export: Export) -> dict[str, str]:
    """Return the layer of each tensor of an adapter, by the name that the tensor will have.

    ``{"layers.0.q.lora_A.weight": "layers.0.q", "layers.0.q.lora_B.weight":
    "layers.0.q", ...}``. The zeros that a file has for the output projection of an
    attention are not among them.
    """
    layers = where(
        without(export.stored.layers, export.layers_with_rows), has_counterpart
    )
    wrappers = _Wrappers()
    for name, layer in layers.items():
        for _ in layer.shapes:  # PEFT has a wrapper for each weight
            tensors = dict.fromkeys(counterpart_of(layer).keys, torch.empty(0))
            wrappers.add(export.name_for_reader(name), tensors)
    layer_of = dict[str, str]()
    for name in layers:
        tensors = wrappers.tensors_around(export.name_for_reader(name))
        layer_of |= dict.fromkeys(tensors, name)
    return layer_of


def _wrappers_of(updates: Iterable[WeightUpdate]) -> "_Wrappers":
    """The wrappers that PEFT has for these updates."""
    wrappers = _Wrappers()
    for update in updates:
        wrappers.add(update.name, _tensors_of(update))
        # PEFT also wraps the output projection of an attention, here with an update of
        # zero
        if update.layer.adapter_class is LoRAAttention:
            out_proj = join(update.name, "out_proj")
            wrappers.add(out_proj, _zero_like(update.factors))
    return wrappers


def _tensors_of(update: WeightUpdate) -> WrapperTensors:
    """The tensors that PEFT has for an update."""
    counterpart = counterpart_of(update.layer)
    shape = update.layer.shapes[update.weight]
    factors = counterpart.to_peft(update.factors, shape, update.layer.options)
    tensors = dict(zip(counterpart.keys, factors, strict=True))
    if update.magnitude is not None:
        # transformers would ignore a magnitude without .weight in its name
        _, b = factors
        tensors["lora_magnitude_vector.weight"] = _magnitude_beside(b, update.magnitude)
    return tensors


def _magnitude_beside(b: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's magnitudes in the shape that PEFT gives them beside B: of a convolution, they have as many dimensions."""
    if b.dim() == 2:
        return magnitude.view(-1)
    kernel = (1,) * (b.dim() - 2)
    return magnitude.view(1, -1, *kernel)


def _zero_like(factors: Factors) -> WrapperTensors:
    """An update of zero, of a square matrix that reads as many features."""
    a, _ = factors
    zero = torch.zeros_like(a)
    return {"lora_A.weight": zero, "lora_B.weight": zero.T}


@dataclass
class _Wrappers:
    """What PEFT wraps around modules.

    If a module has several wrappers, they lie in each other, and the last one is the
    outermost. Two wrappers around ``experts``, the first with the tensors ``{"lora_A.weight":
    a1}``, the second with ``{"lora_A.weight": a2}``, have the tensors
    ``experts.lora_A.weight`` (a2) and ``experts.base_layer.lora_A.weight`` (a1).
    """

    # the tensors of a module's wrappers, the innermost first, by the name of the module
    around: dict[str, list[WrapperTensors]] = field(default_factory=dict)

    def add(self, name: str, tensors: WrapperTensors) -> None:
        """Wrap a module once more, around its other wrappers."""
        self.around.setdefault(name, []).append(tensors)

    def name_inside(self, name: str) -> str:
        """Return PEFT's name for something inside of modules that are wrapped.

        ``attn.out_proj`` -> ``attn.base_layer.out_proj``, if ``attn`` has one wrapper.
        """
        components = list[str]()
        module = ""
        for component in name.split("."):
            wrappers = self.around.get(module, [])
            components += ["base_layer"] * len(wrappers)
            components.append(component)
            module = join(module, component)
        return ".".join(components)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all wrappers by name."""
        named = dict[str, Tensor]()
        for name in self.around:
            named |= self.tensors_around(name)
        return named

    def tensors_around(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of all wrappers of one module by name."""
        named = dict[str, Tensor]()
        place = self.name_inside(name)
        for tensors in reversed(self.around[name]):  # from the outermost one
            for end, value in tensors.items():
                named[f"{place}.{end}"] = value
            place += ".base_layer"
        return named


# Biases


def trained_biases(stored: StoredAdapters) -> list[str]:
    """Return the biases that the configuration trains.

    Some may lie in modules that train whole.
    """
    if stored.config.bias == "none":
        return []
    # an adapter's tensor has the name of its slice, which may say "bias" too
    of_others = stored.adapter_names().union(stored.frozen_in_state)
    return [name for name in names_not_in(stored.state, of_others) if is_bias(name)]
