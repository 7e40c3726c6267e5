"""Read a file of kohya's: it is turned into what PEFT would have in a file of each member."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_lora.errors import AdapterFileError, AdapterMismatchError, listed
from lightning_lora.storage.formats.format import LoadArguments, tensors_in
from lightning_lora.storage.formats.peft.peft_config import config_of
from lightning_lora.storage.formats.pipelines.kohya_names import (
    MEMBERS,
    member_prefix,
    naming_forms,
)
from lightning_lora.storage.formats.pipelines.read_members import (
    PeftContents,
    PipelineFile,
    adapters_in_pipeline,
    fields_of_tensors,
)
from lightning_lora.storage.formats.unread import KOHYA_REMEDY
from lightning_lora.storage.stored import ReadFor
from lightning_lora.tensors.dicts import with_values, without
from lightning_lora.tensors.names import names_not_in

# the ends of names in a file, and PEFT's
_ENDS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
_ALPHA = "alpha"
_LAYER = re.compile(rf"({'|'.join(MEMBERS)})_\w+")


def recognise(
    contents: Mapping[str, Any], path: Any, _: LoadArguments
) -> ReadFor | None:
    """Return how to read these contents of a file, if it has the names of kohya's scripts."""
    if not any(map(_is_factor, map(str, contents))):
        return None
    tensors = tensors_in(contents, path)
    _check_names(tensors, path)
    return lambda view: adapters_in_pipeline(view, _KohyaFile(path, tensors))


def _is_factor(name: str) -> bool:
    """Whether a name is that of an A in this format."""
    layer, _, end = name.partition(".")
    return end == "lora_down.weight" and _LAYER.fullmatch(layer) is not None


def _check_names(names: Iterable[str], path: Any) -> None:
    """Refuse a file with another method than LoRA, or with LoRA of a member that is not known here."""
    of_other_methods = list[str]()
    of_other_members = dict[str, None]()  # a set in the order of the file
    for name in names:
        layer, _, end = name.partition(".")
        if end not in (_ALPHA, *_ENDS):
            of_other_methods.append(name)
        elif not _LAYER.fullmatch(layer):
            of_other_members[layer] = None
    if of_other_methods:
        raise AdapterFileError(
            f"{path} holds {listed(of_other_methods)}, of another method than LoRA "
            "(such as DoRA, LoHa, LoKr, or a core of a convolution). Use the merged "
            "model."
        )
    if of_other_members:
        raise AdapterFileError(
            f"{path} holds adapters of {listed(of_other_members)}, in no part of a "
            f"pipeline that is known: these begin with {listed(MEMBERS)}. "
            f"{KOHYA_REMEDY}."
        )


@dataclass(frozen=True)
class _KohyaFile(PipelineFile):
    """A file of kohya's."""

    def members(self) -> set[str]:
        """Return the members, by the prefixes of the names."""
        return {_member_of(name) for name in self.tensors}

    def contents_of(self, member: str, modules: Collection[str]) -> PeftContents:
        """Return what PEFT would have in a file of one member."""
        layers = _layers_by_name(member, modules)
        in_file = self._tensors_of(member)
        self._check_layers(in_file, layers)
        tensors = dict[str, Tensor]()  # by PEFT's names
        alphas = dict[str, float]()
        for name, value in in_file.items():
            layer_in_file, _, end = name.partition(".")
            layer = layers[layer_in_file]
            if end == _ALPHA:
                alphas[layer] = value.item()
            else:
                tensors[f"{layer}.{_ENDS[end]}"] = value
        fields = fields_of_tensors(tensors, alphas)
        return PeftContents(tensors, config_of(fields, self.path))

    def _check_layers(self, tensors: Iterable[str], layers: Collection[str]) -> None:
        """Refuse tensors of layers with other names than these."""
        names = dict.fromkeys(map(_layer_of, tensors))  # a set in the order of the file
        unknown = names_not_in(names, layers)
        if unknown:
            raise AdapterMismatchError(
                f"{self.path} holds adapters of {listed(unknown)}, and the model has "
                "no such layers of a UNet or a CLIP text encoder. Pass the model that "
                f"they were trained on. {KOHYA_REMEDY}."
            )

    def _tensors_of(self, member: str) -> dict[str, Tensor]:
        """The tensors of one member."""
        return {
            name: value
            for name, value in self.tensors.items()
            if _member_of(name) == member
        }


def _layer_of(name: str) -> str:
    """The layer of a tensor, by names in a file: ``lora_unet_conv_in`` for ``lora_unet_conv_in.alpha``."""
    return name.partition(".")[0]


def _member_of(name: str) -> str:
    """The member of a name in a file: ``unet`` for ``lora_unet_mid_block_...``."""
    return MEMBERS[member_prefix(name)]


def _layers_by_name(member: str, modules: Collection[str]) -> dict[str, str]:
    """The layers of a member, by all names that files have for them.

    ``{"lora_unet_input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in", ...}``.
    """
    layers = dict[str, str]()
    for prefix in with_values(MEMBERS, [member]):
        for name_of in naming_forms(prefix, modules):
            by_name = {name_of(layer): layer for layer in modules}
            # all that this format cannot hold has the empty name
            layers |= without(by_name, [""])
    return layers
