"""Write adapters as PEFT's files."""

import json
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, AdapterStateError, ConfigError, ExportError, listed, warn
from lightning_lora.functional.combine import Factors, with_rank
from lightning_lora.functional.update import wide
from lightning_lora.layers import LoRAParameters
from lightning_lora.layers.kinds import LoRAAttention, LoRAConv1D, LoRALinear
from lightning_lora.layers.matrices import Role, Settings, weight_factors
from lightning_lora.model.view import view_of
from lightning_lora.storage.disk import check_output, save, write_errors, writing
from lightning_lora.storage.formats import peft_config as peft
from lightning_lora.storage.formats.diffusers import prefix_for, split, warn_of_replaced
from lightning_lora.storage.formats.own import read_adapter_file
from lightning_lora.storage.formats.peft_layers import check_exportable, is_bias, peft_layer, with_tied, without_zeros
from lightning_lora.storage.names import Renaming, is_inside, list_or_expression
from lightning_lora.storage.state import adapter_state_dict, without_extra
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join, named_modules, starts_of, submodule


def export_peft(
    model_or_file: nn.Module | str | Path,
    directory: str | Path,
    *,
    root: str | None = None,
    uniform: bool = False,
    format: Literal["peft", "diffusers"] = "peft",
) -> None:
    """Write adapters in PEFT's format, or in that of diffusers, into a directory.

    ``peft``, ``transformers`` and, with ``uniform=True``, vLLM and llama.cpp read it unchanged, and compute what the
    adapted model computes here. What they would compute otherwise is refused, and nothing is written.

    Args:
        model_or_file: A model with adapters (on its layers, or merged), or a file that ``save_adapter`` or a Trainer
            with ``LoRACallback`` wrote.
        directory: The directory for PEFT's two files, or for ``pytorch_lora_weights.safetensors`` of diffusers. It is
            made if only the last folder is missing. Other files in it stay.
        root: The name of the module that the reader has, such as ``"model"`` for the model inside a LightningModule;
            ``""`` is the whole module. By default it is the one model inside, if there is one.
        uniform: Write one rank and one alpha for all layers, without rsLoRA, for readers that know no others: vLLM,
            llama.cpp, and PEFT's hotswap (all files). The factors are padded with zeros.
        format: ``"diffusers"`` writes what ``pipe.load_lora_weights(directory)`` reads: all adapted parts of a pipeline
            in the module. Names begin with the part: its own name if it is one, such as ``text_encoder_2``; else
            ``unet``, ``transformer`` or ``text_encoder``, by the class of the model.

    Raises:
        ExportError: PEFT has no counterpart for a layer, or would compute something else, or something was trained
            outside of ``root``, or the pipeline would refuse it.
        AdapterStateError: the model has no adapters.
        AdapterFileError: the file cannot be read or does not say enough, or the directory cannot be written.
        ConfigError: ``root`` holds no adapted layer, or ``format`` is another word.
        FileNotFoundError: the file, or the folder of ``directory``, does not exist.

    Warns:
        LoRAWarning: an nn.TransformerEncoder, which reads weights past PEFT's layers in eval mode, holds adapted
            layers; or an adapted weight is tied to another, which PEFT's merge would change; or frozen layers look
            untrained, which PEFT's format cannot hold; or vLLM or llama.cpp would scale a language model otherwise.

    Example:
        >>> import tempfile
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> names = inject_adapters(model, LoRAConfig(r=2, alpha=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_peft(model, folder)
        ...     config = json.loads((Path(folder) / "adapter_config.json").read_text())
        >>> config["r"], config["lora_alpha"], config["target_modules"]
        (2, 4, ['0', '2'])
    """
    if format not in ("peft", "diffusers"):
        raise ConfigError(f"format={format!r} is not known. Expected 'peft' or 'diffusers'.")
    source = _source(model_or_file, root)
    is_peft = format == "peft"
    place = (peft.PEFT_WEIGHTS if is_peft else peft.DIFFUSERS_WEIGHTS)[0]
    check_output(directory, [model_or_file], [place])
    tensors, about = dict[str, Tensor](), dict[str, Any]()
    for stored in [source.stored] if is_peft else split(source.stored, source.model):
        prefix, own, config = _part(replace(source, stored=stored), uniform=uniform, is_peft=is_peft)
        tensors |= {prefix + name: value.detach().cpu().clone().contiguous() for name, value in own.items()}
        about |= {prefix + name: value for name, value in config.items()}
    contents = save(tensors, {"format": "pt", peft.METADATA: json.dumps(about)})
    directory = Path(directory).expanduser()
    if not is_peft:
        warn_of_replaced(directory / place, tensors)
    _write(directory, place, contents, json.dumps(config, indent=2).encode() if is_peft else b"")


def _part(source: "_Source", *, uniform: bool, is_peft: bool) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """What stands before all names, the tensors by their names after it, and the configuration."""
    source = replace(source, stored=with_tied(without_zeros(source.stored, source.modules or {}), source.model))
    check_exportable(source.stored, source.modules or {}, source.saved)
    updates = _updates(source)
    if source.stored.config.trainable_token_indices and (uniform or not is_peft or not updates):
        raise ExportError("Rows (trainable_token_indices) fit in PEFT's format alone, beside adapters, not uniform.")
    if uniform or not is_peft:  # diffusers before 0.34, and others that read its files, scale all by 1
        scaling = Counter(update.scaling for update in updates).most_common(1)[0][0] if is_peft else 1.0
        updates = _with_scaling(updates, scaling, max(update.rank for update in updates) if uniform else 0)
    tensors = _tensors(source, updates)
    config = _config(source, updates, use_rslora=source.stored.config.use_rslora and is_peft and not uniform)
    _warn_of_merges(source)
    if is_peft and type(source.inner).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        _warn_of_scalings(updates, config)
    return peft.PREFIX if is_peft else prefix_for(source.inner, source.stored, tensors), tensors, config


# What to export


@dataclass(frozen=True)
class _Source:
    """Adapters to export, and the model that they are from, or None for a file."""

    stored: StoredAdapters
    model: nn.Module | None = None

    def name_there(self, name: str) -> str:
        """A name in the module that the reader has: without the root's prefix."""
        return Renaming(self.stored.root, "").name_here(name)

    @cached_property
    def inner(self) -> nn.Module | None:  # the module that the reader has
        return None if self.model is None else submodule(self.model, self.stored.root)

    @cached_property
    def modules(self) -> dict[str, nn.Module] | None:
        """The modules inside it, by their names there. Those of a file are not known."""
        return None if self.inner is None else named_modules(self.inner, remove_duplicate=False)

    @cached_property
    def saved(self) -> dict[str, Tensor]:
        """All entries of modules that are trained whole, unchanged ones too."""
        present = dict(self.stored.state)
        if self.model is not None:
            view = view_of(self.model)
            present = {**view.parameters, **view.buffers, **present}
        names = list(chain.from_iterable(self.stored.saved.values()))
        if missing := [name for name in names if name not in present]:
            raise ExportError(
                f"{self.stored.source} does not hold {listed(missing)}, which have the base's values, and PEFT's "
                "format needs all of a module in modules_to_save. Load the file onto its model, and export the model."
            )
        return {name: present[name] for name in names}


def _source(model_or_file: nn.Module | str | Path, root: str | None) -> _Source:
    if isinstance(model_or_file, nn.Module):
        view = view_of(model_or_file)
        state = without_extra(view, adapter_state_dict(model_or_file))
        if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
            raise AdapterStateError("The adapters are on the meta device, without values. Call model.to_empty first.")
        stored, model = StoredAdapters.from_view(view, state, []), model_or_file
    else:
        stored, model = read_adapter_file(model_or_file), None
    if root is not None:
        if root and root not in chain.from_iterable(map(starts_of, stored.layers)):
            raise ConfigError(
                f"root={root!r} holds no adapted layer. Expected the name of the module that the reader has, such as "
                f"{stored.root!r}; the adapted layers are {listed(stored.layers)}."
            )
        stored = replace(stored, root=root)
    if left := [name for name in stored.random if name not in stored.filled or is_inside(name, stored.root)]:
        warn(
            f"{listed(left)} look untrained and stayed frozen, or setup filled them. PEFT's format has no place for "
            "them: name layers in modules_to_save and train again, or save the whole model: save_merged(model, path)."
        )
    state = {name: value for name, value in stored.state.items() if name not in stored.random}
    return _Source(replace(stored, state=state), model)


# The updates as PEFT has them


@dataclass(frozen=True)
class _Update:
    """What PEFT keeps for one weight of a layer. The reader has the layer under ``name``."""

    layer: StoredLayer
    name: str
    weight: str
    factors: Factors
    alpha: float
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.factors[0].shape[-2])

    @property
    def is_parameter(self) -> bool:
        return peft_layer(self.layer).is_parameter

    @property
    def target(self) -> str:  # patterns have to match it
        return join(self.name, self.weight) if self.is_parameter else self.name

    def tensors(self) -> dict[str, Tensor]:
        """Return PEFT's tensors, by the ends of their names."""
        own = peft_layer(self.layer)
        factors = own.there(self.factors, self.layer.shapes[self.weight], self.layer.options)
        found = dict(zip(own.keys, factors, strict=True))
        if self.magnitude is not None:  # without .weight in its name, transformers would ignore it
            after = (1,) * (factors[1].dim() - 2)
            found["lora_magnitude_vector.weight"] = self.magnitude.view(1, -1, *after) if after else self.magnitude
        return found


def _updates(source: _Source) -> list[_Update]:
    found, config = list[_Update](), source.stored.config
    for layer in source.stored.layers.values():
        if layer.tokens:
            continue
        settings = layer.settings(config)

        def tensor(name: str, layer: StoredLayer = layer, settings: Settings = settings) -> Tensor:
            value: Tensor = source.stored.state[join(layer.name, name)].detach().cpu()
            return value.to(wide(value.dtype)) if settings.is_difference else value

        for weight in layer.shapes:
            factors = weight_factors(weight, layer.matrices, settings, tensor)
            parameter = join(layer.name, weight) if layer.adapter_class is LoRAParameters else ""
            alpha = config.alpha_of(layer.name, parameter, r=factors[0].shape[-2])
            scaling = next(matrix for matrix in layer.matrices if matrix.weight == weight).scale(layer.scaling)
            magnitude = tensor(layer.matrices[0].parameter(Role.MAGNITUDE)) if settings.use_dora else None
            found.append(_Update(layer, source.name_there(layer.name), weight, factors, alpha, scaling, magnitude))
    return found


def _with_scaling(updates: list[_Update], scaling: float, rank: int) -> list[_Update]:
    """Give all the same scaling: B takes over what differs. And at least this rank, with zeros."""
    found = list[_Update]()
    for update in updates:
        a, b = with_rank(update.factors, max(rank, update.rank))
        factors = a, b * (update.scaling / scaling)
        found.append(replace(update, factors=factors, alpha=scaling * a.shape[-2], scaling=scaling))
    return found


def _tensors(source: _Source, updates: list[_Update]) -> dict[str, Tensor]:
    """All tensors, by PEFT's names without its prefix."""
    wrapped, found = list[tuple[str, dict[str, Tensor]]](), dict[str, Tensor]()
    for update in updates:
        wrapped.append((update.name, update.tensors()))
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


def _inside(name: str, wrappers: Counter[str]) -> str:
    """The name of something that lies inside of modules that PEFT wraps, one or more times each."""
    parts, path = list[str](), ""
    for part in name.split("."):
        parts += ["base_layer"] * wrappers[path]
        path = join(path, part)
        parts.append(part)
    return ".".join(parts)


# The configuration


def _config(source: _Source, updates: list[_Update], *, use_rslora: bool) -> dict[str, Any]:
    """The contents of ``adapter_config.json``."""
    layers = [update.target for update in updates if not update.is_parameter]
    parameters = [update.target for update in updates if update.is_parameter]
    kinds = {update.layer.adapter_class for update in updates}
    r, rank_pattern = peft.most_common({update.target: update.rank for update in updates})
    alphas = {each.target: int(each.alpha) if each.alpha == int(each.alpha) else each.alpha for each in updates}
    alpha, alpha_pattern = peft.most_common(alphas)
    own, inner = source.stored.config, source.inner
    tokens = {source.name_there(each.name): list(each.tokens) for each in source.stored.layers.values() if each.tokens}
    base = getattr(getattr(inner, "config", None), "_name_or_path", "") or None
    auto = {"base_model_class": type(inner).__name__, "parent_library": type(inner).__module__} if base else None
    return {
        "peft_type": "LORA",
        "auto_mapping": auto,
        "base_model_name_or_path": base,
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


# The files


def _warn_of_merges(source: _Source) -> None:
    """Say where the base is not what PEFT's merge, or its model without a merge, takes it for."""
    around, others = dict[str, nn.Module | None](), dict[str, list[str]]()
    for layer in source.stored.layers.values():
        if layer.tied and not layer.tokens:
            others[layer.name] = list(chain.from_iterable(layer.tied.values()))
        for name in starts_of(source.name_there(layer.name))[:-1]:
            around[name] = (source.modules or {}).get(name)
    if others:
        warn(
            f"The weights of {listed(others)} are also {listed(chain.from_iterable(others.values()))}. A PeftModel "
            "computes right, but its merge_and_unload() changes these too. Merge with save_merged(model, path), which "
            "writes a weight for each."
        )
    if held := [name for name, module in around.items() if isinstance(module, nn.TransformerEncoderLayer)]:
        warn(
            f"{listed(held)} are layers of nn.TransformerEncoder. In eval mode they read weights past PEFT's layers: "
            "a PeftModel computes the base there. Call its merge_and_unload(), which is right."
        )


def _warn_of_scalings(updates: list[_Update], config: dict[str, Any]) -> None:
    """Name readers that ignore patterns: vLLM scales all by one number, llama.cpp by lora_alpha over each rank."""
    scaling = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    readers = ["vLLM up to 0.30"] * any(abs(update.scaling - scaling) > 1e-6 * scaling for update in updates)
    if readers := readers + ["llama.cpp"] * bool(config["alpha_pattern"] or config["use_rslora"]):
        warn(f"For {' and '.join(readers)}, pass uniform=True: it would scale this adapter otherwise, without a word.")


def _write(directory: Path, name: str, weights: bytes, config: bytes) -> None:
    """Write one file, or PEFT's two, or none.

    At no moment are there weights with the configuration of others, which PEFT would read. Meanwhile, ours is in the
    header of its weights, and that of others is beside theirs under another name.
    """
    is_away = False
    with write_errors(directory):
        is_new = not directory.exists()
        directory.mkdir(exist_ok=True)
    place = (directory / peft.PEFT_CONFIG).resolve()
    before = place.with_name(peft.OLD_CONFIG)
    try:
        with ExitStack() as files:
            if config:
                files.enter_context(writing(place)).write_bytes(config)
            with writing(directory / name) as part:
                part.write_bytes(weights)
                if config and place.is_file() and place.read_bytes() != config:
                    place.replace(before)
                    is_away = True
            is_away = False  # the weights that it belongs to are no longer there
    except BaseException as error:
        with suppress(OSError):
            if is_away and isinstance(error, AdapterFileError):
                before.replace(place)
            if is_new:
                (directory / name).unlink(missing_ok=True)
                directory.rmdir()
        raise
    if config:
        with suppress(OSError):
            before.unlink(missing_ok=True)
