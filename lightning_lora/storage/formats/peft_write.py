"""Write adapters as PEFT's files."""

import json
from collections import Counter
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ExportError, listed, warn
from lightning_lora.layers.kinds import LoRAAttention, LoRAConv1D, LoRALinear
from lightning_lora.storage.formats import peft_config as peft
from lightning_lora.storage.formats.peft_layers import check_exportable, is_bias, peft_layer, with_tied, without_zeros
from lightning_lora.storage.formats.writing import Source, WeightUpdate, weight_updates, with_scaling, write_files
from lightning_lora.storage.renaming import list_or_expression
from lightning_lora.tensors.names import join, starts_of


def write(source: Source, directory: Path, uniform: bool) -> None:
    """Write PEFT's two files."""
    tensors, config = exported(source, uniform)
    named = {peft.PREFIX + name: value for name, value in tensors.items()}
    header = {peft.METADATA: json.dumps({peft.PREFIX + name: value for name, value in config.items()})}
    write_files(directory, peft.PEFT_WEIGHTS[0], named, header, json.dumps(config, indent=2).encode())


def exported(source: Source, uniform: bool, scaling: float | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return PEFT's tensors, by their names without its prefix, and its configuration.

    ``scaling`` is that of all updates. None: each has its own, or if they are to be uniform, the most common one.
    """
    modules = source.modules or {}
    source = replace(source, stored=with_tied(without_zeros(source.stored, modules), source.model))
    check_exportable(source.stored, modules, source.saved)
    updates, own, is_one = weight_updates(source), source.stored.config, uniform or scaling is not None
    if own.trainable_token_indices and (is_one or not updates):
        raise ExportError("Rows (trainable_token_indices) fit in PEFT's format alone, beside adapters, not uniform.")
    if is_one:
        most_common = Counter(update.scaling for update in updates).most_common(1)[0][0]
        rank = max(update.rank for update in updates) if uniform else 0
        updates = with_scaling(updates, scaling or most_common, rank)
    config = _config(source, updates, use_rslora=own.use_rslora and not is_one)
    _warn_of_merges(source)
    if scaling is None and type(source.inner).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        _warn_of_scalings(updates, config)
    return _tensors(source, updates), config


def _tensors(source: Source, updates: list[WeightUpdate]) -> dict[str, Tensor]:
    """All tensors, by PEFT's names without its prefix."""
    wrapped, found = list[tuple[str, dict[str, Tensor]]](), dict[str, Tensor]()
    for update in updates:
        wrapped.append((update.name, _of_update(update)))
        if update.layer.adapter_class is LoRAAttention:  # PEFT adapts its output projection too: by zero here
            zero = torch.zeros_like(update.factors[0])
            wrapped.append((join(update.name, "out_proj"), {"lora_A.weight": zero, "lora_B.weight": zero.T}))
    wrappers = Counter(name for name, _ in wrapped)
    left = wrappers.copy()
    for name, tensors in wrapped:
        left[name] -= 1
        place = ".".join([_inside(name, wrappers), *["base_layer"] * left[name]])
        found |= {f"{place}.{end}": value for end, value in tensors.items()}
    for layer in filter(attrgetter("tokens"), source.stored.layers.values()):
        (name,) = layer.parameters(source.stored.config).values()
        found[f"{_inside(source.name_there(layer.name), wrappers)}.{peft.TOKENS}"] = source.stored.state[name]
    for name, value in source.stored.state.items():
        if is_bias(name, source.stored) and name not in source.saved:
            found[_inside(source.name_there(name), wrappers)] = value
    found |= {source.name_there(name): value for name, value in source.saved.items()}
    return found


def _of_update(update: WeightUpdate) -> dict[str, Tensor]:
    """PEFT's tensors of an update, by the ends of their names."""
    own = peft_layer(update.layer)
    factors = own.there(update.factors, update.layer.shapes[update.weight], update.layer.options)
    found = dict(zip(own.keys, factors, strict=True))
    if update.magnitude is not None:  # without .weight in its name, transformers would ignore it
        after = (1,) * (factors[1].dim() - 2)
        found["lora_magnitude_vector.weight"] = update.magnitude.view(1, -1, *after) if after else update.magnitude
    return found


def _inside(name: str, wrappers: Counter[str]) -> str:
    """The name of something inside of modules that PEFT wraps. ``wrappers`` says how often it wraps each."""
    components, path = list[str](), ""
    for component in name.split("."):
        components += ["base_layer"] * wrappers[path]
        path = join(path, component)
        components.append(component)
    return ".".join(components)


def _config(source: Source, updates: list[WeightUpdate], *, use_rslora: bool) -> dict[str, Any]:
    """The contents of ``adapter_config.json``."""
    layers, parameters = list[str](), list[str]()
    ranks, alphas = dict[str, int](), dict[str, float]()
    for update in updates:
        is_parameter = peft_layer(update.layer).is_parameter
        target = join(update.name, update.weight) if is_parameter else update.name
        (parameters if is_parameter else layers).append(target)
        ranks[target] = update.rank
        alphas[target] = int(update.alpha) if update.alpha == int(update.alpha) else update.alpha
    r, rank_pattern = peft.most_common(ranks)
    alpha, alpha_pattern = peft.most_common(alphas)
    kinds = {update.layer.adapter_class for update in updates}
    own, inner = source.stored.config, source.inner
    tokens = {source.name_there(each.name): list(each.tokens) for each in source.stored.layers.values() if each.tokens}
    pretrained = getattr(getattr(inner, "config", None), "_name_or_path", "") or None
    auto = {"base_model_class": type(inner).__name__, "parent_library": type(inner).__module__} if pretrained else None
    return {
        "peft_type": "LORA",
        "auto_mapping": auto,
        "base_model_name_or_path": pretrained,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else own.dropout,
        "use_rslora": use_rslora,
        "use_dora": own.use_dora,
        "bias": "none" if parameters and own.bias == "lora_only" else own.bias,  # PEFT stops at an LSTM's bias=True
        "fan_in_fan_out": LoRAConv1D in kinds and LoRALinear not in kinds and not parameters,
        "target_modules": list_or_expression(layers, source.modules),
        **({"target_parameters": parameters} if parameters else {}),
        **({"trainable_token_indices": tokens} if tokens else {}),
        "modules_to_save": list(map(source.name_there, source.stored.saved)) or None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _warn_of_merges(source: Source) -> None:
    """Warn where PEFT's model, merged or not, computes something else."""
    modules, tied, others, held = source.modules or {}, list[str](), list[str](), dict[str, None]()
    for layer in source.stored.layers.values():
        if layer.tied and not layer.tokens:
            tied.append(layer.name)
            others += chain.from_iterable(layer.tied.values())
        for name in starts_of(source.name_there(layer.name))[:-1]:
            if isinstance(modules.get(name), nn.TransformerEncoderLayer):
                held[name] = None
    if tied:
        warn(
            f"The weights of {listed(tied)} are also {listed(others)}. A PeftModel computes right, but its "
            "merge_and_unload() changes these too. Merge with save_merged(model, path): it writes a weight for each."
        )
    if held:
        warn(
            f"{listed(held)} are layers of nn.TransformerEncoder. In eval mode they read weights past PEFT's layers: "
            "a PeftModel computes the base there. Call its merge_and_unload(), which is right."
        )


def _warn_of_scalings(updates: list[WeightUpdate], config: dict[str, Any]) -> None:
    """Name readers that ignore patterns: vLLM scales all by one number, llama.cpp by lora_alpha over each rank."""
    scaling = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    readers = ["vLLM up to 0.30"] if any(abs(each.scaling - scaling) > 1e-6 * scaling for each in updates) else []
    readers += ["llama.cpp"] if config["alpha_pattern"] or config["use_rslora"] else []
    if readers:
        warn(f"For {' and '.join(readers)}, pass uniform=True: it would scale this adapter otherwise, without a word.")
