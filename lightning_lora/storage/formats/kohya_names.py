"""What kohya's sd-scripts, ComfyUI and A1111 call the layers of a pipeline's members.

A name begins with the member, and has underscores for points. In SDXL, a layer of the UNet has its name in the original
model. Only layers that ComfyUI, A1111 and diffusers all know have a name.
"""

import re
from collections.abc import Callable, Collection

NameOf = Callable[[str], str]  # from a layer's name in a member to that in a file; empty if it has none


def names_of_member(member: str, modules: Collection[str], *, is_of_two: bool) -> NameOf:
    """Return how the layers of a member are named in a file. ``is_of_two``: it has two text encoders, as SDXL has."""
    if member == "unet" and "add_embedding.linear_1" in modules:
        return _OriginalUnet(modules).name_of
    if member == "unet":
        return _name_in_unet
    if member == "text_encoder_2":
        return _TextEncoder("lora_te2").name_of
    if member == "text_encoder":
        return _TextEncoder("lora_te1" if is_of_two else "lora_te").name_of
    return _no_name


def _no_name(_: str) -> str:
    """The name in a member that has none."""
    return ""


def _joined(*names: str) -> str:
    """A name in a file."""
    return "_".join(names).replace(".", "_")


# The UNet

OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
"""The layers outside of all blocks, and their names in the original model."""

_OUTER_IN_SDXL = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}

_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}

_IN_BLOCK = {
    "attentions": r"proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
    "resnets": "|".join(_IN_RESNET),
    "downsamplers": "conv",
    "upsamplers": "conv",
}
"""The layers in a part of a block, by expressions."""

_BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?([a-z]+)\.(\d+)\.(.+)")


def _is_in_block(layer: str) -> bool:
    """Whether a name is that of a layer in a block."""
    found = _BLOCK.fullmatch(layer)
    if found is None:
        return False
    *_, part, _, inner = found.groups()
    return part in _IN_BLOCK and re.fullmatch(_IN_BLOCK[part], inner) is not None


def _name_in_unet(layer: str) -> str:
    """The name of a layer in the UNet of Stable Diffusion."""
    if layer in OUTER or _is_in_block(layer):
        return _joined("lora_unet", layer)
    return ""


class _OriginalUnet:
    """The names in the UNet of SDXL: the original one counts all layers of its blocks."""

    def __init__(self, modules: Collection[str]) -> None:
        self.modules = modules
        resnets = [name for name in modules if re.fullmatch(r"down_blocks\.0\.resnets\.\d+", name)]
        self.layers_per_block = len(resnets)

    def name_of(self, layer: str) -> str:
        """Return the name of a layer in a file."""
        outer = {**OUTER, **_OUTER_IN_SDXL}
        if layer in outer:
            return _joined("lora_unet", outer[layer])
        if not _is_in_block(layer):
            return ""
        side, block, part, number, inner = _BLOCK.fullmatch(layer).groups()  # type: ignore[union-attr]
        place = self._place(side, int(block or 0), part, int(number))
        if not place:
            return ""
        return _joined("lora_unet", place, self._name_in_part(part, inner))

    def _place(self, side: str, block: int, part: str, number: int) -> str:
        """The original place of a part of a block."""
        first = block * (self.layers_per_block + 1)
        is_attention = int(part == "attentions")
        if side == "mid":
            return f"middle_block.{2 * number + is_attention}"
        if part == "downsamplers":
            return f"input_blocks.{first + self.layers_per_block + 1}.0"
        if part == "upsamplers":
            return self._place_of_upsampler(block, first)
        if side == "down":
            return f"input_blocks.{first + number + 1}.{is_attention}"
        return f"output_blocks.{first + number}.{is_attention}"

    def _place_of_upsampler(self, block: int, first: int) -> str:
        """The place behind an attention. Without one, as in the refiner, diffusers would read another layer."""
        if f"up_blocks.{block}.attentions.0" not in self.modules:
            return ""
        return f"output_blocks.{first + self.layers_per_block}.2"

    @staticmethod
    def _name_in_part(part: str, inner: str) -> str:
        """The original name of a layer in a part of a block."""
        if part == "resnets":
            return _IN_RESNET[inner]
        if part == "downsamplers":
            return "op"
        return inner


# Text encoders

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The layers of an attention."""

_IN_ENCODER = re.compile(
    rf"(?:text_model\.)?(encoder\.layers\.\d+\.(?:self_attn\.(?:{'|'.join(ATTENTION)})|mlp\.fc[12]))"
)


class _TextEncoder:
    """The names in a text encoder of CLIP, which transformers 5 has without ``text_model``."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def name_of(self, layer: str) -> str:
        """Return the name of a layer in a file."""
        found = _IN_ENCODER.fullmatch(layer)
        if found is None:
            return ""
        return _joined(self.prefix, "text_model", found[1])
