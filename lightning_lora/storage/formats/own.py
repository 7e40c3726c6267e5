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
from lightning_lora.storage.formats.lightning import VERSION
from lightning_lora.storage.formats.peft_config import HEADER
from lightning_lora.storage.formats.reading import Asked
from lightning_lora.storage.formats.registry import Format, file_in, find_format, tool_of
from lightning_lora.storage.state import is_note
from lightning_lora.storage.stored import KEY, StoredAdapters, check_checksum
from lightning_lora.tensors.names import state_dict

ADAPTERS = "adapters"  # the item of this package's entry that holds what training changed, beside a merged model


def write_adapter_file(path: str | Path, stored: StoredAdapters) -> None:
    """Write adapters as one ``.safetensors`` file."""
    with disk.writing(path) as place:
        contents = disk.save(stored.state, {KEY: json.dumps(stored.description())})
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


def read_adapter_file(path: str | Path | IO[bytes]) -> StoredAdapters:
    """Return the adapters in a file of this package. No code in the file is run."""
    local = disk.local_path(path)
    if local is not None and (found := file_in(local)):
        raise AdapterFileError(f"{path} holds {_only_their_model(found[0])}")
    return adapters_in(read_contents(path), path)


def read_contents(path: str | Path | IO[bytes]) -> Any:
    """Return a file's contents: a checkpoint's, or another library's tensors by name; no objects of classes."""
    return _read(path, partial(_load_adapters, path))


def read_checkpoint(path: str | Path | IO[bytes], *, weights_only: bool) -> Any:
    """Return the contents of a checkpoint, hyperparameters and all."""
    remedy = (
        "If you trust it, pass weights_only=False to load_from_checkpoint. If not, build the model yourself, and call "
        "load_adapter(model, path): it reads only the adapters."
    )
    return _read(path, partial(torch.load, map_location="cpu", weights_only=weights_only), remedy=remedy)


def _read(path: str | Path | IO[bytes], load: Callable[[Any], Any], remedy: str = "") -> Any:
    """The contents of a file. An archive of torch is read by ``load``."""
    disk.check_path(path, may_be_open=True)
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
    if isinstance(contents, dict) and (unread := disk.unread_in(list(map(contents.get, ("state_dict", KEY, "model"))))):
        raise AdapterFileError(
            f"{path} holds {listed(unread)} among its adapters, which must be plain tensors. Pass a file that "
            "save_adapter or a Trainer with LoRACallback wrote."
        )
    return contents


def _read_tensors(contents: bytes) -> dict[str, Any]:
    """The tensors of a safetensors file, and what its header says."""
    tensors = dict(sorted(load_tensors(contents).items()))  # the library gives them in another order each time
    about = disk.header_in(contents).get(HEADER, {})
    description = json.loads(about.get(KEY, "null"))
    if description is None:
        return {**tensors, HEADER: about}
    return {"state_dict": tensors, KEY: description}


def adapters_in(contents: Any, path: object) -> StoredAdapters:
    """Return the adapters in the contents of a file. They must be as they were written."""
    held = contents if isinstance(contents, dict) else {}
    state, description = held.get("state_dict"), held.get(KEY)
    if not isinstance(state, dict) or description is None:
        raise AdapterFileError(f"{path} holds {_instead(held, path)}")
    check_checksum(state, description, path)
    return StoredAdapters.from_file(state, description, path)


def _instead(contents: dict[Any, Any], path: object) -> str:
    """What a file without adapters of this package holds, and what reads it."""
    if found := find_format(contents, path, Asked()):
        return _only_their_model(found[0])
    held = (contents[key] for key in ("state_dict", "model") if isinstance(contents.get(key), dict))
    names = [str(name) for name in next(held, contents) if name != HEADER]
    if not names:
        return "no adapters. Pass a file that save_adapter or a Trainer wrote."
    if any(name.endswith("lora_A") for name in names):
        return (
            "the state of an adapted model, and does not say how it was adapted. Adapt the model as for the training, "
            "then call load_adapter_state_dict(model, state), or model.load_state_dict if the state is whole."
        )
    if tool := tool_of(names):
        return f"adapters of {tool}. Or train anew here."
    reader = "safetensors.torch.load_model(model, path), or model.load_state_dict of the state in torch.load(path)"
    if VERSION in contents:
        reader = "MyModule.load_from_checkpoint(path), or give it to a Trainer as ckpt_path"
    return (
        f"{len(names)} tensors ({listed(names, 2)}) and no adapters of this package. It looks like a whole model. Load "
        f"it with {reader}."
    )


def _only_their_model(format: Format) -> str:
    return (
        f"adapters of {format.tool}, and only their model tells what their layers are. Load them onto it, and write a "
        "file of this package: load_adapter(model, path), then save_adapter(model, 'adapter.safetensors')."
    )


def show_base(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Show the base's own tensors too, as a module's hook expects, until :func:`leave_adapters`."""
    held = checkpoint["state_dict"]
    checkpoint["state_dict"] = shown = {**state_dict(model), **held}
    checkpoint[KEY] = {**checkpoint[KEY], "shown": shown.keys() - held}


def leave_adapters(checkpoint: object) -> dict[str, Any]:
    """Leave only what training changed. Return what is written for readers without this package: the merged model."""
    if not isinstance(checkpoint, dict):
        return {}
    about, merged = checkpoint.get(KEY), None
    if isinstance(about, dict) and ADAPTERS in about:
        merged, checkpoint["state_dict"] = checkpoint.get("state_dict"), about.pop(ADAPTERS)
    state = checkpoint.get("state_dict")
    if isinstance(state, dict) and isinstance(about, dict) and isinstance(shown := about.pop("shown", None), set):
        state = checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in shown}
    if isinstance(state, dict):
        for name in list(filter(is_note, state)):
            del state[name]
    return merged if isinstance(merged, dict) else {}
