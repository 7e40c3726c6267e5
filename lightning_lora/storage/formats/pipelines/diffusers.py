"""The files of diffusers: PEFT's tensors and its configuration, which is in the header of the file.

All names in both begin with the name of a member of the pipeline, such as ``unet``.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.errors import warn
from lightning_lora.model.view import View
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.format import (
    HEADER,
    LoadArguments,
    WrittenFormat,
    tensors_in,
)
from lightning_lora.storage.formats.peft.peft_config import PeftConfig, config_of
from lightning_lora.storage.formats.peft.writing.model_card import (
    FOLDER,
    ModelCard,
    repository_of,
)
from lightning_lora.storage.formats.peft.writing.peft_form import in_peft_form
from lightning_lora.storage.formats.peft_names import METADATA, PREFIX
from lightning_lora.storage.formats.peft_or_diffusers import MEMBER_NAME, is_diffusers
from lightning_lora.storage.formats.pipelines.exported_members import (
    checked_member,
    exports_of_members,
    warn_of_replaced,
)
from lightning_lora.storage.formats.pipelines.read_members import (
    PeftContents,
    PipelineFile,
    adapters_in_pipeline,
    fields_of_tensors,
)
from lightning_lora.storage.formats.written_files import write_files
from lightning_lora.storage.on_disk.read_errors import json_object
from lightning_lora.storage.on_disk.safetensors_bytes import save
from lightning_lora.storage.renaming import by_names_inside
from lightning_lora.storage.stored import ReadFor, StoredAdapters
from lightning_lora.storage.stored_modules import StoredModule
from lightning_lora.tensors.dicts import prefixed
from lightning_lora.tensors.names import owner_of

# the names of its files in a folder, the newer one first
_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")

# Write


def write(export: Export, directory: Path, *, uniform: bool) -> None:
    """Write what a pipeline reads: all its adapted members in one file."""
    tensors = dict[str, Tensor]()
    header = dict[str, Any]()
    for member_export in exports_of_members(export, DIFFUSERS.name):
        # diffusers before 0.34, and others that read its files, scale all updates by 1
        member_tensors, config = in_peft_form(
            member_export, uniform=uniform, scaling=1.0
        )
        name = checked_member(member_export, member_tensors, DIFFUSERS.name)
        tensors |= prefixed(name, member_tensors)
        header |= prefixed(name, config)
    file = _FILES[0]
    warn_of_replaced(directory / file, tensors, _member_of)
    card = ModelCard(export, "diffusers", _code_that_loads(export.stored_inner))
    contents = {
        file: save(tensors, {METADATA: json.dumps(header)}),
        **card.files(directory),
    }
    write_files(directory, contents)


def _code_that_loads(model: StoredModule) -> str:
    """The lines of Python that load the folder."""
    pipeline = repository_of(model) or "the pipeline of the training"
    return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{pipeline}")
pipeline.load_lora_weights("{FOLDER}")"""


def _member_of(name: str) -> str:
    """The member of a name in a file: ``unet`` for ``unet.conv_in.lora_A.weight``."""
    return name.partition(".")[0]


# Read


def recognise(
    contents: Mapping[str, Any], path: Any, _: LoadArguments
) -> ReadFor | None:
    """Return how to read these contents of a file, if diffusers wrote it, or PEFT with the same header."""
    if not is_diffusers(contents, path):
        return None
    text = contents.get(HEADER, {}).get(METADATA, "{}")
    tensors = tensors_in(contents, path)

    def read_for_model(view: View) -> StoredAdapters:
        header = json_object(text, f"{METADATA!r} of {path}")
        return adapters_in_pipeline(view, _DiffusersFile(path, tensors, header))

    return read_for_model


@dataclass(frozen=True)
class _DiffusersFile(PipelineFile):
    """A file of diffusers."""

    # the fields of all configurations, such as "unet.r"; older files have none
    header: Mapping[str, Any]

    def members(self) -> set[str]:
        """Return the members, by how names begin.

        A file of one model alone has one member, with an empty name or with PEFT's
        prefix as its name.

        header           names of tensors  members
        ---------------  ----------------  ------------------------------
        none             of a pipeline     those of the tensors
        none             of one model      the one with an empty name
        of one model     any               that of the header
        of a pipeline    any               those of the header and of the
                                           tensors
        """
        of_tensors = set(map(_member_of, self.tensors))
        if not self.header:
            is_pipeline = any(map(MEMBER_NAME.fullmatch, of_tensors))
            # the names of one model alone begin with those of its own modules
            return of_tensors if is_pipeline else {""}
        of_header = set(map(owner_of, self.header))
        is_one_model = not of_header.isdisjoint(("", PREFIX))
        # the header of a pipeline may lack some of its members
        return of_header if is_one_model else of_header | of_tensors

    def contents_of(self, member: str, modules: Collection[str]) -> PeftContents:
        """Return the tensors and the configuration of one member."""
        tensors = by_names_inside(member, self.tensors)
        return PeftContents(tensors, self._config_of(member, tensors))

    def _config_of(self, member: str, tensors: Mapping[str, Tensor]) -> PeftConfig:
        """The configuration of one member.

        If the header has none, it follows from the tensors.
        """
        fields = by_names_inside(member, self.header)
        if not fields:
            fields = fields_of_tensors(tensors, alphas={})
            warn(
                f"{self.path} does not say with which lora_alpha it was trained. As in "
                "diffusers, it is taken to be the rank. If it was another, save the "
                "file again with save_lora_weights(..., "
                "unet_lora_adapter_metadata=...)."
            )
        return config_of({"peft_type": "LORA", **fields}, self.path)


DIFFUSERS = WrittenFormat(
    name="diffusers",
    tool="diffusers",
    recognise=recognise,
    write=write,
    files=_FILES,
    expected_files=_FILES[0],
)
