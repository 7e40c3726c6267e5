"""What kohya's sd-scripts, ComfyUI and A1111 call the layers of a pipeline's members.

A name begins with a prefix for the member, and has underscores for points:
``lora_te1_text_model_encoder_layers_0_mlp_fc1``. In SDXL, a layer of the UNet has its
name in the original model, before diffusers. Only layers that ComfyUI, A1111 and
diffusers all know have a name.
"""

import re
from collections.abc import Callable, Collection
from functools import partial

MEMBERS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",  # the same, if there is a second one, as in SDXL
    "lora_te2": "text_encoder_2",
}
"""The prefixes of names in a file, and the members of a pipeline that they mean."""

NameOf = Callable[[str], str]
"""A function from a layer's name in a member to its name in a file. Empty: it has none there."""


def member_prefix(name: str) -> str:
    """Return the prefix of a name in a file: ``lora_te1`` of ``lora_te1_text_model_...``."""
    return "_".join(name.split("_")[:2])


def naming_forms(prefix: str, modules: Collection[str]) -> list[NameOf]:
    """Return all ways in which files name the layers of a member, which has these modules.

    The first one is written.
    """
    if prefix != "lora_unet":
        return [partial(_name_in_text_encoder, prefix)]
    original = _OriginalUnet(modules).name_of
    is_sdxl = "add_embedding.linear_1" in modules
    if is_sdxl:  # some tools have the names of diffusers there too
        return [original, _name_in_unet]
    return [_name_in_unet, original]


def _joined(*names: str) -> str:
    """A name in a file."""
    return "_".join(names).replace(".", "_")


# The UNet

OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""The layers outside of all blocks, and their original names."""

_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
"""The layers of a ResNet, and their original names."""

_IN_TRANSFORMER = r"attn[12]\.to_[qkv]|attn[12]\.to_out\.0|ff\.net\.0\.proj|ff\.net\.2"
_IN_ATTENTION = rf"proj_in|proj_out|transformer_blocks\.\d+\.(?:{_IN_TRANSFORMER})"
_BLOCK = r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)"
_IN_BLOCK = re.compile(
    rf"({_BLOCK}\.(?:attentions|resnets)\.\d+)\.({_IN_ATTENTION}|{'|'.join(_IN_RESNET)})"
)
_SAMPLER = re.compile(rf"{_BLOCK}\.(down|up)samplers\.0\.conv")


def _name_in_unet(layer: str) -> str:
    """The name of a layer in the UNet of Stable Diffusion."""
    if layer in OUTER or _IN_BLOCK.fullmatch(layer) or _SAMPLER.fullmatch(layer):
        return _joined("lora_unet", layer)
    return ""


class _OriginalUnet:
    """The original names in a UNet, which has no blocks there: it numbers ResNets and samplers through.

    With two ResNets in each block on the way down, ``down_blocks.1.resnets.0`` is
    ``input_blocks.4.0``: before it are ``conv_in`` (0), two ResNets (1 and 2) and a
    sampler (3). On the way up, a block has one more ResNet, and its sampler has the
    number of its last ResNet.
    """

    def __init__(self, modules: Collection[str]) -> None:
        # the original names of single layers, by their names in diffusers
        self.layers = dict(OUTER)
        # the original names of ResNets and attentions, which have layers inside
        self.groups = {
            "mid_block.resnets.0": "middle_block.0",
            "mid_block.attentions.0": "middle_block.1",
            "mid_block.resnets.1": "middle_block.2",
        }
        resnets_in_block = [
            name
            for name in modules
            if re.fullmatch(r"down_blocks\.0\.resnets\.\d+", name)
        ]
        for block in range(4):  # no such UNet has more
            self._add_down_block(block, len(resnets_in_block))
            has_attention = f"up_blocks.{block}.attentions.0" in modules
            self._add_up_block(block, len(resnets_in_block) + 1, has_attention)

    def _add_down_block(self, block: int, resnets: int) -> None:
        """Add a block on the way down, with this number of ResNets."""
        first = 1 + block * (resnets + 1)
        for number in range(resnets):
            self._add_resnet(
                f"down_blocks.{block}", number, f"input_blocks.{first + number}"
            )
        sampler = f"input_blocks.{first + resnets}.0.op"
        self.layers[f"down_blocks.{block}.downsamplers.0.conv"] = sampler

    def _add_up_block(self, block: int, resnets: int, has_attention: bool) -> None:
        """Add a block on the way up, with this number of ResNets."""
        first = block * resnets
        for number in range(resnets):
            self._add_resnet(
                f"up_blocks.{block}", number, f"output_blocks.{first + number}"
            )
        # if there is no attention, diffusers would read the sampler as another layer
        if has_attention:
            sampler = f"output_blocks.{first + resnets - 1}.2.conv"
            self.layers[f"up_blocks.{block}.upsamplers.0.conv"] = sampler

    def _add_resnet(self, block: str, number: int, original: str) -> None:
        """Add a ResNet of a block, and the attention behind it."""
        self.groups[f"{block}.resnets.{number}"] = f"{original}.0"
        self.groups[f"{block}.attentions.{number}"] = f"{original}.1"

    def name_of(self, layer: str) -> str:
        """Return the name of a layer in a file. Empty: it has none there."""
        if layer in self.layers:
            return _joined("lora_unet", self.layers[layer])
        found = _IN_BLOCK.fullmatch(layer)
        if found is None:
            return ""
        group, inner = found.groups()
        if group not in self.groups:
            return ""
        return _joined("lora_unet", self.groups[group], _IN_RESNET.get(inner, inner))


# Text encoders

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The layers of an attention."""

_IN_LAYER = rf"self_attn\.(?:{'|'.join(ATTENTION)})|mlp\.fc[12]"
_IN_ENCODER = re.compile(rf"(?:text_model\.)?(encoder\.layers\.\d+\.(?:{_IN_LAYER}))")


def _name_in_text_encoder(prefix: str, layer: str) -> str:
    """The name of a layer in a text encoder of CLIP, which has no ``text_model`` in transformers 5."""
    found = _IN_ENCODER.fullmatch(layer)
    if found is None:
        return ""
    return _joined(prefix, "text_model", found[1])
