"""What is said of adapted layers that llama.cpp cannot run."""

from lightning_lora.errors import listed, warn
from lightning_lora.layers.kinds import LoRAConv1D, LoRAEmbedding
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.dicts import where


def warn_of_tied_embeddings(export: Export) -> None:
    """Warn of adapted embeddings whose weight is the head's too."""
    embeddings = where(export.stored.layers, _is_tied_embedding)
    if embeddings:
        warn(
            f"llama.cpp cannot run {listed(embeddings)}: an adapted embedding whose "
            "weight another layer has ends it as it loads. For it, set "
            "config.tie_word_embeddings = False and merge with save_merged(model, "
            "path)."
        )


def warn_of_transposed_layers(export: Export) -> None:
    """Warn of adapted Conv1D layers, as those of GPT-2."""
    layers = where(export.stored.layers, _is_conv1d)
    if layers:
        warn(
            f"llama.cpp does not load adapters of {listed(layers)}: their class is "
            "Conv1D of transformers, which holds weights transposed. For it, merge "
            "with save_merged(model, path)."
        )


def _is_tied_embedding(layer: StoredLayer) -> bool:
    """Whether a layer is an embedding with factors, and its weight has other names in the model."""
    return bool(layer.tied) and layer.adapter_class is LoRAEmbedding


def _is_conv1d(layer: StoredLayer) -> bool:
    """Whether a layer is a Conv1D of transformers."""
    return layer.adapter_class is LoRAConv1D
