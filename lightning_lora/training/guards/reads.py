"""Embeddings whose weight other code reads by hand, past their adapters."""

from torch import Tensor, nn

from lightning_lora.errors import listed, warn
from lightning_lora.model.view import View
from lightning_lora.private import PRODUCT_SIZES
from lightning_lora.tensors.names import owner_of
from lightning_lora.training.graphs import nodes_behind

Sizes = dict[str, tuple[int, ...]]


def sizes_to_find(view: View) -> Sizes:
    """Return the sizes of the transposed weights of adapted embeddings, if no other layer has a weight of these."""
    adapted = {n: each for n, each in view.layers.items() if isinstance(each, nn.Embedding | nn.EmbeddingBag)}
    others = {tuple(p.shape) for name, p in view.parameters.items() if owner_of(name) not in adapted}
    sizes = {name: tuple(embedding.weight.shape) for name, embedding in adapted.items()}
    return {name: shape[::-1] for name, shape in sizes.items() if others.isdisjoint((shape, shape[::-1]))}


def warn_of_reads(sizes: Sizes, loss: Tensor) -> None:
    """Warn of embeddings in a product such as ``h @ embed.weight.T``, by the sizes in the graph of a loss."""
    nodes = nodes_behind([loss]) if sizes else ()
    frozen = [node for node in nodes if node.next_functions[-1:] == ((None, 0),)]
    products = {getattr(node, PRODUCT_SIZES, None) for node in frozen}
    if read := [name for name, shape in sizes.items() if shape in products]:
        warn(
            f"A step multiplies by the weight of {listed(read)} itself, without its update. A merge would change what "
            "it computes. Use a tied layer there (nn.Linear without bias), or leave the embedding out: exclude_modules."
        )
