"""What is said of adapted layers that llama.cpp cannot run."""

from collections.abc import Mapping

from lightning_lora.errors import listed, warn
from lightning_lora.layers.kinds import LoRAConv1D, LoRAEmbedding
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.dicts import where


def warn_of_layers(layers: Mapping[str, StoredLayer]) -> None:
    """Warn of the adapted layers that llama.cpp cannot run, by what each kind of them needs instead."""
    for is_of_kind, message in _CANNOT_RUN:
        names = where(layers, is_of_kind)
        if names:
            warn(message.format(listed(names)))


def _is_tied_embedding(layer: StoredLayer) -> bool:
    """Whether a layer is an embedding with factors, and its weight is that of another layer too, as a head."""
    return bool(layer.tied) and layer.adapter_class is LoRAEmbedding


def _is_conv1d(layer: StoredLayer) -> bool:
    """Whether a layer is a Conv1D of transformers, as those of GPT-2."""
    return layer.adapter_class is LoRAConv1D


_CANNOT_RUN = (
    (
        _is_tied_embedding,
        "llama.cpp cannot run {}: an adapted embedding whose weight another layer has "
        "ends it as it loads. For it, set config.tie_word_embeddings = False and merge "
        "with save_merged(model, path).",
    ),
    (
        _is_conv1d,
        "llama.cpp does not load adapters of {}: their class is Conv1D of "
        "transformers, which holds weights transposed. For it, merge with "
        "save_merged(model, path).",
    ),
)
"""The kinds of layers that it cannot run, and what is said of each."""
