"""Write adapters as PEFT's files."""

import json
import re
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from lightning_lora.config import matches
from lightning_lora.errors import AdapterFileError, LoRAWarning, listed
from lightning_lora.layers.conv1d import LoRAConv1D
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.storage.disk import check_path, writing
from lightning_lora.storage.formats.libraries import PEFT_CONFIG, PEFT_WEIGHTS
from lightning_lora.storage.formats.peft_pieces import Piece, attention_rest, pieces_of, uniform
from lightning_lora.storage.formats.peft_refusals import check_exportable, is_bias
from lightning_lora.storage.formats.peft_source import Source, source_of
from lightning_lora.tensors.names import join

ORIGIN = "lightning_lora_origin"
"""The entry of the weights' metadata with our own description: the base's fingerprints, layers and configuration."""

_PREFIX = "base_model.model"
_MOST = 16
"""vLLM's default for the largest rank."""


def export_peft(
    model_or_file: nn.Module | str | Path, directory: str | Path, *, root: str | None = None, uniform: bool = False
) -> None:
    """Write adapters in PEFT's format, into a directory.

    ``peft``, ``transformers`` and, with ``uniform=True``, vLLM read it unchanged. They compute what the adapted model
    computes here. Everything for which that is not so is refused before anything is written.

    Args:
        model_or_file: A model with adapters (on its layers, or merged), or a file that ``save_adapter`` or a Trainer
            with ``LoRACallback`` wrote.
        directory: The directory for ``adapter_config.json`` and ``adapter_model.safetensors``. It is made if only the
            last folder is missing. Other files in it stay.
        root: The name of the module that the reader has, such as ``"model"`` for the model inside a LightningModule;
            ``""`` is the whole module. By default it is the one model inside, if there is one.
        uniform: Write one rank and one alpha for all layers, for readers that know no others, such as vLLM. The
            factors are padded with zeros.

    Raises:
        ExportError: PEFT has no counterpart for a layer, or would compute something else, or something was trained
            outside of ``root``.
        AdapterStateError: the model has no adapters.
        AdapterFileError: the file cannot be read or does not say enough, or the directory cannot be written.
        ConfigError: ``root`` holds no adapted layer.
        FileNotFoundError: the file, or the folder of ``directory``, does not exist.

    Warns:
        LoRAWarning: with ``uniform``, the rank is above 16, vLLM's default limit. Or an nn.TransformerEncoder, which
            reads weights past PEFT's layers in eval mode, holds the adapted layers.

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
    check_path(directory)
    source = source_of(model_or_file, root)
    check_exportable(source)
    pieces = pieces_of(source)
    if uniform:
        pieces = _made_uniform(pieces)
    config = _config(source, pieces, uniform=uniform)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in _tensors(source, pieces).items()}
    origin = {**source.description, "root": source.root}
    contents = save(tensors, metadata={"format": "pt", ORIGIN: json.dumps(origin)})
    _warn_of_encoders(source)
    _write(Path(directory).expanduser(), contents, json.dumps(config, indent=2))


def _made_uniform(pieces: list[Piece]) -> list[Piece]:
    pieces = uniform(pieces)
    if pieces[0].rank > _MOST:
        warnings.warn(
            f"The exported rank is {pieces[0].rank}. vLLM takes at most {_MOST} unless it is started with a larger "
            "max_lora_rank.",
            LoRAWarning,
            stacklevel=3,
        )
    return pieces


def _warn_of_encoders(source: Source) -> None:
    encoders = [name for name, module in source.modules.items() if isinstance(module, nn.TransformerEncoderLayer)]
    names = [source.own_name(layer.name) for layer in source.layers]
    held = [encoder for encoder in encoders if any(name.startswith(f"{encoder}.") for name in names)]
    if held:
        warnings.warn(
            f"{listed(held)} are layers of nn.TransformerEncoder. In eval mode they read weights past PEFT's layers: "
            "a PeftModel computes the base there. Call its merge_and_unload(), which is right.",
            LoRAWarning,
            stacklevel=3,
        )


# The tensors


def _tensors(source: Source, pieces: list[Piece]) -> dict[str, Tensor]:
    """All tensors, by PEFT's names."""
    wrappers = _wrappers(pieces)
    found: dict[str, Tensor] = {}
    for i, piece in enumerate(pieces):
        later = sum(other.name == piece.name for other in pieces[i + 1 :])
        name = ".".join([_inside(piece.name, wrappers), *["base_layer"] * later])
        found |= {f"{name}.{end}": value for end, value in piece.tensors().items()}
        rest = _inside(join(piece.name, "out_proj"), wrappers)
        found |= {f"{rest}.{end}": value for end, value in attention_rest(piece).items()}
    saved = {name: value for entries in source.saved().values() for name, value in entries.items()}
    for name, value in source.state.items():
        if is_bias(name, source) and name not in saved:
            found[_inside(source.own_name(name), wrappers)] = value
    found |= {source.own_name(name): value for name, value in saved.items()}
    return {join(_PREFIX, name): value for name, value in found.items()}


def _wrappers(pieces: list[Piece]) -> dict[str, int]:
    """How many modules PEFT puts around each module."""
    wrappers = dict(Counter(piece.name for piece in pieces))
    for piece in pieces:
        if attention_rest(piece):
            wrappers[join(piece.name, "out_proj")] = 1
    return wrappers


def _inside(name: str, wrappers: dict[str, int]) -> str:
    """The name of something that lies inside of modules that PEFT wraps."""
    parts, path = list[str](), ""
    for part in name.split("."):
        parts += ["base_layer"] * wrappers.get(path, 0)
        path = join(path, part)
        parts.append(part)
    return ".".join(parts)


# The configuration


def _config(source: Source, pieces: list[Piece], *, uniform: bool) -> dict[str, Any]:
    """The contents of ``adapter_config.json``."""
    ranks, alphas = Counter(piece.rank for piece in pieces), Counter(_number(piece.alpha) for piece in pieces)
    r, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    layers, parameters = [p for p in pieces if not p.parameter], [p.target for p in pieces if p.parameter]
    linear = [kind for p in layers if (kind := p.layer.adapter_class) and issubclass(kind, LoRALinear)]
    own, inner = source.config, source.inner
    base = getattr(getattr(inner, "config", None), "_name_or_path", "") or None
    auto = {"base_model_class": type(inner).__name__, "parent_library": type(inner).__module__} if base else None
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": auto,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else own.dropout,
        "use_rslora": own.use_rslora and not uniform,
        "use_dora": own.use_dora,
        "bias": "none" if parameters and own.bias == "lora_only" else own.bias,  # PEFT stops at an LSTM's bias=True
        "fan_in_fan_out": bool(linear) and all(issubclass(kind, LoRAConv1D) for kind in linear) and not parameters,
        "init_lora_weights": True,
        "target_modules": _exactly([piece.name for piece in layers], source),
        **({"target_parameters": parameters} if parameters else {}),
        "modules_to_save": [source.own_name(name) for name in source.description.get("saved", {})] or None,
        "rank_pattern": {f"^{re.escape(p.target)}": p.rank for p in pieces if p.rank != r},
        "alpha_pattern": {f"^{re.escape(p.target)}": _number(p.alpha) for p in pieces if _number(p.alpha) != alpha},
    }


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _exactly(names: list[str], source: Source) -> list[str] | str:
    """The names, or an expression where a name may also be the end of another module's name."""
    others = set(source.modules) - set(names)
    ends = any(other.endswith(name) and matches(name, other) for name in names for other in others)
    if names and (ends or source.model is None):
        return "|".join(map(re.escape, names))
    return names


# The files


def _write(directory: Path, weights: bytes, config: str) -> None:
    """Write both files, or none. At no moment are there weights with the configuration of others."""
    is_new = not directory.exists()
    if not is_new and not directory.is_dir():
        raise AdapterFileError(f"{directory} is a file. Pass a directory.")
    if not directory.parent.is_dir():
        raise FileNotFoundError(f"The folder {directory.parent} does not exist. Make it first.")
    directory.mkdir(exist_ok=True)
    place = directory / PEFT_CONFIG
    before = None
    try:
        with writing(place) as config_part:
            config_part.write_text(config)
            with writing(directory / PEFT_WEIGHTS[0]) as weights_part:
                weights_part.write_bytes(weights)
                before = place.read_bytes() if place.exists() else None
                place.unlink(missing_ok=True)
            before = None  # it belongs to weights that are no longer there
    except BaseException:
        if before is not None:
            place.write_bytes(before)
        if is_new:
            with suppress(OSError):
                (directory / PEFT_WEIGHTS[0]).unlink(missing_ok=True)
                directory.rmdir()
        raise
