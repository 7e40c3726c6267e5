"""Save and load adapters without a Trainer."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar

import fsspec
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, AdapterStateError, listed
from lightning_lora.model.inject import inject_adapters, remove_adapters
from lightning_lora.model.merge import merge, merge_adapters, unmerge
from lightning_lora.model.record import find_record
from lightning_lora.model.remember import keep_record, view_of
from lightning_lora.model.undo import undone_on_error
from lightning_lora.model.view import View
from lightning_lora.storage.build import build
from lightning_lora.storage.checkpoint import check_readable, drop_note
from lightning_lora.storage.description import (
    KEY,
    check_checksum,
    check_entries,
    check_fits,
    describe,
    stored_config,
)
from lightning_lora.storage.disk import (
    check_path,
    check_whole,
    is_archive,
    local_path,
    on_this_machine,
    reading,
    writing,
)
from lightning_lora.storage.fingerprint import forms_of_base
from lightning_lora.storage.renaming import renamed, renaming_for
from lightning_lora.storage.state import adapter_state_dict, write_state

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    Module = TypeVar("Module", bound=LightningModule)


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write everything that training changed into one ``.safetensors`` file.

    Args:
        model: A model with adapters: on its layers, or merged by ``merge_adapters`` or a finished fit.
        path: The file, with a name that ends in ``.safetensors``, or a URL that fsspec can write, such as
            ``"s3://..."``. A file on this machine is written under another name and then moved, so it is never
            incomplete.

    Raises:
        AdapterStateError: ``model`` has no adapters, or they are on the meta device, or hold NaN or infinite values.
        AdapterFileError: ``path`` has another ending, an entry of its state is not a tensor, or the file cannot be
            written (the disk is full, for example).
        FileNotFoundError: the folder does not exist.
    """
    check_place(path)
    state = adapter_state_dict(model)
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise AdapterFileError(
            f"{odd[:3]} are not tensors, which is all that safetensors holds. Save with the Trainer instead."
        )
    view = view_of(model)
    if broken := view.diverged():
        raise AdapterStateError(
            f"{listed(broken)} of {type(model).__name__} hold NaN or infinite values: the training has diverged, and "
            "no model would load the file. Train again with a lower learning rate, or use an earlier checkpoint."
        )
    if any(value.is_meta for value in state.values()):
        raise AdapterStateError("The adapters are on the meta device and have no values. Call model.to_empty first.")
    write_adapter_file(path, state, describe(view, state, forms_of_base(view)))


def write_adapter_file(path: str | Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write a state and its description as one ``.safetensors`` file.

    Raises:
        AdapterFileError: a tensor is of a kind that the format does not have, or the file cannot be written.
    """
    local = local_path(path)
    try:
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
        contents = save(tensors, metadata={"format": "pt", KEY: json.dumps(description)})
    except Exception as error:
        kinds = listed(f"{name} ({value.dtype}, {value.layout})" for name, value in state.items())
        raise AdapterFileError(
            f"safetensors cannot hold one of {kinds}: {type(error).__name__}: {error}. Save with the Trainer instead."
        ) from error
    with writing(path, beside=local is not None) as place:
        if local is not None:
            place.write_bytes(contents)
        else:
            with fsspec.open(place, "wb") as file:
                file.write(contents)


def check_place(path: str | Path) -> None:
    """Refuse a place where no adapter file can be written.

    Raises:
        AdapterFileError: the name has another ending.
        FileNotFoundError: the folder does not exist.
    """
    check_path(path)
    local = local_path(path)
    _check_name(path, local)
    if local is not None and not local.parent.is_dir():
        raise FileNotFoundError(f"The folder {local.parent} does not exist. Make it first.")


def _check_name(given: str | Path, local: Path | None) -> None:
    """Refuse a name that would hide the format from other programs."""
    if str(given).endswith(".safetensors"):
        return
    path = local or PurePosixPath(str(given).rpartition("/")[2])
    stem = path.stem if path.suffix in (".ckpt", ".pt", ".pth", ".bin") else path.name
    is_folder = local is not None and local.is_dir()
    name = path / "adapter.safetensors" if is_folder else path.with_name(f"{stem}.safetensors")
    raise AdapterFileError(
        f"save_adapter writes safetensors, and {str(given)!r} does not end in .safetensors. Use {str(name)!r}."
    )


def load_adapter(model: nn.Module, path: str | Path | IO[bytes]) -> None:
    """Load the adapters of a file into ``model``.

    After an error, the model is as it was before.

    Args:
        model: The base model that the adapters were trained on. If it has no adapters yet, it is adapted as the file
            says. A model that a finished fit has merged gets its base back first. It may also be the model inside the
            LightningModule that was saved, or a LightningModule around the model that was saved.
        path: A file that ``save_adapter`` or a Trainer with ``LoRACallback`` wrote: its path, a URL that fsspec
            can read, or the open file, in binary mode.

    Raises:
        FileNotFoundError: the file does not exist.
        AdapterFileError: the file is truncated, was changed, or is of another kind.
        TargetError: ``model`` does not have the layers that were adapted.
        BaseMismatchError: the adapters were trained on another base.
        AdapterMismatchError: ``model`` is already adapted in another way.

    Example:
        >>> import tempfile
        >>> from lightning_lora import LoRAConfig
        >>> base = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
        >>> trained = nn.Sequential(nn.Linear(4, 4))
        >>> _ = trained.load_state_dict(base.state_dict())
        >>> names = inject_adapters(trained, LoRAConfig(r=2))
        >>> _ = nn.init.ones_(trained[0].lora_B)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(trained, f"{folder}/adapter.safetensors")
        ...     load_adapter(base, f"{folder}/adapter.safetensors")
        >>> torch.equal(base(torch.ones(4)), trained(torch.ones(4)))
        True
    """
    state, description = read_adapter_file(path)
    _put(model, state, description)


def _put(model: nn.Module, state: dict[str, Any], description: dict[str, Any]) -> None:
    """Adapt ``model`` if needed, check everything, then write everything. Undo all of it after an error."""
    renaming = renaming_for(model, description)
    if renaming:
        state, description = renamed(model, renaming, state, description)
    config = stored_config(description)
    record, was_merged = find_record(model), False
    try:
        was_merged = unmerge(model)
        with undone_on_error(View(model)):
            if find_record(model) is None:  # no adapters, or only those of a submodule
                inject_adapters(model, config)
            check_fits(view_of(model), state, description, renaming=renaming)
            write_state(model, state)
    except BaseException:
        if was_merged:
            merge(model)
        elif record is not None and record.is_merged:  # its weights were replaced: it is as it was
            keep_record(model, record)
        raise


def read_adapter_file(path: str | Path | IO[bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state and the description in a file.

    No code in the file is run.

    Raises:
        FileNotFoundError: the file does not exist.
        AdapterFileError: the file is truncated, was changed, or is of another kind.
    """
    contents = _read(path, weights_only=True)
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), dict):
        raise AdapterFileError(f"{path} holds no adapters. Pass a file that save_adapter or a Trainer wrote.")
    return _adapters_in(contents["state_dict"], contents.get(KEY), path)


def _read(path: str | Path | IO[bytes], *, weights_only: bool) -> Any:
    """The contents of a ``.ckpt`` or ``.safetensors`` file, in the form of a checkpoint."""
    check_path(path, may_be_open=True)
    with reading(path), on_this_machine(path) as local:
        check_whole(local, path, may_be_old=True)
        with local.open("rb") as file:
            is_zip = is_archive(file)
        if is_zip:
            contents = torch.load(local, map_location="cpu", weights_only=weights_only)
            drop_note(contents)
            return contents
        with safe_open(local, "pt") as file:
            names, description = file.keys(), json.loads((file.metadata() or {}).get(KEY, "null"))
            if description is None:
                return {"state_dict": {}}
            stored_config(description)
            check_entries(names, description, path)
            return {"state_dict": {name: file.get_tensor(name) for name in names}, KEY: description}


def _adapters_in(state: dict[str, Any], description: Any, path: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state and its description, after a check that both are as they were written."""
    if description is None:
        raise AdapterFileError(
            f"{path} holds no adapters of this package. If it is a full checkpoint, it is a base: load it with "
            "Lightning's load_from_checkpoint, or give it to Trainer.fit(ckpt_path=...)."
        )
    stored_config(description)
    check_checksum(state, description, path)
    return state, description


def load_from_checkpoint(
    cls: "type[Module]",
    path: str | Path | IO[bytes],
    *,
    merge: bool = False,
    map_location: Any = None,
    weights_only: bool = True,
    **kwargs: Any,
) -> "Module":
    """Lightning's ``load_from_checkpoint``, for adapter-only checkpoints.

    A Trainer with ``LoRACallback`` writes such checkpoints.

    Args:
        cls: The LightningModule's class. It is built from the stored hyperparameters, so its own code must load the
            pretrained weights.
        path: The ``.ckpt`` file: its path, a URL that fsspec can read, or the open file, in binary mode.
        merge: Return a plain model with the updates merged, instead of an adapted model.
        map_location: The device of the model, as in Lightning's method.
        weights_only: Set this to False for a file that you trust, if its hyperparameters are not plain types.
        **kwargs: Hyperparameters to override, as in Lightning's method. Loading is always strict.

    Raises:
        AdapterFileError: the file is truncated, was changed, or is of another kind.
        BaseMismatchError: the model that ``cls`` builds is not the base that the adapters were trained on.
    """
    checkpoint = _read(path, weights_only=weights_only)
    if isinstance(checkpoint, dict) and checkpoint.keys() <= {"state_dict", KEY}:
        raise AdapterFileError(f"{path} is an adapter file. Build the model, then call load_adapter(model, path).")
    check_readable(checkpoint, path)
    state, description = _adapters_in(checkpoint["state_dict"], checkpoint.get(KEY), path)
    kwargs.pop("strict", None)
    options = kwargs if weights_only else {**kwargs, "weights_only": False}
    model, state = build(cls, {**checkpoint, "state_dict": state}, **options)
    _put(model, state, description)
    if merge:
        merge_adapters(model)
        remove_adapters(model)
    return model.to(map_location) if isinstance(map_location, str | torch.device) else model
