"""Read and write the adapter files of this package."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load as load_tensors
from torch import nn

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.storage import archives, disk
from lightning_lora.storage.formats.format import HEADER, Asked, Format
from lightning_lora.storage.formats.lightning import VERSION
from lightning_lora.storage.formats.registry import file_in, find_format, find_unread_tool
from lightning_lora.storage.state import is_note
from lightning_lora.storage.stored import KEY, StoredAdapters, check_checksum, dict_or_empty
from lightning_lora.tensors.named import only, without
from lightning_lora.tensors.plain_states import state_dict

ADAPTERS = "adapters"  # the item of this package's entry that holds what training changed, beside a merged model
_SHOWN = "shown"  # the item that names the base's tensors which only a module's hook sees


# Write


def write_adapter_file(path: str | Path, stored: StoredAdapters) -> None:
    """Write adapters as one ``.safetensors`` file."""
    with disk.writing(path) as place:
        description = json.dumps(stored.description())
        contents = disk.save(stored.state, {KEY: description})
        with disk.opened(place, "wb") as file:
            file.write(contents)


def check_place(path: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse an ending that hides the format, and a place where no file can be."""
    disk.check_output(path, inputs)
    if not str(path).endswith(".safetensors"):
        raise AdapterFileError(
            f"Adapters are written as safetensors, and {str(path)!r} does not end in .safetensors. Use a name such as "
            "'adapter.safetensors'."
        )


# Read


def read_adapter_file(path: str | Path | IO[bytes]) -> StoredAdapters:
    """Return the adapters in a file of this package. No code in the file is run."""
    local = disk.local_path(path)
    found = None if local is None else file_in(local)
    if found is not None:
        format, _ = found
        raise AdapterFileError(f"{path} holds {_needs_its_model(format)}")
    return adapters_in(read_contents(path), path)


def read_contents(path: str | Path | IO[bytes]) -> Any:
    """Return a file's contents: a checkpoint's, or another library's tensors by name; no objects of classes."""
    return _read_with(path, partial(_load_adapters, path))


def read_checkpoint(path: str | Path | IO[bytes], *, weights_only: bool) -> Any:
    """Return the contents of a checkpoint, hyperparameters and all."""
    remedy = (
        "If you trust it, pass weights_only=False to load_from_checkpoint. If not, build the model yourself, and call "
        "load_adapter(model, path): it reads only the adapters."
    )
    load = partial(torch.load, map_location="cpu", weights_only=weights_only)
    return _read_with(path, load, remedy=remedy)


def _read_with(path: str | Path | IO[bytes], load: Callable[[Any], Any], remedy: str = "") -> Any:
    """The contents of a file. An archive of torch is read by ``load``."""
    if not disk.is_open_file(path):
        disk.check_path(path)
    with disk.reading(path, remedy), disk.on_this_machine(path) as local:
        archives.check_is_file(local, path)
        with disk.opened(local) as file:  # once: another process may replace it at any time
            kind = archives.kind_of(file)
            if kind is archives.Kind.SAFETENSORS:
                return _read_tensors(file.read())
            archives.check_new_format(kind, path)
            if kind is archives.Kind.OTHER:
                found = archives.what_it_is(file)
                raise AdapterFileError(f"{path} is no archive of torch, and no file of safetensors: {found}")
            archives.check_archive(file, path)
            contents = load(file)
            leave_adapters(contents)
            return contents


def _load_adapters(path: object, file: Any) -> Any:
    """The contents of an archive, of which the adapters must be plain."""
    contents = disk.load_plain(file)
    if not isinstance(contents, dict):
        return contents
    of_adapters = only(contents, ("state_dict", KEY, "model"))
    unread = disk.unread_in(of_adapters)
    if unread:
        raise AdapterFileError(
            f"{path} holds {listed(unread)} among its adapters, which must be plain tensors. Pass a file that "
            "save_adapter or a Trainer with LoRACallback wrote."
        )
    return contents


def _read_tensors(contents: bytes) -> dict[str, Any]:
    """The tensors of a safetensors file, and what its header says."""
    tensors = dict(sorted(load_tensors(contents).items()))  # the library gives them in another order each time
    header = disk.header_in(contents).get(HEADER, {})
    description = json.loads(header.get(KEY, "null"))
    if description is None:
        return {**tensors, HEADER: header}
    return {"state_dict": tensors, KEY: description}


def adapters_in(contents: Any, path: object) -> StoredAdapters:
    """Return the adapters in the contents of a file. They must be as they were written."""
    contents = dict_or_empty(contents)
    state = contents.get("state_dict")
    description = contents.get(KEY)
    if not isinstance(state, dict) or description is None:
        raise AdapterFileError(f"{path} holds {_what_it_holds_instead(contents, path)}")
    check_checksum(state, description, path)
    return StoredAdapters.from_file(state, description, path)


# What a file holds that is none of this package


def _what_it_holds_instead(contents: dict[Any, Any], path: object) -> str:
    """What a file without adapters of this package holds, and what reads it."""
    found = find_format(contents, path, Asked())
    if found is not None:
        format, _ = found
        return _needs_its_model(format)
    names = list(map(str, without(_state_or_all(contents), [HEADER])))
    if not names:
        return "no adapters. Pass a file that save_adapter or a Trainer wrote."
    if any(name.endswith("lora_A") for name in names):
        return (
            "the state of an adapted model, and does not say how it was adapted. Adapt the model as for the training, "
            "then call load_adapter_state_dict(model, state), or model.load_state_dict if the state is whole."
        )
    unread = find_unread_tool(names)
    if unread is not None:
        return f"adapters of {unread.tool}. {unread.remedy}. Or train anew here."
    return (
        f"{len(names)} tensors ({listed(names, 2)}) and no adapters of this package. It looks like a whole model. Load "
        f"it with {_reader_of_whole_models(contents)}."
    )


def _state_or_all(contents: dict[Any, Any]) -> dict[Any, Any]:
    """The state that a file holds among other things, or all that it holds."""
    for key in ("state_dict", "model"):
        state = contents.get(key)
        if isinstance(state, dict):
            return state
    return contents


def _reader_of_whole_models(contents: dict[Any, Any]) -> str:
    """The call that loads a whole model from such a file."""
    if VERSION in contents:
        return "MyModule.load_from_checkpoint(path), or give it to a Trainer as ckpt_path"
    return "safetensors.torch.load_model(model, path), or model.load_state_dict of the state in torch.load(path)"


def _needs_its_model(format: Format) -> str:
    """What a file of another library holds, where there is no model."""
    return (
        f"adapters of {format.tool}, and only their model tells what their layers are. Load them onto it, and write a "
        "file of this package: load_adapter(model, path), then save_adapter(model, 'adapter.safetensors')."
    )


# What a checkpoint holds for others


def show_base(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Show the base's own tensors too, as a module's hook expects, until :func:`leave_adapters`."""
    adapters = checkpoint["state_dict"]
    state = {**state_dict(model), **adapters}
    checkpoint["state_dict"] = state
    checkpoint[KEY] = {**checkpoint[KEY], _SHOWN: state.keys() - adapters}


def leave_adapters(checkpoint: object) -> dict[str, Any]:
    """Leave only what training changed. Return what is written for readers without this package: the merged model."""
    if not isinstance(checkpoint, dict):
        return {}
    description = _dict_in(checkpoint, KEY)
    merged = _take_merged_model(checkpoint, description)
    _take_shown_base(checkpoint, description)
    state = _dict_in(checkpoint, "state_dict")
    for note in list(filter(is_note, state)):
        del state[note]
    return merged


def _dict_in(checkpoint: dict[str, Any], key: str) -> dict[str, Any]:
    """An entry of a checkpoint. Other files may have something else there, or nothing: that is as an empty one."""
    return dict_or_empty(checkpoint.get(key))


def _take_merged_model(checkpoint: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """Put the adapters in the place of the merged model, if a checkpoint holds both, and return that."""
    if ADAPTERS not in description:
        return {}
    merged = _dict_in(checkpoint, "state_dict")
    checkpoint["state_dict"] = description.pop(ADAPTERS)
    return merged


def _take_shown_base(checkpoint: dict[str, Any], description: dict[str, Any]) -> None:
    """Take out what :func:`show_base` has put in."""
    shown = description.pop(_SHOWN, None)
    if isinstance(shown, set):
        state = _dict_in(checkpoint, "state_dict")
        checkpoint["state_dict"] = without(state, shown)
