"""PEFT's configuration of adapters that are written."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lightning_lora.layers.kinds import LoRAConv1D, LoRALinear
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.counterparts import counterpart_of
from lightning_lora.storage.formats.peft.naming.when_loaded import (
    PeftLoading,
    loading_of,
)
from lightning_lora.storage.formats.peft.peft_config import value_and_pattern
from lightning_lora.storage.formats.weight_updates import WeightUpdate
from lightning_lora.storage.stored_modules import StoredModule
from lightning_lora.tensors.names import join


def written_config(
    export: Export, updates: Iterable[WeightUpdate], *, use_rslora: bool
) -> dict[str, Any]:
    """Return the contents of ``adapter_config.json``."""
    settings = export.stored.config
    targets = _PeftTargets(loading_of(export))
    for update in updates:
        targets.add(update)
    r, rank_pattern = value_and_pattern(targets.ranks)
    alpha, alpha_pattern = value_and_pattern(targets.alphas)
    config = {
        "peft_type": "LORA",
        **_pretrained(export.stored_inner),
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": use_rslora,
        "use_dora": settings.use_dora,
        "bias": settings.bias,
        "fan_in_fan_out": targets.are_transposed(),
        "target_modules": export.as_targets(targets.modules),
    }
    if targets.parameters:
        config["target_parameters"] = targets.parameters
        config["lora_dropout"] = 0.0  # PEFT refuses it for parameters
        if settings.bias == "lora_only":
            config["bias"] = "none"  # PEFT stops at an LSTM's bias=True
    rows = {
        export.name_for_reader(name): list(layer.tokens)
        for name, layer in export.layers_with_rows.items()
    }
    if rows:
        config["trainable_token_indices"] = rows
    modules_to_save = list(map(export.name_for_reader, export.stored.saved))
    config["modules_to_save"] = modules_to_save or None
    config["rank_pattern"] = rank_pattern
    config["alpha_pattern"] = alpha_pattern
    return config


@dataclass
class _PeftTargets:
    """What PEFT is to adapt: the names of layers and of parameters, with the rank and alpha of each."""

    loading: PeftLoading
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    kinds: set[Any] = field(default_factory=set)  # the classes of our adapters

    def add(self, update: WeightUpdate) -> None:
        """Name what has one more update."""
        name = update.name
        if counterpart_of(
            update.layer
        ).is_parameter or self.loading.is_taken_for_experts(name):
            name = join(name, update.weight)
            self.parameters.append(name)
        else:
            self.modules.append(name)
        self.ranks[name] = update.rank
        self.alphas[name] = _as_integer(update.alpha)
        self.kinds.add(update.layer.adapter_class)

    def are_transposed(self) -> bool:
        """Return whether PEFT is told that the weights are (in, out): of GPT-2's layers, if no others are beside."""
        return (
            LoRAConv1D in self.kinds
            and LoRALinear not in self.kinds
            and not self.parameters
        )


def _as_integer(value: float) -> float:
    """The same number without a point, if it is one."""
    return int(value) if value == int(value) else value


def _pretrained(model: StoredModule) -> dict[str, Any]:
    """What PEFT says of a model that came from a folder or the hub."""
    config = dict[str, Any](
        auto_mapping=None, base_model_name_or_path=model.pretrained or None
    )
    if model.pretrained and model.classes:
        config["auto_mapping"] = {
            "base_model_class": model.class_name,
            "parent_library": model.library,
        }
    return config
