"""Save the whole merged model, for code that does not know adapters."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, AdapterStateError, listed
from lightning_lora.model.mergeable import layers_with_tied_weights
from lightning_lora.model.view import View, view_of
from lightning_lora.moments import Guard, Guards
from lightning_lora.private import HPARAMS_NAME
from lightning_lora.storage.inner_model import root_of
from lightning_lora.storage.merged_state import merged_state
from lightning_lora.storage.on_disk.places import check_output, path_here
from lightning_lora.storage.on_disk.whole_files import writing, writing_folder
from lightning_lora.storage.renaming import names_without_prefix
from lightning_lora.storage.state import check_not_diverged, trained_tensors
from lightning_lora.tensors.dicts import beginning_with, of_type, only, renamed, without
from lightning_lora.tensors.names import plain_name, submodule
from lightning_lora.tensors.plain_states import StateDict
from lightning_lora.tensors.undo import set_own_attribute


def save_merged(model: nn.Module, path: str | Path) -> None:
    """Write the whole model with merged weights.

    The file has nothing of this package: whoever reads it does not need it. ``model``
    does not change: its adapters stay on their layers, or merged, as they are. The
    weights are those of ``merge_adapters``. Only the merged weights are held in memory
    a second time.

    Args:
        model: A model with adapters: on its layers, or merged by ``merge_adapters`` or
            a finished fit.
        path: The name says what is written. ``.ckpt``: a Lightning checkpoint for
            ``MyModule.load_from_checkpoint``, with the hyperparameters.
            ``.safetensors``: all tensors, for ``safetensors.torch.load_model``. A name
            without ending: a new folder, by the ``save_pretrained`` of the model or of
            the one model inside, for ``from_pretrained``. All are written under another
            name and then moved, so they are never incomplete.

    Raises:
        AdapterStateError: ``model`` has no adapters, or they are disabled or hold NaN
            or infinite values, or its weights are quantised, have no values, or cannot
            hold the sum.
        AdapterFileError: ``model`` cannot be written so, or the file cannot be written.
        FileNotFoundError: the folder of the file does not exist.

    Warns:
        LoRAWarning: a weight is no longer tied.
        MergePrecisionWarning: rounding lost much of an update.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_model
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> plain = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> _ = nn.init.ones_(model[0].lora_B)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_merged(model, f"{folder}/merged.safetensors")
        ...     load_model(plain, f"{folder}/merged.safetensors")
        (set(), [])
        >>> torch.allclose(plain(torch.ones(4)), model(torch.ones(4)), atol=1e-5)
        True
    """
    check_output(path)
    path = path_here(path)
    if path.suffix == ".ckpt":
        _write_checkpoint(view_of(model), path)
    elif path.suffix == ".safetensors":
        _write_safetensors(view_of(model), path)
    elif path.suffix[1:].isalpha():
        # a folder may have dots in its name, as in "llama-3.1"
        raise AdapterFileError(
            f"{path} has an unknown ending. Use .ckpt for a Lightning checkpoint, "
            ".safetensors for all tensors, or a name without ending for a folder by "
            "save_pretrained."
        )
    else:
        _write_folder(view_of(model), path)


def checked_merged_state(view: View, changed: StateDict) -> dict[str, Any]:
    """Return the merged state, to be written.

    It is refused if it holds what no file should. What rounding loses, and which
    weights are no longer tied, is said.

    Args:
        view: The model.
        changed: Values to take in place of the model's own, by name. It may be empty.
    """
    state, lost = merged_state(view, changed)
    check_not_diverged(view)
    _refuse_overflow(view, state)
    Guards().tell(Guard.merged, view.title, lost, _untied(view))
    return state


def _untied(view: View) -> list[str]:
    """The layers whose weight is tied to another layer's in the base, and has an update of its own when merged."""
    untied = [
        merged.layer
        for merged in view.merged_weights
        if merged.tied_parameter is not None
    ]
    return [*untied, *layers_with_tied_weights(view)]


def refuse_to_tie_again(view: View) -> None:
    """Refuse a model whose ``from_pretrained`` would tie weights that are no longer one."""
    untied = _untied(view)
    inner = submodule(view.model, root_of(view.model))
    config = getattr(inner, "config", None)
    if untied and getattr(config, "tie_word_embeddings", False):
        raise AdapterFileError(
            f"The weight of {listed(untied)} in {view.title} is tied to another "
            "layer's and has its own update, and from_pretrained would tie it again. "
            "Set config.tie_word_embeddings = False before saving."
        )


def _refuse_overflow(view: View, state: StateDict) -> None:
    """Refuse merged weights that are not finite in their dtype."""
    weights = only(renamed(state, plain_name), set(view.adapted_weights))
    for name, value in weights.items():
        if not value.isfinite().all():
            raise AdapterStateError(
                f"Merged, {name!r} would hold values that {value.dtype} cannot. "
                "Convert the model first: model.to(torch.float32)."
            )


# A file


def _write_checkpoint(view: View, path: Path) -> None:
    """Write a checkpoint as Lightning does, without a run: for ``load_from_checkpoint``."""
    model: Any = view.model
    package = _package_of_lightning(model)
    if package is None:
        raise AdapterFileError(
            f"{type(model).__name__} is not a LightningModule, so there is no "
            "checkpoint of it. Use a name that ends in .safetensors, or, if it has "
            "save_pretrained, one without ending."
        )
    hyperparameters, kind_of_them = _hyperparameters_in_checkpoint(model)
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": sys.modules[package].__version__,
        "state_dict": checked_merged_state(view, {}),
        model.CHECKPOINT_HYPER_PARAMS_KEY: hyperparameters,
        model.CHECKPOINT_HYPER_PARAMS_TYPE: kind_of_them,
        model.CHECKPOINT_HYPER_PARAMS_NAME: getattr(model, HPARAMS_NAME, None),
    }
    model.on_save_checkpoint(checkpoint)
    with writing(path) as part:
        torch.save(checkpoint, part)


def _hyperparameters_in_checkpoint(model: Any) -> tuple[Any, type | None]:
    """A LightningModule's hyperparameters as checkpoints hold them, and their class if that is omegaconf's."""
    if isinstance(model.hparams, dict):
        return dict(model.hparams), None
    return model.hparams, type(model.hparams)


def _package_of_lightning(model: nn.Module) -> str | None:
    """The package that a LightningModule comes from: ``lightning`` or ``pytorch_lightning``.

    None: it is none.
    """
    for kind in type(model).__mro__:
        if kind.__name__ == "LightningModule":
            package, _, _ = kind.__module__.partition(".")
            return package
    return None


def _write_safetensors(view: View, path: Path) -> None:
    """Write all tensors of the merged model into one file."""
    state = checked_merged_state(view, {})
    odd = without(state, of_type(state, Tensor))
    if odd:
        raise AdapterFileError(
            f"{listed(odd)} are not tensors, which is all that safetensors holds. Use "
            "a name that ends in .ckpt, or one without ending."
        )
    with writing(path) as part:
        part.touch()
        mode = part.stat().st_mode
        # save_model asks nothing else of a model
        model: Any = SimpleNamespace(state_dict=lambda: dict(state))
        save_model(model, str(part), metadata={"format": "pt"})
        # safetensors makes files that only their owner can read: this one is as others
        part.chmod(mode)


# A folder


def _write_folder(view: View, path: Path) -> None:
    """Write the folder of the one model inside, by its own ``save_pretrained``."""
    root = root_of(view.model)
    inner: Any = submodule(view.model, root)
    if getattr(inner, "save_pretrained", None) is None:
        raise AdapterFileError(
            f"{view.title} has no save_pretrained, nor has one model inside it. Use a "
            "name that ends in .ckpt for a LightningModule, or in .safetensors."
        )
    _refuse_trained_outside(view, root)
    refuse_to_tie_again(view)
    state = checked_merged_state(view, {})
    with writing_folder(path) as part, answering(view.model, state):
        try:
            inner.save_pretrained(part)
        except ValueError as error:
            raise _refused_by(inner, error) from error


def _refuse_trained_outside(view: View, root: str) -> None:
    """Refuse a model of which something was trained that is not in the one model inside."""
    outside = names_without_prefix(trained_tensors(view), root)
    if outside:
        raise AdapterFileError(
            f"save_pretrained writes {root!r} of {view.title} alone, and "
            f"{listed(outside)} were trained outside of it. Use a name that ends in "
            ".ckpt or .safetensors."
        )


def _refused_by(model: nn.Module, error: ValueError) -> AdapterFileError:
    """What to do when a model's own ``save_pretrained`` refuses."""
    remedy = "Use a name that ends in .ckpt or .safetensors."
    quantization = getattr(model, "quantization_method", None)
    if quantization == "gguf":  # its weights are plain tensors now
        remedy = (
            "It was read from a GGUF file. To save it as a plain model, set "
            "model.hf_quantizer = None and del model.config.quantization_config first."
        )
    return AdapterFileError(
        f"save_pretrained of {type(model).__name__} refuses ({error}). Nothing was "
        f"written, and the model is as it was. {remedy}"
    )


@contextmanager
def answering(model: nn.Module, state: StateDict) -> Iterator[None]:
    """Let the ``state_dict`` methods of a model, and of the modules in it, answer with these values."""
    with ExitStack() as undo:
        for name, module in model.named_modules():
            set_own_attribute(
                module, "state_dict", partial(_part_of_state, state, name), undo
            )
        yield


def _part_of_state(state: StateDict, module: str, *_: Any, **__: Any) -> dict[str, Any]:
    """The values of a module, by the names in it."""
    start = f"{module}." if module else ""
    return beginning_with(start, state)
