"""Read a Trainer's checkpoint with the strategy's own method.

Only plain types are read, unless the user trusts it.
"""

import os
from inspect import signature
from typing import Any

import torch

from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.on_disk import archives, places, read_errors
from lightning_lora.training.strategies.strategy_patch import StrategyPatch

Checkpoint = dict[str, Any]
"""What a Trainer's file holds."""

_TRUST_VARIABLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""With this environment variable, torch lets all files run code."""


def read_checkpoint(
    methods: StrategyPatch, path: Any, *args: Any, **kwargs: Any
) -> Any:
    """Let a strategy read a file.

    It must have plain types only, unless the user trusts it.
    """
    places.check_path(path)
    _refuse_safetensors(path)
    is_trusted = _is_trusted(*args, **kwargs)
    with read_errors.reading(path, _how_to_trust(methods)):
        archives.check_file(path, may_be_other=not _reads_with_torch(methods))
        if is_trusted:
            return methods.original.load_checkpoint(path, *args, **kwargs)
        return _read_plain_types(methods, path)


def _read_plain_types(methods: StrategyPatch, path: Any) -> Any:
    """Let a strategy read a file of plain types.

    Lightning before 2.6 cannot be told to read only these: torch reads in its place.
    Other code that cannot be told so reads in its own way.
    """
    load = methods.original.load_checkpoint
    if _takes_weights_only(methods):
        return load(path, weights_only=True)
    if uses_lightnings_io(methods, "load_checkpoint"):
        with places.opened(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    return load(path)


def _refuse_safetensors(path: Any) -> None:
    """Refuse a file that no Trainer has written, and say what loads it."""
    if str(path).endswith(".safetensors"):
        raise AdapterFileError(
            f"{path} is no Trainer's checkpoint. If save_merged wrote it, call "
            "safetensors.torch.load_model(model, path), otherwise load_adapter(model, "
            "path). Then use the Trainer without ckpt_path."
        )


def _is_trusted(*args: Any, **kwargs: Any) -> bool:
    """Whether the user lets files of objects be read: by a variable, which torch reads too, or by an argument."""
    if os.environ.get(_TRUST_VARIABLE, "0").lower() in ("1", "y", "yes", "true"):
        return True
    # weights_only is the only argument behind the path: it comes by place or by name
    arguments = [*args, kwargs.get("weights_only")]
    return False in arguments


def _how_to_trust(methods: StrategyPatch) -> str:
    """What to do with a file of objects."""
    trust = f"set {_TRUST_VARIABLE}=1"
    if _takes_weights_only(methods):
        trust = (
            "pass weights_only=False too, as in trainer.fit(model, ckpt_path=path, "
            "weights_only=False)"
        )
    return (
        f"If you trust it, {trust}. Or load only its adapters: load_adapter(model, "
        "path)."
    )


def _takes_weights_only(methods: StrategyPatch) -> bool:
    """Whether the strategy can be told to read plain types only: since Lightning 2.6."""
    return (
        "weights_only" in signature(type(methods.strategy).load_checkpoint).parameters
    )


def uses_lightnings_io(methods: StrategyPatch, method: str) -> bool:
    """Whether a method writes or reads by Lightning's own plugin: with torch.save or torch.load, at once."""
    plugin = methods.strategy.checkpoint_io
    return _is_lightnings_own(plugin) and not methods.is_by_other_code(method)


def _reads_with_torch(methods: StrategyPatch) -> bool:
    """Whether torch.load reads the files, perhaps inside of a plugin around Lightning's (AsyncCheckpointIO)."""
    plugin = methods.strategy.checkpoint_io
    while hasattr(plugin, "checkpoint_io"):
        plugin = plugin.checkpoint_io
    return _is_lightnings_own(plugin) and not methods.is_by_other_code(
        "load_checkpoint"
    )


def _is_lightnings_own(plugin: Any) -> bool:
    return type(plugin).__name__ == "TorchCheckpointIO"  # in both Lightning packages
