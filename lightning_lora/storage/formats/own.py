"""Read and write the adapter files of this package."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.storage.checksum import check_as_written
from lightning_lora.storage.formats.contents import read_contents
from lightning_lora.storage.formats.format import HEADER, Format, LoadArguments
from lightning_lora.storage.formats.lightning import (
    HOLDS_WHOLE_ADAPTED_MODEL,
    VERSION_KEY,
    has_adapters,
)
from lightning_lora.storage.formats.registry import (
    file_in,
    find_format,
    find_unread_tool,
)
from lightning_lora.storage.on_disk.places import check_output, local_path, opened
from lightning_lora.storage.on_disk.safetensors_bytes import save
from lightning_lora.storage.on_disk.whole_files import writing
from lightning_lora.storage.stored import KEY, StoredAdapters
from lightning_lora.tensors.dicts import dict_or_empty, without

# Write


def write_adapter_file(path: str | Path, stored: StoredAdapters) -> None:
    """Write adapters as one ``.safetensors`` file."""
    with writing(path) as place:
        description = json.dumps(stored.description())
        contents = save(stored.state, {KEY: description})
        with opened(place, "wb") as file:
            file.write(contents)


def check_place(path: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse a name without the ending of safetensors, and a place where no file can be written."""
    check_output(path, inputs)
    if not str(path).endswith(".safetensors"):
        raise AdapterFileError(
            f"Adapters are written as safetensors, and {str(path)!r} does not end in "
            ".safetensors. Use a name such as 'adapter.safetensors'."
        )


# Read


def read_adapter_file(path: str | Path | IO[bytes]) -> StoredAdapters:
    """Return the adapters in a file of this package. No code in the file is run."""
    local = local_path(path)
    found = None if local is None else file_in(local)
    if found is not None:
        format, _ = found
        raise AdapterFileError(f"{path} holds {_needs_its_model(format)}")
    return stored_adapters(read_contents(path), path)


def stored_adapters(contents: Any, path: object) -> StoredAdapters:
    """Return the adapters in the contents of a file, which must be as they were written."""
    contents = dict_or_empty(contents)
    state = contents.get("state_dict")
    description = contents.get(KEY)
    if not isinstance(state, dict) or description is None:
        raise AdapterFileError(f"{path} holds {_what_it_holds_instead(contents, path)}")
    check_as_written(state, description, path)
    return StoredAdapters.from_description(state, description, path)


# What a file holds that is none of this package


def _what_it_holds_instead(contents: dict[Any, Any], path: object) -> str:
    """What a file without adapters of this package holds, and what reads it."""
    found = find_format(contents, path, LoadArguments())
    if found is not None:
        format, _ = found
        return _needs_its_model(format)
    names = list(map(str, without(_state_or_all(contents), [HEADER])))
    if not names:
        return "no adapters. Pass a file that save_adapter or a Trainer wrote."
    if has_adapters(names):
        if VERSION_KEY in contents:
            return HOLDS_WHOLE_ADAPTED_MODEL
        return (
            "the state of an adapted model, and does not say how it was adapted. Adapt "
            "the model as for the training, then call load_adapter_state_dict(model, "
            "state), or model.load_state_dict if the state is whole."
        )
    unread = find_unread_tool(names)
    if unread is not None:
        return f"adapters of {unread.tool}. {unread.remedy}. Or train anew here."
    return (
        f"{len(names)} tensors ({listed(names, 2)}) and no adapters of this package. "
        "It looks like a whole model. Load it with "
        f"{_reader_of_whole_models(contents)}."
    )


def _state_or_all(contents: dict[Any, Any]) -> dict[Any, Any]:
    """The state that a file holds among other things, as training loops save it, or all that it holds."""
    for key in ("state_dict", "model"):
        state = contents.get(key)
        if isinstance(state, dict):
            return state
    return contents


def _reader_of_whole_models(contents: dict[Any, Any]) -> str:
    """The call that loads a whole model from such a file."""
    if VERSION_KEY in contents:
        return (
            "MyModule.load_from_checkpoint(path), or give it to a Trainer as ckpt_path"
        )
    return (
        "safetensors.torch.load_model(model, path), or model.load_state_dict of the "
        "state in torch.load(path)"
    )


def _needs_its_model(format: Format) -> str:
    """What a file of another library holds, in a message where there is no model."""
    return (
        f"adapters of {format.tool}, and only their model tells what their layers are. "
        "Load them onto it, and write a file of this package: load_adapter(model, "
        "path), then save_adapter(model, 'adapter.safetensors')."
    )
