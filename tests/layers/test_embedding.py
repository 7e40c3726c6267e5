"""Embeddings and bags of them have updates by token."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, TargetError, adapter_state_dict, inject_adapters, merge_adapters
from tests.support.layers import adapted
from tests.support.models import randomise

INDEX = torch.tensor([[3, 3, 3, 1], [0, 1, 2, 4]])


def test_gradients_are_divided_by_how_often_a_token_occurs_if_the_layer_does_so() -> None:
    grads = []
    for divides in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 4, scale_grad_by_freq=divides)).double()
        inject_adapters(model, LoRAConfig(r=2, target_modules="all"))
        randomise(model)
        model(INDEX).sum().backward()
        grads.append(model.get_parameter("0.lora_A").grad)
    often = torch.tensor([1.0, 2, 1, 3, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(grads[1], grads[0] / often)


@pytest.mark.parametrize(
    ("arguments", "why"), [({"max_norm": 2.0}, "max_norm=2 rewrites"), ({"sparse": True}, "gradients are sparse")]
)
def test_bags_are_refused_where_embeddings_are(arguments: dict[str, object], why: str) -> None:
    model = nn.Sequential(nn.EmbeddingBag(6, 4, **arguments))  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=why):
        inject_adapters(model, LoRAConfig(r=2, target_modules=["0"]))


def test_slices_of_an_embedding_are_features_that_it_writes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4)).double()
    plain = copy.deepcopy(model)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["0"], target_slices={"0": {"some": [1, 3]}}))
    randomise(model)
    factors = adapter_state_dict(model)
    with torch.no_grad():
        plain[0].weight[:, 1:3] += (factors["0.lora_B_some"] @ factors["0.lora_A_some"]).T
    torch.testing.assert_close(model(INDEX), plain(INDEX))


def test_unseen_tokens_of_an_embedding_never_change() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(4, 2))
    inject_adapters(model, LoRAConfig(r=2, target_modules="all"))
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    merge_adapters(model)
    changed = (model[0].weight != before).any(dim=1)
    assert changed.tolist() == [index in (1, 2) for index in range(10)]


PADDED: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Embedding(6, 4, padding_idx=2),
    "counted from the end": lambda: nn.Embedding(6, 4, padding_idx=-4),
    "bag of sums": lambda: nn.EmbeddingBag(6, 4, mode="sum", padding_idx=2),
    "bag of means": lambda: nn.EmbeddingBag(6, 4, mode="mean", padding_idx=2),
    "bag of maxima": lambda: nn.EmbeddingBag(6, 4, mode="max", padding_idx=2),
}


@pytest.mark.parametrize("build", PADDED.values(), ids=PADDED)
def test_a_token_that_pads_gives_no_gradient_to_its_column(build: Callable[[], nn.Module]) -> None:
    layer = adapted(build())
    layer(torch.tensor([[1, 2, 5], [2, 1, 1]])).square().sum().backward()
    assert layer.lora_A.grad.any(dim=0).tolist() == [False, True, False, False, False, True]
