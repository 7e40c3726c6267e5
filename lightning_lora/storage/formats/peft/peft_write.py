"""Write adapters as PEFT's files."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ExportError, listed, warn
from lightning_lora.layers.kinds import LoRAAttention, LoRAConv1D, LoRALinear
from lightning_lora.storage.disk import save
from lightning_lora.storage.formats.peft import peft_config as peft
from lightning_lora.storage.formats.peft.peft_fitted import fitted
from lightning_lora.storage.formats.peft.peft_layers import peft_layer
from lightning_lora.storage.formats.peft.peft_refusals import trained_biases
from lightning_lora.storage.formats.writing import Source, WeightUpdate, weight_updates, with_scaling, write_files
from lightning_lora.storage.renaming import Renaming, list_or_expression
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.named import not_in, of_type, only, where
from lightning_lora.tensors.names import join, starts_of


def write(source: Source, directory: Path, uniform: bool) -> None:
    """Write PEFT's two files."""
    tensors, config = exported(source, uniform)
    in_peft = Renaming(here=peft.PREFIX)
    header = json.dumps(in_peft.with_names_here(config))
    contents = {
        peft.PEFT_CONFIG: json.dumps(config, indent=2).encode(),
        peft.PEFT_WEIGHTS[0]: save(in_peft.with_names_here(tensors), {peft.METADATA: header}),
    }
    write_files(directory, contents)


def exported(source: Source, uniform: bool, scaling: float | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return PEFT's tensors, by their names without its prefix, and its configuration.

    ``scaling`` is that of all updates. None: each has its own, or if they are to be uniform, the most common one.
    """
    source = fitted(source)
    updates = weight_updates(source)
    settings = source.stored.config
    has_one_scaling = uniform or scaling is not None
    if settings.trainable_token_indices and (has_one_scaling or not updates):
        raise ExportError("Rows (trainable_token_indices) fit in PEFT's format alone, beside adapters, not uniform.")
    if has_one_scaling:
        updates = _with_one_scaling(updates, uniform, scaling)
    config = _config(source, updates, use_rslora=settings.use_rslora and not has_one_scaling)
    _warn_of_merges(source)
    if scaling is None:
        _warn_of_scalings(source, updates, config)
    return _tensors(source, updates), config


def _with_one_scaling(updates: list[WeightUpdate], uniform: bool, scaling: float | None) -> list[WeightUpdate]:
    """Give all the same scaling, by default the most common one. ``uniform``: and the same rank."""
    if scaling is None:
        scalings = Counter(update.scaling for update in updates)
        ((scaling, _),) = scalings.most_common(1)
    rank = max(update.rank for update in updates) if uniform else 0
    return with_scaling(updates, scaling, rank)


# The tensors

Wrapper = dict[str, Tensor]  # its tensors, by the ends of their names


def _tensors(source: Source, updates: Iterable[WeightUpdate]) -> dict[str, Tensor]:
    """All tensors, by PEFT's names without its prefix."""
    wrappers = _wrappers(updates)
    tensors = wrappers.tensors()
    for layer in _layers_with_rows(source):
        (rows,) = layer.parameters(source.stored.config).values()
        place = wrappers.name_inside(source.name_there(layer.name))
        name = f"{place}.{peft.TOKENS}"
        tensors[name] = source.stored.state[rows]
    biases = not_in(trained_biases(source.stored), source.saved)
    for name, value in only(source.stored.state, biases).items():
        place = wrappers.name_inside(source.name_there(name))
        tensors[place] = value
    for name, value in source.saved.items():
        place = source.name_there(name)
        tensors[place] = value
    return tensors


def _wrappers(updates: Iterable[WeightUpdate]) -> "_Wrappers":
    """What PEFT wraps for these updates."""
    wrappers = _Wrappers()
    for update in updates:
        wrappers.add(update.name, _of_update(update))
        if update.layer.adapter_class is LoRAAttention:  # PEFT adapts its output projection too: by zero here
            a, _ = update.factors
            zero = torch.zeros_like(a)
            tensors = {"lora_A.weight": zero, "lora_B.weight": zero.T}
            wrappers.add(join(update.name, "out_proj"), tensors)
    return wrappers


@dataclass
class _Wrappers:
    """What PEFT wraps around modules: if a module has several wrappers, they lie in each other, the last outermost."""

    around: dict[str, list[Wrapper]] = field(default_factory=dict)  # by the name of the module

    def add(self, name: str, tensors: Wrapper) -> None:
        """Wrap a module once more, around its other wrappers."""
        self.around.setdefault(name, []).append(tensors)

    def name_inside(self, name: str) -> str:
        """Return PEFT's name for something inside of modules that are wrapped."""
        components = list[str]()
        above = ""
        for component in name.split("."):
            wrappers = self.around.get(above, [])
            components += ["base_layer"] * len(wrappers)
            components.append(component)
            above = join(above, component)
        return ".".join(components)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all wrappers by name."""
        named = dict[str, Tensor]()
        for name, wrappers in self.around.items():
            place = self.name_inside(name)
            for tensors in reversed(wrappers):  # from the outermost one
                for end, value in tensors.items():
                    named[f"{place}.{end}"] = value
                place += ".base_layer"
        return named


def _of_update(update: WeightUpdate) -> Wrapper:
    """What PEFT has for an update."""
    counterpart = peft_layer(update.layer)
    shape = update.layer.shapes[update.weight]
    factors = counterpart.there(update.factors, shape, update.layer.options)
    tensors = dict(zip(counterpart.keys, factors, strict=True))
    if update.magnitude is not None:  # without .weight in its name, transformers would ignore it
        _, b = factors
        kernel = (1,) * (b.dim() - 2)
        shape = (1, -1, *kernel) if kernel else (-1,)
        tensors["lora_magnitude_vector.weight"] = update.magnitude.view(shape)
    return tensors


# The configuration


def _config(source: Source, updates: Iterable[WeightUpdate], *, use_rslora: bool) -> dict[str, Any]:
    """The contents of ``adapter_config.json``."""
    settings = source.stored.config
    targets = _Targets()
    for update in updates:
        targets.add(update)
    r, rank_pattern = peft.most_common(targets.ranks)
    alpha, alpha_pattern = peft.most_common(targets.alphas)
    modules = None if source.inner is None else source.modules
    config = {
        "peft_type": "LORA",
        **_pretrained(source.inner),
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if targets.parameters else settings.dropout,
        "use_rslora": use_rslora,
        "use_dora": settings.use_dora,
        "bias": settings.bias,
        "fan_in_fan_out": targets.are_transposed(),
        "target_modules": list_or_expression(targets.modules, modules),
    }
    if targets.parameters:
        config["target_parameters"] = targets.parameters
        if settings.bias == "lora_only":
            config["bias"] = "none"  # PEFT stops at an LSTM's bias=True
    tokens = _tokens(source)
    if tokens:
        config["trainable_token_indices"] = tokens
    config["modules_to_save"] = [source.name_there(name) for name in source.stored.saved] or None
    config["rank_pattern"] = rank_pattern
    config["alpha_pattern"] = alpha_pattern
    return config


@dataclass
class _Targets:
    """What PEFT is to adapt: the names of layers and of parameters, with the rank and alpha of each."""

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    kinds: set[Any] = field(default_factory=set)  # the classes of our adapters

    def add(self, update: WeightUpdate) -> None:
        """Name what has one more update."""
        name = update.name
        if peft_layer(update.layer).is_parameter:
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


def _pretrained(model: nn.Module | None) -> dict[str, Any]:
    """What PEFT says of a model that came from a folder or the hub."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    auto_mapping = None
    if name is not None:
        auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {"auto_mapping": auto_mapping, "base_model_name_or_path": name}


def _layers_with_rows(source: Source) -> list[StoredLayer]:
    """The embeddings of which single rows train."""
    return list(where(source.stored.layers, _has_rows).values())


def _has_rows(layer: StoredLayer) -> bool:
    return bool(layer.tokens)


def _tokens(source: Source) -> dict[str, list[int]]:
    """The rows that train, by embedding."""
    return {source.name_there(layer.name): list(layer.tokens) for layer in _layers_with_rows(source)}


# Readers that compute something else


def _warn_of_merges(source: Source) -> None:
    """Warn where PEFT's model, merged or not, computes something else."""
    tied = where(source.stored.layers, _is_tied)
    if tied:
        others = [name for layer in tied.values() for name in chain.from_iterable(layer.tied.values())]
        warn(
            f"The weights of {listed(tied)} are also {listed(others)}. A PeftModel computes right, but its "
            "merge_and_unload() changes these too. Merge with save_merged(model, path): it writes a weight for each."
        )
    encoders = _encoder_layers(source)
    if encoders:
        warn(
            f"{listed(encoders)} are layers of nn.TransformerEncoder. In eval mode they read weights past PEFT's "
            "layers: a PeftModel computes the base there. Call its merge_and_unload(), which is right."
        )


def _is_tied(layer: StoredLayer) -> bool:
    """Whether an update of a layer's weights would reach other layers. Rows of tokens belong to all of them."""
    return bool(layer.tied) and not layer.tokens


def _encoder_layers(source: Source) -> list[str]:
    """The names of the transformer layers around adapted ones."""
    names = dict[str, None]()
    for layer in source.stored.layers.values():
        names |= dict.fromkeys(starts_of(source.name_there(layer.name))[:-1])
    return list(only(names, of_type(source.modules, nn.TransformerEncoderLayer)))


def _warn_of_scalings(source: Source, updates: Iterable[WeightUpdate], config: dict[str, Any]) -> None:
    """Name readers that ignore patterns: vLLM scales all by one number, llama.cpp by lora_alpha over each rank."""
    if not type(source.inner).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return
    growth = config["r"] ** (0.5 if config["use_rslora"] else 1)
    scaling = config["lora_alpha"] / growth
    readers = list[str]()
    differences = [abs(update.scaling - scaling) for update in updates]
    if max(differences) > 1e-6 * scaling:
        readers.append("vLLM up to 0.30")
    if config["alpha_pattern"] or config["use_rslora"]:
        readers.append("llama.cpp")
    if readers:
        warn(f"For {' and '.join(readers)}, pass uniform=True: it would scale this adapter otherwise, without a word.")
