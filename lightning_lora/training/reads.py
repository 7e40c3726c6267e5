"""Embeddings whose weight other code reads in a training step, past their adapters."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lora.errors import listed, warn
from lightning_lora.model.view import View, view_of
from lightning_lora.private import COMPILED, VIEWED
from lightning_lora.tensors.names import owner_of


@contextmanager
def reads_watched(model: nn.Module) -> Iterator[None]:
    """Warn of embeddings that a training step reads by hand, such as ``h @ embed.weight.T``."""
    view = view_of(model)
    reads = _Reads(_own_weights(view))
    if not reads.names or any(COMPILED in name for name in view.modules):  # which would be compiled again
        yield
        return
    with reads:
        yield
    if reads.found:
        warn(
            f"A training step reads the weight of {listed(reads.found)} of {view.title} by hand, as an output that is "
            "tied to an embedding. There it has no update, but after a merge it has. Use a tied layer in place of it "
            f"(nn.Linear, with layer.weight = embedding.weight), or set exclude_modules={sorted(reads.found)}."
        )


class _Reads(TorchFunctionMode):
    """Notes which weights take part in what has a gradient. A lookup in a frozen weight has none."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.found = names, set[str]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.requires_grad:
            read = {id(each) for arg in args if isinstance(arg, Tensor) for each in (arg, getattr(arg, VIEWED))}
            self.found.update(self.names[each] for each in read & self.names.keys())
        return result


def _own_weights(view: View) -> dict[int, str]:
    """Adapted embeddings by the id of their weight. Other layers compute with a tied one, and DoRA with its own."""
    layers = view.layers.items()
    plain = {name for name, each in layers if isinstance(each, nn.Embedding) and not each.lora_settings.use_dora}
    uses = Counter(map(id, view.base.values()))
    return {id(p): owner_of(name) for name, p in view.base.items() if owner_of(name) in plain and uses[id(p)] == 1}
