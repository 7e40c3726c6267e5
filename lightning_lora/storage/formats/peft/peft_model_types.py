"""Types of transformers' models for which PEFT has rules of its own: it takes layers for others there, or refuses them.

Only an installed PEFT can say so.
"""

from collections.abc import Iterable
from contextlib import suppress

from torch import nn

from lightning_lora.base.fingerprints import names_in
from lightning_lora.storage.formats.peft.peft_layers import peft_layer
from lightning_lora.storage.formats.writing import Source
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.named import not_in


def why_not_in_model_type(layer: StoredLayer, source: Source) -> str:
    """Return why PEFT adapts no layer of this name in this type of model, or nothing."""
    if peft_layer(layer).is_parameter:
        return ""
    leaf = layer.name.rpartition(".")[2]
    if source.inner is None:
        return _why_not_in_unknown_type(leaf, source.stored)
    if not _may_have_rules(source.modules):  # to import PEFT takes seconds
        return ""
    config = getattr(source.inner, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        return ""
    with suppress(ImportError):
        return _why_not_by_rules(leaf, model_type, source.inner)
    return ""


def _why_not_in_unknown_type(leaf: str, stored: StoredAdapters) -> str:
    """Why a layer of this name may be one of experts: of some files, the base is known to have them."""
    if leaf not in ("gate_proj", "up_proj", "down_proj"):
        return ""
    for fingerprint in stored.base:
        if any(".experts." in name for name in names_in(fingerprint)):
            return (
                "only the model's type says whether PEFT takes it for experts. Load the file onto it, and export that."
            )
    return ""


def _may_have_rules(names: Iterable[str]) -> bool:
    """Whether there is a module of experts or of Mamba, for which PEFT has rules."""
    return any(name.endswith((".experts", ".conv1d")) for name in names)


def _why_not_by_rules(leaf: str, model_type: str, model: nn.Module) -> str:
    """Why PEFT's own rules for a type of model refuse a layer of this name, or mean another."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    pattern = _MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    experts = _MOE_TARGET_MODULE_MAPPING.get(pattern, ())
    if leaf in experts:
        names = not_in(experts, ["gate"])
        return f"PEFT takes them for experts in a model of type {model_type!r} (leave out: exclude_modules={names})."
    with suppress(ValueError):
        check(LoraConfig(), model, leaf)
        return ""
    return f"PEFT refuses {leaf!r} in a model of type {model_type!r} (leave out: exclude_modules={[leaf]})."
