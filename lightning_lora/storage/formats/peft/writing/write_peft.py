"""Write adapters as PEFT's files."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.errors import ExportError, listed
from lightning_lora.layers.kinds import LoRAConv1D, LoRALinear
from lightning_lora.storage.disk import save
from lightning_lora.storage.formats.peft.counterparts import counterpart_of
from lightning_lora.storage.formats.peft.naming.when_loaded import PeftLoading, loading_of
from lightning_lora.storage.formats.peft.naming.wrappers import tensors_of
from lightning_lora.storage.formats.peft.peft_config import most_common
from lightning_lora.storage.formats.peft.readers.reader_warnings import (
    warn_of_layers,
    warn_of_merges,
    warn_of_scalings,
    warn_of_whole_modules,
)
from lightning_lora.storage.formats.peft.writing.fitted import fitted
from lightning_lora.storage.formats.peft.writing.model_card import FOLDER, ModelCard
from lightning_lora.storage.formats.peft_names import METADATA, NAMES_HERE, PEFT_CONFIG, PEFT_WEIGHTS, PREFIX
from lightning_lora.storage.formats.source import Source
from lightning_lora.storage.formats.weight_updates import WeightUpdate, weight_updates, with_largest_rank, with_scaling
from lightning_lora.storage.formats.written_files import write_files
from lightning_lora.storage.inner_model import StoredModule
from lightning_lora.storage.renaming import Renaming
from lightning_lora.tensors.dicts import renamed
from lightning_lora.tensors.names import join, names_not_in

Exported = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, by names without PEFT's prefix, and a configuration


def write(source: Source, directory: Path, *, uniform: bool) -> None:
    """Write PEFT's two files, and a model card."""
    tensors, config = exported(source, uniform=uniform)
    names = _names_in_file(source, tensors)
    warn_of_whole_modules(source)
    warn_of_layers(source)
    in_peft = Renaming(here=PREFIX)
    header = {METADATA: json.dumps(in_peft.with_names_here(config))}
    by_name_in_file = renamed(tensors, names.__getitem__)
    is_any_renamed = any(name != in_file for name, in_file in names.items())
    if is_any_renamed:
        header[NAMES_HERE] = json.dumps({in_file: name for name, in_file in names.items()})
    card = ModelCard(source, "peft", _loading(source.stored_inner))
    contents = {
        PEFT_CONFIG: json.dumps(config, indent=2).encode(),
        PEFT_WEIGHTS[0]: save(in_peft.with_names_here(by_name_in_file), header),
        **card.files(directory),
    }
    write_files(directory, contents)


def _names_in_file(source: Source, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names in the file of all tensors, with which PEFT loads them onto the reader's model."""
    loading = loading_of(source)
    loading.warn_if_unsure()
    names = loading.names_in_file(tensors)
    lost = names_not_in(tensors, names)
    if lost:
        raise ExportError(
            f"PEFT gives {listed(lost)} other names when it loads a model of type {loading.model_type!r}: they would "
            "not arrive. Call merge_adapters and save the whole model."
        )
    return names


def exported(source: Source, *, uniform: bool, scaling: float | None = None) -> Exported:
    """Return PEFT's tensors and configuration.

    Args:
        source: The adapters.
        uniform: Give all updates one rank, and one scaling.
        scaling: The one that all get. None: each keeps its own, or, if uniform, all get the most common one.
    """
    source = fitted(source)
    updates = weight_updates(source)
    has_rows_alone = not updates  # so there is no rank to write
    if uniform or scaling is not None or has_rows_alone:
        _refuse_rows(source)
    if uniform:
        updates = with_largest_rank(updates)
        if scaling is None:
            scaling = _most_common_scaling(updates)
    if scaling is None:
        config = _config(source, updates, use_rslora=source.stored.config.use_rslora)
        warn_of_merges(source)
        warn_of_scalings(source, updates, config)
    else:
        updates = with_scaling(updates, scaling)
        config = _config(source, updates, use_rslora=False)
        warn_of_merges(source)
    return tensors_of(source, updates), config


def _most_common_scaling(updates: Iterable[WeightUpdate]) -> float:
    """The scaling that most updates have."""
    scalings = Counter(update.scaling for update in updates)
    ((scaling, _),) = scalings.most_common(1)
    return scaling


def _refuse_rows(source: Source) -> None:
    """Refuse single rows that train: they have no rank or scaling of their own."""
    if source.layers_with_rows:
        raise ExportError("Rows (trainable_token_indices) fit in PEFT's format alone, beside adapters, not uniform.")


# The configuration


def _config(source: Source, updates: Iterable[WeightUpdate], *, use_rslora: bool) -> dict[str, Any]:
    """The contents of ``adapter_config.json``."""
    settings = source.stored.config
    targets = _PeftTargets(loading_of(source))
    for update in updates:
        targets.add(update)
    r, rank_pattern = most_common(targets.ranks)
    alpha, alpha_pattern = most_common(targets.alphas)
    config = {
        "peft_type": "LORA",
        **_pretrained(source.stored_inner),
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": use_rslora,
        "use_dora": settings.use_dora,
        "bias": settings.bias,
        "fan_in_fan_out": targets.are_transposed(),
        "target_modules": source.as_targets(targets.modules),
    }
    if targets.parameters:
        config["target_parameters"] = targets.parameters
        config["lora_dropout"] = 0.0
        if settings.bias == "lora_only":
            config["bias"] = "none"  # PEFT stops at an LSTM's bias=True
    rows = {source.name_for_reader(name): list(layer.tokens) for name, layer in source.layers_with_rows.items()}
    if rows:
        config["trainable_token_indices"] = rows
    saved = list(map(source.name_for_reader, source.stored.saved))
    config["modules_to_save"] = saved or None
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
        if counterpart_of(update.layer).is_parameter or self.loading.is_taken_for_experts(name):
            name = join(name, update.weight)
            self.parameters.append(name)
        else:
            self.modules.append(name)
        self.ranks[name] = update.rank
        self.alphas[name] = _as_integer(update.alpha)
        self.kinds.add(update.layer.adapter_class)

    def are_transposed(self) -> bool:
        """Return whether PEFT is told that the weights are (in, out): of GPT-2's layers, if no others are beside."""
        return LoRAConv1D in self.kinds and LoRALinear not in self.kinds and not self.parameters


def _as_integer(value: float) -> float:
    """The same number without a point, if it is one."""
    return int(value) if value == int(value) else value


def _pretrained(model: StoredModule) -> dict[str, Any]:
    """What PEFT says of a model that came from a folder or the hub."""
    config = dict[str, Any](auto_mapping=None, base_model_name_or_path=model.pretrained or None)
    if model.pretrained and model.classes:
        config["auto_mapping"] = {"base_model_class": model.class_name, "parent_library": model.library}
    return config


def _loading(model: StoredModule) -> str:
    """The lines of Python that load the folder: PEFT builds a model of transformers whose name and class are there."""
    if model.pretrained and model.library.startswith("transformers."):
        return f"""from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("{FOLDER}")"""
    name = model.class_name or "the model"
    return f"""from peft import PeftModel

base = ...    # {name}, with the weights from before the training
model = PeftModel.from_pretrained(base, "{FOLDER}")"""
