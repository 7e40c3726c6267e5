"""The one model inside a LightningModule."""

from torch import nn

from lightning_lora.tensors.names import named_modules, plain_module

_MODELS = ("PreTrainedModel", "ModelMixin")
"""The base classes of transformers' and diffusers' models."""


def root_of(model: nn.Module) -> str:
    """Return the name of the one model inside ``model``.

    It is the outermost model of transformers or diffusers, if there is one. Else it is the only module that holds
    weights, if ``model`` is a LightningModule. Otherwise it is ``""``, which means ``model`` itself.

    Example:
        >>> root_of(nn.Sequential(nn.Linear(2, 2)))
        ''
    """
    outermost: list[str] = []
    for name, module in named_modules(model).items():
        if _is_a(module, *_MODELS) and not any(_is_inside(name, other) for other in outermost):
            outermost.append(name)
    if outermost:
        return outermost[0] if len(outermost) == 1 else ""
    plain = plain_module(model)
    if not _is_a(plain, "LightningModule") or any(True for _ in plain.parameters(recurse=False)):
        return ""
    holders = [name for name, child in plain.named_children() if any(True for _ in child.parameters())]
    return holders[0] if len(holders) == 1 else ""


def _is_a(module: nn.Module, *names: str) -> bool:
    return any(base.__name__ in names for base in type(module).__mro__)


def _is_inside(name: str, other: str) -> bool:
    return not other or name.startswith(f"{other}.")
