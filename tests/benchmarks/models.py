"""Models of well-known shapes, with random weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from tests.support.parameters import trainable


class Bert(nn.Module):
    """BERT-base: 109 M parameters."""

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(num_hidden_layers=layers, use_cache=False, **dropout)
        self.model = BertModel(config, add_pooling_layer=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.model(inputs_embeds=embeddings).last_hidden_state


class Llama(nn.Module):
    """Layers of Llama with the width and depth of BERT-base."""

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        sizes = {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_attention_heads": 12,
            "vocab_size": 1000,
        }
        self.model = LlamaModel(
            LlamaConfig(num_hidden_layers=layers, use_cache=False, **sizes)
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.model(inputs_embeds=embeddings).last_hidden_state


class Projections(nn.Module):
    """One linear layer, or several with the same input, such as q, k and v."""

    def __init__(self, width: int, count: int = 1, *, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(width, width, bias=bias) for _ in range(count)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a function for one forward and backward pass.

    It computes gradients of the input and of all trainable parameters.
    """
    with torch.no_grad():
        gradients = tree_map(torch.randn_like, model(x))
    trained = trainable(model)

    def run() -> None:
        torch.autograd.backward(model(x), gradients)
        x.grad = None
        for parameter in trained:
            parameter.grad = None

    return run
