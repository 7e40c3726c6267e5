"""Write a folder that PEFT loads: its two files, and a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.errors import ExportError, listed
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.naming.when_loaded import loading_of
from lightning_lora.storage.formats.peft.peft_config import config_of
from lightning_lora.storage.formats.peft.readers.folder_readers import kinds_in
from lightning_lora.storage.formats.peft.readers.new_rows import warn_of_new_rows
from lightning_lora.storage.formats.peft.readers.reader_warnings import warn_of_readers
from lightning_lora.storage.formats.peft.writing.model_card import FOLDER, ModelCard
from lightning_lora.storage.formats.peft.writing.peft_form import in_peft_form
from lightning_lora.storage.formats.peft_names import (
    METADATA,
    NAMES_HERE,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PREFIX,
)
from lightning_lora.storage.formats.written_files import write_files
from lightning_lora.storage.on_disk.safetensors_bytes import save
from lightning_lora.tensors.dicts import prefixed, renamed
from lightning_lora.tensors.names import names_not_in


def write(export: Export, directory: Path, *, uniform: bool) -> None:
    """Write PEFT's two files, and a model card, after all of it has been computed and checked."""
    tensors, config = in_peft_form(export, uniform=uniform)
    names_in_file = _names_in_file(export, tensors)
    warn_of_readers(export, kinds_in(tensors, config_of(config, directory)))
    warn_of_new_rows(export)
    by_name_in_file = renamed(tensors, names_in_file.__getitem__)
    header = _header(config, names_in_file)
    card = ModelCard(export, "peft", _code_that_loads(export))
    files = {
        PEFT_CONFIG: json.dumps(config, indent=2).encode(),
        PEFT_WEIGHTS[0]: save(prefixed(PREFIX, by_name_in_file), header),
        **card.files(directory),
    }
    write_files(directory, files)


def _header(
    config: Mapping[str, Any], names_in_file: Mapping[str, str]
) -> dict[str, str]:
    """The header of the file of tensors, which repeats the configuration.

    If tensors have other names in the file than in the model, the header has their
    names in the model too, by those in the file. Only this package reads them.
    """
    header = {METADATA: json.dumps(prefixed(PREFIX, config))}
    if any(name != in_file for name, in_file in names_in_file.items()):
        names_in_model = {in_file: name for name, in_file in names_in_file.items()}
        header[NAMES_HERE] = json.dumps(names_in_model, sort_keys=True)
    return header


def _names_in_file(export: Export, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor, the name in the file under which PEFT loads it onto the reader's model."""
    loading = loading_of(export)
    loading.warn_if_unsure()
    names = loading.names_in_file(tensors)
    lost = names_not_in(tensors, names)
    if lost:
        raise ExportError(
            f"PEFT gives {listed(lost)} other names when it loads a model of type "
            f"{loading.model_type!r}: they would not arrive. Call merge_adapters and "
            "save the whole model."
        )
    return names


def _code_that_loads(export: Export) -> str:
    """The lines of Python that load the folder.

    1. PEFT itself builds a model of transformers whose name and class are known.
    2. If a head or an embedding trained, it may have another size than the stored
       base's, so the user builds the model, as for the training.
    3. Other models, only the user can build.
    """
    model = export.stored_inner
    is_from_transformers = model.pretrained and model.library.startswith(
        "transformers."
    )
    if not is_from_transformers:
        name = model.class_name or "the model"
        return f"""from peft import PeftModel

base = ...    # {name}, with the weights from before the training
model = PeftModel.from_pretrained(base, "{FOLDER}")"""
    if export.stored.saved or export.layers_with_rows:
        return f"""from peft import PeftModel
from {model.library} import {model.class_name}

base = {model.class_name}.from_pretrained({model.pretrained!r})    # as for the training: with the same num_labels, ...
model = PeftModel.from_pretrained(base, "{FOLDER}")"""
    return f"""from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("{FOLDER}")"""
