"""What is said where PEFT's merge, or another reader of its files, such as vLLM, would compute something else."""

from collections.abc import Iterable
from itertools import chain

from torch import nn

from lightning_lora.errors import listed, warn
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.hooked_layers import warn_of_hooks
from lightning_lora.storage.formats.peft.readers import llama_cpp
from lightning_lora.storage.formats.peft.readers.folder_readers import (
    KindsOfTraining,
    kinds_with,
    with_modules,
)
from lightning_lora.storage.formats.peft.readers.reader_table import (
    DIFFERS,
    HEADS,
    IGNORES,
    NORMS,
    PEFT_READERS,
    TAKES,
    readers_that,
)
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.storage.stored_modules import StoredModule, module_and_name
from lightning_lora.tensors.dicts import only, where, without
from lightning_lora.tensors.names import last_component, starts_of


def warn_of_merges(export: Export) -> None:
    """Warn where PEFT's model, merged or not, computes something else."""
    _warn_of_tied_weights(export)
    _warn_of_encoders(export)
    warn_of_hooks(export.stored.layers.values())


def _warn_of_tied_weights(export: Export) -> None:
    """Warn of weights that another layer has too: PEFT's merge changes them for that layer too."""
    tied = where(export.stored.layers, _is_tied)
    if not tied:
        return
    others = list[str]()
    for layer in tied.values():
        others += chain.from_iterable(layer.tied.values())
    warn(
        f"The weights of {listed(tied)} are also {listed(others)}. A PeftModel "
        "computes right, but its merge_and_unload() changes these too. Merge with "
        "save_merged(model, path): it writes a weight for each."
    )


def _is_tied(layer: StoredLayer) -> bool:
    """Whether an update of a layer's weights would reach other layers, which do not have it here.

    Single rows that train do reach them here too.
    """
    return bool(layer.tied) and not layer.tokens


def _warn_of_encoders(export: Export) -> None:
    """Warn of adapted layers in an ``nn.TransformerEncoder``, which reads weights past PEFT's layers."""
    encoders = _encoder_layers(export)
    if encoders:
        warn(
            f"{listed(encoders)} are layers of nn.TransformerEncoder. In eval mode "
            "they read weights past PEFT's layers: a PeftModel computes the base "
            "there. Call its merge_and_unload(), which is right."
        )


def _encoder_layers(export: Export) -> list[str]:
    """The names of the transformer layers around adapted ones."""
    around = dict[str, None]()
    for name in export.stored.layers:
        *modules, _ = starts_of(export.name_for_reader(name))
        around |= dict.fromkeys(modules)
    return list(only(around, where(export.stored_modules, _is_encoder_layer)))


def _is_encoder_layer(module: StoredModule) -> bool:
    """Whether a module is a layer of an nn.TransformerEncoder, or of a class that inherits from these."""
    return module_and_name(nn.TransformerEncoderLayer) in module.classes


def warn_of_readers(export: Export, kinds: KindsOfTraining) -> None:
    """Warn of readers of a folder that would compute something else, or not read it.

    They are servers of language models, so nothing is said of models that these do not
    serve.
    """
    model = export.stored_inner
    whole = list(export.stored.saved)
    if whole and _is_served(model, whole):
        _warn_of_whole_modules(whole)
    if _is_causal_lm(model):
        _warn_of_scalings(kinds)
        _warn_of_left_out(kinds)
        llama_cpp.warn_of_layers(export.stored.layers)


def _warn_of_scalings(kinds: KindsOfTraining) -> None:
    """Name the readers that would scale the updates in a folder otherwise."""
    names = [
        reader.name for reader in PEFT_READERS if kinds_with(reader, kinds, DIFFERS)
    ]
    if names:
        warn(
            f"For {', '.join(names)}, pass uniform=True (--uniform): they may scale "
            "this adapter otherwise, without a word."
        )


def _warn_of_whole_modules(whole: Iterable[str]) -> None:
    """Name modules that train whole: some readers leave them out."""
    # the readers that take whole norms take whole heads too
    takers = " and ".join(readers_that(TAKES, NORMS))
    ignoring_any = [*readers_that(IGNORES, NORMS), *readers_that(IGNORES, HEADS)]
    ignorers = ", ".join(dict.fromkeys(ignoring_any))
    warn(
        f"The folder holds {listed(whole)} whole (modules_to_save), for {takers}. "
        f"Other readers refuse that, or leave it out without a word ({ignorers}): "
        "'lightning-lora readers FOLDER' tells which. For them, merge with "
        "save_merged(model, path), or 'lightning-lora merge'."
    )


def _warn_of_left_out(kinds: KindsOfTraining) -> None:
    """Name what readers would leave out of a folder, and compute without it, besides whole modules."""
    left_out = list[str]()
    readers = dict[str, None]()
    for kind, modules in without(kinds.modules, (HEADS, NORMS)).items():
        ignoring = readers_that(IGNORES, kind)
        if ignoring:
            left_out.append(with_modules(kind, modules))
            readers |= dict.fromkeys(ignoring)
    if left_out:
        warn(
            f"{' and '.join(readers)} would leave out {', '.join(left_out)}, without a "
            "word. For them, merge with save_merged(model, path), or 'lightning-lora "
            "merge'."
        )


def _is_served(model: StoredModule, whole: Iterable[str]) -> bool:
    """Whether servers of language models read a model's adapters.

    They read those of models that write text, and those of decoders with a head for
    classes, which is called ``score``.
    """
    leaves = list(map(last_component, whole))
    classifies = (
        model.class_name.endswith("ForSequenceClassification") and "score" in leaves
    )
    return classifies or _is_causal_lm(model)


def _is_causal_lm(model: StoredModule) -> bool:
    """Whether a model writes text, as those that are served by vLLM and llama.cpp."""
    return model.class_name.endswith(("ForCausalLM", "LMHeadModel"))
