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
    modules_to_save = list(map(export.name_for_reader, export.stored.saved))
    return {
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
        **_instead_for_parameters(targets.parameters, settings.bias),
        **_rows(export),
        "modules_to_save": modules_to_save or None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _instead_for_parameters(parameters: list[str], bias: str) -> dict[str, Any]:
    """The fields that have other values, or are there at all, only if PEFT adapts parameters."""
    if not parameters:
        return {}
    # PEFT refuses dropout for parameters
    fields = {"target_parameters": parameters, "lora_dropout": 0.0}
    if bias == "lora_only":
        fields["bias"] = "none"  # PEFT stops at an LSTM's bias=True
    return fields


def _rows(export: Export) -> dict[str, Any]:
    """The field that names the rows of embeddings that train, if there are any."""
    rows = dict[str, list[int]]()
    for name, layer in export.layers_with_rows.items():
        rows[export.name_for_reader(name)] = list(layer.tokens)
    return {"trainable_token_indices": rows} if rows else {}


@dataclass
class _PeftTargets:
    """What PEFT is to adapt: layers and parameters, and the rank and the alpha of each by its name."""

    loading: PeftLoading
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    kinds: set[Any] = field(default_factory=set)  # the classes of our adapters

    def add(self, update: WeightUpdate) -> None:
        """Add the layer, or the parameter, that has this update."""
        name = update.name
        is_parameter = counterpart_of(update.layer).is_parameter
        if is_parameter or self.loading.is_taken_for_experts(name):
            name = join(name, update.weight)
            self.parameters.append(name)
        else:
            self.modules.append(name)
        self.ranks[name] = update.rank
        self.alphas[name] = _as_integer(update.alpha)
        self.kinds.add(update.layer.adapter_class)

    def are_transposed(self) -> bool:
        """Return whether PEFT is told that all weights are (in, out).

        Those of Conv1D are, as GPT-2 has them. PEFT is not told so if others are beside
        them.
        """
        return (
            LoRAConv1D in self.kinds
            and LoRALinear not in self.kinds
            and not self.parameters
        )


def _as_integer(value: float) -> float:
    """A number, as an integer if it is one: ``8`` for ``8.0``."""
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
