"""Single rows of an embedding that train, which PEFT calls trainable tokens: where it computes something else."""

from collections.abc import Mapping

from torch import nn

from lightning_lora.errors import listed
from lightning_lora.tensors.names import find_parameter


def why_not_rows(modules: Mapping[str, nn.Module], name: str) -> str:
    """Return why PEFT computes something else with rows of the layer ``name``, or nothing."""
    uses = _uses_of_weight(modules, name)
    biased = [use for layer, use in uses.items() if getattr(layer, "bias", None) is not None]
    if biased:
        return f"{listed(biased)} has a bias, which PEFT leaves out with trainable_token_indices."
    if len(uses) > 1 and not _says_tied(modules):
        return f"{listed(uses.values())} have one weight, and PEFT knows that only from config.tie_word_embeddings."
    return ""


def _uses_of_weight(modules: Mapping[str, nn.Module], name: str) -> dict[nn.Module, str]:
    """The layers that have the weight of this one, each with its last name."""
    weight = find_parameter(modules[name], "weight")
    uses = dict[nn.Module, str]()
    for other, module in modules.items():
        if find_parameter(module, "weight") is weight:
            uses[module] = other
    return uses


def _says_tied(modules: Mapping[str, nn.Module]) -> bool:
    """Whether a configuration inside says that the embeddings are tied."""
    for module in modules.values():
        config = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            return True
    return False
