"""Write an adapter file from a PEFT file."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from lightning_lora.errors import AdapterFileError
from lightning_lora.model.remember import view_of
from lightning_lora.model.view import View
from lightning_lora.storage.description import KEY, describe, saved_entries, sealed, stored_config
from lightning_lora.storage.disk import reading
from lightning_lora.storage.files import load_adapter
from lightning_lora.storage.fingerprint import base_tensors, forms_of_base
from lightning_lora.storage.foreign.peft.export import ORIGIN
from lightning_lora.storage.foreign.peft.keys import sorted_by_layer
from lightning_lora.storage.foreign.peft.numbers import read_numbers
from lightning_lora.storage.foreign.peft.reading import weights_of
from lightning_lora.storage.layout import OF_A_FILE
from lightning_lora.storage.libraries import PEFT_CONFIG, is_peft
from lightning_lora.storage.offline.stand_in import stand_in
from lightning_lora.storage.offline.tensor_files import TensorFiles
from lightning_lora.storage.own_files import check_place, read_contents, write_adapter_file
from lightning_lora.storage.renaming import Renaming
from lightning_lora.storage.same_base import check_base
from lightning_lora.storage.state import adapter_state_dict


class Imported(NamedTuple):
    """What was imported.

    Args:
        layers: The names of the adapted layers.
        beside: The names of the other tensors: modules trained in full, and biases.
        base: The number of tensors of the base that are compared when the file is loaded.
    """

    layers: list[str]
    beside: list[str]
    base: int


def import_peft(source: Path, out: Path, base: Path) -> Imported:
    """Write an adapter file from a PEFT file.

    Loaded onto the model, it gives what PEFT's own files give there.

    Args:
        source: The folder that PEFT wrote, or the file with the tensors in it.
        out: The new file. Its name ends in ``.safetensors``.
        base: The base that the adapters were trained on: a ``.safetensors`` file, a folder with such files, or a
            checkpoint. The new file holds its digests, so that another base is refused when it is loaded.

    Raises:
        FileNotFoundError: a file does not exist.
        AdapterFileError: a file cannot be read or written, or the PEFT file holds what cannot be told from files.
        AdapterMismatchError: the PEFT file does not fit the base.
        BaseMismatchError: the PEFT file says that it was trained on another base.

    Warns:
        LoRAWarning: it is not clear which alpha a layer was trained with.
    """
    check_place(out)
    file = weights_of(source)
    contents, config = read_contents(file), file.parent / PEFT_CONFIG
    tensors = contents if isinstance(contents, dict) else {}
    if KEY in tensors:
        raise AdapterFileError(f"{file} is a file of this package already. It can be used as it is.")
    numbers = read_numbers(config) if is_peft(tensors) or config.is_file() else None
    if numbers is None or not is_peft(tensors):
        raise AdapterFileError(f"{file} holds no adapters of PEFT. Pass the folder that save_pretrained wrote.")
    model = stand_in(TensorFiles(base), sorted_by_layer(tensors, file), numbers)
    load_adapter(model, file)
    view = view_of(model)
    _check_origin(view, file)
    state = adapter_state_dict(model)
    for names in saved_entries(view).values():  # of these, the file holds all, as PEFT's does
        state |= {name: view.buffers[name] for name in names if name not in state}
    description = _description(view, state)
    write_adapter_file(out, state, description)
    layers = [layer["name"] for layer in description["layers"]]
    beside = [name for name in state if name not in view.adapters]
    return Imported(layers, beside, len(description["base"][0]["digests"]))


def _description(view: View, state: dict[str, Tensor]) -> dict[str, Any]:
    """Describe the adapters. Of the model, only a file of its base was seen."""
    about = describe(view, state, forms_of_base(view))
    names = "|".join(re.escape(layer["name"]) for layer in about["layers"])  # the model may have more layers
    about["config"] = replace(view.config, target_modules=names).to_dict()
    about["base"] = [{**form, "layout": OF_A_FILE} for form in about["base"]]
    return sealed(state, about)


def _check_origin(view: View, file: Path) -> None:
    """Compare the base with that of the training, if export_peft has written the file."""
    if file.suffix != ".safetensors":
        return
    with reading(file), safe_open(file, "pt") as opened:
        origin = json.loads((opened.metadata() or {}).get(ORIGIN, "null"))
        if origin is None:
            return
        stored_config(origin)
    renaming = Renaming(origin.get("root", ""), "")
    names = [renaming.name_there(name) for name in base_tensors(view)]
    forms = [{**form, "layout": OF_A_FILE} for form in origin["base"]]
    known = [form for form in forms if any(form.get("rounded", {}).get(name) for name in names)]  # not quantised
    if known:
        check_base(view, known, {}, renaming=renaming)
