"""Write a folder that PEFT loads: its two files, and a model card."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_lora.errors import ExportError, listed
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.naming.when_loaded import loading_of
from lightning_lora.storage.formats.peft.peft_config import config_of
from lightning_lora.storage.formats.peft.readers.folder_readers import contents_of
from lightning_lora.storage.formats.peft.readers.new_rows import warn_of_new_rows
from lightning_lora.storage.formats.peft.readers.reader_warnings import (
    warn_of_layers,
    warn_of_left_out,
    warn_of_whole_modules,
)
from lightning_lora.storage.formats.peft.writing.exported import exported
from lightning_lora.storage.formats.peft.writing.model_card import FOLDER, ModelCard
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
    """Write PEFT's two files, and a model card.

    The header of the tensors repeats the configuration. If PEFT renames tensors while
    it loads them, the header also has their names in the model, which a reader of this
    package takes.
    """
    tensors, config = exported(export, uniform=uniform)
    names = _names_in_file(export, tensors)
    warn_of_whole_modules(export)
    warn_of_left_out(export, contents_of(tensors, config_of(config, directory)))
    warn_of_layers(export)
    warn_of_new_rows(export)
    header = {METADATA: json.dumps(prefixed(PREFIX, config))}
    by_name_in_file = renamed(tensors, names.__getitem__)
    is_any_renamed = any(name != in_file for name, in_file in names.items())
    if is_any_renamed:
        header[NAMES_HERE] = json.dumps(
            {in_file: name for name, in_file in names.items()}, sort_keys=True
        )
    card = ModelCard(export, "peft", _code_that_loads(export))
    contents = {
        PEFT_CONFIG: json.dumps(config, indent=2).encode(),
        PEFT_WEIGHTS[0]: save(prefixed(PREFIX, by_name_in_file), header),
        **card.files(directory),
    }
    write_files(directory, contents)


def _names_in_file(export: Export, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names in the file of all tensors, with which PEFT loads them onto the reader's model."""
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
    """The lines of Python that load the folder: PEFT builds a model of transformers whose name and class are there.

    It builds it with the arguments of the stored base. A head or an embedding that
    trained may have another size.
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
