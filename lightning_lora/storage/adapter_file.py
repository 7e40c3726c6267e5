"""Read the files that ``save_adapter`` and a Trainer wrote."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lightning_lora.errors import AdapterFileError
from lightning_lora.storage.description import KEY, check_checksum, check_entries, stored_config
from lightning_lora.storage.disk import reading


def read_adapter_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state and the description in a file.

    No code in the file is run.

    Raises:
        FileNotFoundError: the file does not exist.
        AdapterFileError: the file is truncated, was changed, or is of another kind.
    """
    contents = read_file(path, weights_only=True)
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), dict):
        raise AdapterFileError(f"{path} holds no adapters. Pass a file that save_adapter or a Trainer wrote.")
    return adapters_in(contents["state_dict"], contents.get(KEY), path)


def read_file(path: str | Path, *, weights_only: bool) -> Any:
    """Return the contents of a file, as a checkpoint.

    The file is a ``.ckpt`` or a ``.safetensors``.
    """
    with reading(path, trusted=not weights_only):
        path = Path(path).expanduser()
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        if is_zip:
            return torch.load(path, map_location="cpu", weights_only=weights_only)
        with safe_open(path, "pt") as file:
            names, description = file.keys(), json.loads((file.metadata() or {}).get(KEY, "null"))
            if description is None:
                return {"state_dict": {}}
            stored_config(description)
            check_entries(names, description, path)
            return {"state_dict": {name: file.get_tensor(name) for name in names}, KEY: description}


def adapters_in(state: dict[str, Any], description: Any, path: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state and its description, after a check.

    Both must be as they were written.

    Raises:
        AdapterFileError: there are no adapters, or they were changed.
    """
    if description is None:
        raise AdapterFileError(
            f"{path} holds no adapters of this package. If it is a full checkpoint, it is a base: load it with "
            "Lightning's load_from_checkpoint, or give it to Trainer.fit(ckpt_path=...)."
        )
    stored_config(description)
    check_checksum(state, description, path)
    return state, description
