"""Save the whole merged model.

Code that does not know adapters can read it.
"""

import inspect
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.model.merged import warn_of_merge
from lightning_lora.model.view import View, root_of, view_of
from lightning_lora.storage.disk import check_path, writing
from lightning_lora.storage.merged_state import check_finite, merged_state, untied
from lightning_lora.tensors.names import plain_module, submodule


def save_merged(model: nn.Module, path: str | Path) -> None:
    """Write the whole model with merged weights.

    The file has nothing of this package: whoever reads it does not need it. ``model`` does not change: its adapters
    stay on their layers, or merged, as they are. The weights are those of ``merge_adapters``. Only the merged weights
    are held in memory a second time.

    Args:
        model: A model with adapters: on its layers, or merged by ``merge_adapters`` or a finished fit.
        path: The name says what is written. ``.ckpt``: a Lightning checkpoint for ``MyModule.load_from_checkpoint``,
            with the hyperparameters. ``.safetensors``: all tensors, for ``safetensors.torch.load_model``. A name
            without ending: a new folder, by the ``save_pretrained`` of the model or of the one model inside, for
            ``from_pretrained``. All are written under another name and then moved, so they are never incomplete.

    Raises:
        AdapterStateError: ``model`` has no adapters, or they are disabled or hold NaN or infinite values, or its
            weights are quantised, have no values, or cannot hold the sum.
        AdapterFileError: ``model`` cannot be written in this form, or the file cannot be written.
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
    check_path(path)
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent} does not exist. Make it first.")
    write = {".ckpt": _write_checkpoint, ".safetensors": _write_safetensors}.get(path.suffix)
    if write is None and path.suffix[1:].isalpha():
        raise AdapterFileError(
            f"{path} has an unknown ending. Use .ckpt for a Lightning checkpoint, .safetensors for all tensors, or a "
            "name without ending for a folder by save_pretrained."
        )
    (write or _write_folder)(view_of(model), path)


def _merged(view: View) -> dict[str, Any]:
    state, lost = merged_state(view)
    check_finite(view, state)
    warn_of_merge(view.model, lost, untied(view))
    return state


# A file


def _write_checkpoint(view: View, path: Path) -> None:
    model: Any = plain_module(view.model)
    package = next((b.__module__.partition(".")[0] for b in type(model).__mro__ if b.__name__ == "LightningModule"), "")
    if not package:
        raise AdapterFileError(
            f"{type(model).__name__} is not a LightningModule, so there is no checkpoint of it. Use a name that ends "
            "in .safetensors, or, if it has save_pretrained, one without ending."
        )
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": sys.modules[package].__version__,
        "state_dict": _merged(view),
        **_hyperparameters(model),
    }
    model.on_save_checkpoint(checkpoint)
    with writing(path) as beside:
        torch.save(checkpoint, beside)


def _hyperparameters(model: Any) -> dict[str, Any]:
    """The entries of a checkpoint from which Lightning builds the module."""
    if not model.hparams:
        return {}
    is_plain = isinstance(model.hparams, dict)  # otherwise omegaconf's
    entries = {model.CHECKPOINT_HYPER_PARAMS_KEY: dict(model.hparams) if is_plain else model.hparams}
    if not is_plain:
        entries[model.CHECKPOINT_HYPER_PARAMS_TYPE] = type(model.hparams)
    if hasattr(model, "_hparams_name"):
        entries[model.CHECKPOINT_HYPER_PARAMS_NAME] = model._hparams_name
    return entries


class _Held(nn.Module):
    """A module with a given state dict, for functions that take a module."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.held = state

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return dict(self.held)


def _write_safetensors(view: View, path: Path) -> None:
    state = _merged(view)
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise AdapterFileError(
            f"{listed(odd)} are not tensors, which is all that safetensors holds. Use a name that ends in .ckpt, or "
            "one without ending."
        )
    with writing(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode
        save_model(_Held(state), str(beside), metadata={"format": "pt"})
        beside.chmod(mode)  # as any file: safetensors lets nobody else read its own


# A folder


def _write_folder(view: View, path: Path) -> None:
    root = root_of(view.model)
    inner, title = submodule(view.model, root), type(view.model).__name__
    save = getattr(inner, "save_pretrained", None)
    if save is None:
        raise AdapterFileError(
            f"{title} has no save_pretrained, nor has one model inside it. Use a name that ends in .ckpt for a "
            "LightningModule, or in .safetensors."
        )
    prefix = f"{root}." if root else ""
    if outside := [name for name in (*view.adapters, *view.trained) if not name.startswith(prefix)]:
        raise AdapterFileError(
            f"save_pretrained writes {root!r} of {title} alone, and {listed(outside)} were trained outside of it. Use "
            "a name that ends in .ckpt or .safetensors."
        )
    own_weights = untied(view)
    if own_weights and getattr(getattr(inner, "config", None), "tie_word_embeddings", False):
        raise AdapterFileError(
            f"The weight of {listed(own_weights)} in {title} is tied to another layer's and has an update of its own, "
            "and from_pretrained would tie it again. Set config.tie_word_embeddings = False on the model before saving."
        )
    state = {name.removeprefix(prefix): value for name, value in _merged(view).items() if name.startswith(prefix)}
    with _writing_folder(path) as beside:
        if "state_dict" in inspect.signature(save).parameters:
            save(beside, state_dict=state)
        else:  # it asks the model
            vars(inner)["state_dict"] = lambda *_, **__: dict(state)
            try:
                save(beside)
            finally:
                del vars(inner)["state_dict"]


@contextmanager
def _writing_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder, then move it to its place, which must be free."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise AdapterFileError(f"{path} already exists and is not an empty folder. Choose another name.")
    beside = path.with_name(f".{path.name[:64]}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        raise AdapterFileError(
            f"{path} could not be written ({type(error).__name__}: {error}). The model is as it was. Free space on the "
            "disk, or choose a folder that can be written, and save again."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
