"""Embeddings whose weight other code reads in a training step, past their adapters."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import listed, warn
from lightning_lora.model.view import view_of
from lightning_lora.private import is_compiled, tree_leaves


@contextmanager
def reads_watched(model: nn.Module) -> Iterator[None]:
    """Warn of embeddings that a training step reads by hand, such as ``h @ embed.weight.T``."""
    view, watched = view_of(model), dict[str, Any]()
    for name, layer in view.layers.items() if not is_compiled(model) else ():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and type(layer.weight) is nn.Parameter:
            watched[name] = layer.weight
    with ExitStack() as undo:
        for weight in watched.values():
            undo.callback(_switch, weight, nn.Parameter)
            _switch(weight, _Watched)
            for module in view.modules.values():
                if any(p is weight for p in module._parameters.values()):  # its own forward may read it
                    undo.callback(module.register_forward_pre_hook(partial(_switch, weight, nn.Parameter)).remove)
                    after = module.register_forward_hook(partial(_switch, weight, _Watched), always_call=True)
                    undo.callback(after.remove)
        yield
    if read := [name for name, weight in watched.items() if vars(weight).pop(_READ, False)]:
        warn(
            f"A training step reads the weight of {listed(read)} of {view.title} by hand, without its update. A merge "
            "would change what it computes. Use a tied layer (nn.Linear without bias), or leave the embedding out."
        )


def _switch(weight: Any, kind: type, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        weight.__class__ = kind


_READ = "lora_is_read"
_LOOKS: set[Any] = {Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]  # a property of C


class _Watched(nn.Parameter):
    """A weight that notes when something is computed with it, where gradients are."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if isinstance(result, Tensor) and result.is_floating_point() and torch.is_grad_enabled():
            for each in tree_leaves((args, kwargs)) if function not in _LOOKS else ():
                if type(each) is cls and each is not result and not torch.compiler.is_compiling():
                    setattr(each, _READ, True)
        return result

    def __deepcopy__(self, memo: Any) -> Any:
        copied = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        copied.__class__ = nn.Parameter
        return copied
