"""Rows of an embedding that train by themselves: they train to the bits of plain torch, and nothing else changes."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_lora as ll
from lightning_lora.errors import AdapterStateError
from tests.support.layers import ScaledEmbedding
from tests.support.models import TinyLM, randomise
from tests.support.parameters import add_to

TOKENS = (3, 7, 11)
INDEX = torch.tensor([[3, 3, 1, 7], [0, 3, 11, 5], [7, 2, 3, 3]])


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Embedding(12, 5),
    "padding among the rows": lambda: nn.Embedding(12, 5, padding_idx=7),
    "by frequency": lambda: nn.Embedding(12, 5, scale_grad_by_freq=True),
    "a forward of its own": lambda: ScaledEmbedding(12, 5, padding_idx=3),
    "half precision": lambda: nn.Embedding(12, 5, dtype=torch.bfloat16),
}


def with_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """The weight, with these rows for the tokens."""
    return weight.index_copy(0, torch.tensor(TOKENS), rows.to(weight.dtype))


def looked_up(layer: Any, weight: Tensor, index: Tensor) -> Tensor:
    """What torch computes with this weight."""
    found = F.embedding(
        index, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq
    )
    if isinstance(layer, ScaledEmbedding):
        return 4 * found
    return found


def trained(parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    goal = torch.linspace(-1, 1, 60).view(3, 4, 5)
    for _ in range(4):
        optimizer.zero_grad()
        (compute().float() - goal).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_rows_train_to_the_bits_of_a_training_of_these_rows_alone(
    make: Callable[[], nn.Module],
) -> None:
    layer: Any = make()
    weight = layer.weight.detach().clone()
    start = weight[list(TOKENS)].float()  # as an adapter beside half precision
    rows = nn.Parameter(start.clone())
    fresh = layer(INDEX)
    config = ll.LoRAConfig(target_modules=[], trainable_token_indices={"embed": TOKENS})
    ll.inject_adapters(nn.ModuleDict({"embed": layer}), config)
    assert torch.equal(layer(INDEX), fresh)
    assert list(layer.lora_parameters()) == ["lora_rows"]
    trained(rows, lambda: looked_up(layer, with_rows(weight, rows), INDEX))
    trained(layer.lora_rows, lambda: layer(INDEX.int()))
    assert not torch.equal(rows, start)
    assert torch.equal(layer.lora_rows, rows)
    assert torch.equal(layer.weight, weight)
    assert layer.weight.grad is None
    merged, lost = layer.lora_merged_weight("weight")
    assert torch.equal(merged, with_rows(weight, rows))
    assert lost == 0


def by_plain_torch(model: Any, whole: Tensor) -> Tensor:
    """What a TinyLM with this embedding computes."""
    x = F.embedding(INDEX, whole)
    x = model.norm(torch.tanh(model.q_proj(x)) + model.v_proj(x))
    return F.linear(x, whole, model.lm_head.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_head_computes_with_the_rows_and_sends_gradients_to_them(
    bias: bool,
) -> None:
    model: Any = TinyLM().double()
    if bias:
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 20).double())
    weight = model.embed.weight.detach().clone()
    fresh = model(INDEX)
    names = ll.inject_adapters(
        model, ll.LoRAConfig(r=2, trainable_token_indices={"embed": TOKENS})
    )
    assert names == ("embed", "q_proj", "v_proj")
    assert type(model.lm_head).__name__ == "TiedLinear"
    assert torch.equal(model(INDEX), fresh)
    randomise(model)
    rows = model.embed.lora_rows.detach().clone().requires_grad_()
    expected = by_plain_torch(model, with_rows(weight, rows))
    torch.testing.assert_close(model(INDEX), expected)
    (gradient,) = torch.autograd.grad(expected.square().sum(), rows)
    model(INDEX).square().sum().backward()
    torch.testing.assert_close(model.embed.lora_rows.grad, gradient)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.lm_head.lora_tied_to[0] is copied.embed
        assert torch.equal(copied(INDEX), model(INDEX))
    ll.remove_adapters(model)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model(INDEX), fresh)


class Made(TorchDispatchMode):
    """It notes the shape of each tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = set[torch.Size]()

    def __torch_dispatch__(
        self, operation: Any, _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = operation(*args, **(kwargs or {}))
        self.shapes.add(made.shape)
        return made


def test_a_tied_head_makes_no_copy_of_the_weight() -> None:
    model: Any = TinyLM()
    ll.inject_adapters(
        model, ll.LoRAConfig(r=2, trainable_token_indices={"embed": TOKENS})
    )
    x = model.embed(INDEX)
    with Made() as made:
        model.lm_head(x)
    assert model.lm_head.weight.shape not in made.shapes


class SharesAWeight(nn.Module):
    """Two embeddings and a head, all with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 5)
        self.scaled = ScaledEmbedding(12, 5)
        self.head = nn.Linear(5, 12)
        self.scaled.weight = self.embed.weight
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Any:
        return self.embed(index), self.scaled(index), self.head(torch.ones(5))


@pytest.mark.parametrize("named", ["embed", "head"])
def test_all_that_has_the_weight_follows_whatever_its_forward_is(named: str) -> None:
    model: Any = SharesAWeight()
    ll.inject_adapters(
        model, ll.LoRAConfig(target_modules=[], trainable_token_indices={named: TOKENS})
    )
    randomise(model)
    whole = model.get_submodule(named).lora_effective_weight("weight")
    one, scaled, head = model(INDEX)
    assert torch.equal(one, whole[INDEX])
    assert torch.equal(scaled, 4 * whole[INDEX])
    torch.testing.assert_close(head, F.linear(torch.ones(5), whole, model.head.bias))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_or_untied_later_follows_after_the_next_injection(
    tmp_path: Path, tied: bool
) -> None:
    model: Any = TinyLM(tied=False)
    config = ll.LoRAConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed": TOKENS}
    )
    ll.inject_adapters(model, config)
    randomise(model)
    own = nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight = model.embed.weight
    if not tied:
        ll.inject_adapters(model, config)
        model.lm_head.weight = own
    message = "'lm_head' of TinyLM was tied to an embedding whose rows"
    with pytest.raises(AdapterStateError, match=message):
        ll.merge_adapters(model)
    with pytest.raises(AdapterStateError, match=message):
        ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.inject_adapters(model, config)
    whole = model.embed.lora_effective_weight("weight") if tied else own
    x = torch.ones(model.lm_head.in_features)
    expected = model(INDEX)
    torch.testing.assert_close(model.lm_head(x), F.linear(x, whole))
    ll.merge_adapters(model)
    torch.testing.assert_close(model(INDEX), expected)
    ll.unmerge_adapters(model)


@pytest.mark.parametrize("method", [{"init": "pissa"}, {"use_dora": True}], ids=str)
def test_rows_that_are_fresh_follow_a_base_that_is_loaded_later(
    method: dict[str, Any],
) -> None:
    model: Any = TinyLM(tied=False)
    config = ll.LoRAConfig(r=2, trainable_token_indices={"embed": TOKENS}, **method)
    ll.inject_adapters(model, config)
    other = TinyLM(tied=False)
    model.load_state_dict(other.state_dict())
    rows = model.embed.lora_rows
    loaded = other.embed.weight[list(TOKENS)]
    assert torch.equal(rows, loaded)
    assert torch.equal(model(INDEX), other(INDEX))
    add_to(rows, 1)
    model.half()
    assert rows.dtype == torch.float32
    assert torch.equal(rows, loaded + 1)
    layer = model.embed
    layer.reset_parameters()
    assert torch.equal(layer.lora_rows, layer.weight[list(TOKENS)].float())


def test_adapters_with_other_rows_and_with_a_low_rank_update_take_turns() -> None:
    model = TinyLM()
    alone = dict[str, Tensor]()
    configs = {
        "some": ll.LoRAConfig(r=2, trainable_token_indices={"embed": TOKENS}),
        "others": ll.LoRAConfig(
            r=2, target_modules=["v_proj"], trainable_token_indices={"embed": [0, 3]}
        ),
        "low rank": ll.LoRAConfig(r=2, target_modules=["embed", "q_proj"]),
    }
    fresh = model(INDEX)
    weight = model.embed.weight.detach().clone()
    for seed, name in enumerate(configs):
        ll.inject_adapters(model, configs[name], name=name)
        randomise(model, seed)
        alone[name] = model(INDEX)
        assert not torch.equal(alone[name], fresh)
    for name in [*configs, *reversed(configs), *configs]:
        ll.set_adapter(model, name)
        assert torch.equal(model(INDEX), alone[name])
        has_plain_head = type(model.lm_head) is nn.Linear
        assert has_plain_head is (name == "low rank")
    with ll.disable_adapters(model):
        assert torch.equal(model(INDEX), fresh)
    assert torch.equal(model.embed.weight, weight)
