"""The members of a pipeline of diffusers: which of them a model is, or holds.

A member has a name of the pipeline's, such as ``unet``, and a root, which is its name in
the model, such as ``pipe.unet``.
"""

from collections.abc import Mapping

from torch import nn

from lightning_lora.storage.formats.peft_or_diffusers import MEMBER_NAME
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import is_in_any, last_component


def member_name(model: nn.Module | None, root: str) -> str:
    """Return what a pipeline calls a model, such as ``unet``.

    Empty: it is no member of one. ``root`` is its name in the module around it. The end
    of that says more than the model's class: ``text_encoder_2``.
    """
    name = last_component(root)
    if MEMBER_NAME.fullmatch(name):
        return name
    reads_adapters = hasattr(model, "load_lora_adapter")
    for ancestor in type(model).__mro__:
        library = ancestor.__module__
        if library.startswith("diffusers.models.unets"):
            return "unet"
        if library.startswith("diffusers.models.transformers") and reads_adapters:
            return "transformer"
        if ancestor.__name__ == "PreTrainedModel":
            return "text_encoder"
    return ""


def members_in(modules: Mapping[str, nn.Module | None]) -> dict[str, str]:
    """Return the roots of a pipeline's members among modules, by what the pipeline calls them.

    ``{"unet": "pipe.unet", "text_encoder": "pipe.text_encoder"}``. Nothing inside of a
    member is another one. If two would be called the same, such as two text encoders by
    their class, the one whose name here ends so is meant.
    """
    roots = dict[str, str]()
    for name, module in without(modules, [""]).items():
        if is_in_any(name, roots.values()):
            continue
        member = member_name(module, name)
        if not member:
            continue
        if member not in roots or name.endswith(member):
            roots[member] = name
    return roots
