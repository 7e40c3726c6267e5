"""What convolutions, embeddings, recurrent layers and attention have of their own."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.training.optimizers.train_adapters import train_adapters
from tests.support.layers import FLOATS, LAYERS, PLANE, adapted
from tests.support.models import randomise

EVERY = ll.LoRAConfig(r=2, target_modules="all")
INDEX = torch.tensor([[3, 3, 3, 1], [0, 1, 2, 4]])


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Conv2d(4, 6, 3), PLANE), (nn.Conv2d(4, 6, 3, groups=2), PLANE), (nn.Embedding(6, 6), INDEX)],
    ids=["convolution", "grouped convolution", "embedding"],
)
def test_slices_are_channels_or_features_that_a_layer_writes(layer: nn.Module, x: Tensor) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).double()
    plain, slices = copy.deepcopy(model), {"0": {"few": [1, 3], "last": [5, 6]}}
    ll.inject_adapters(model, ll.LoRAConfig(r=2, alpha=2, target_modules=["0"], target_slices=slices))
    assert torch.equal(model(x), plain(x))
    randomise(model)
    factors, weight = ll.adapter_state_dict(model), plain[0].weight.detach()
    written = weight.T if isinstance(layer, nn.Embedding) else weight
    for part, rows in (("few", slice(1, 3)), ("last", slice(5, 6))):
        update = factors[f"0.lora_B_{part}"] @ factors[f"0.lora_A_{part}"]
        written[rows] += update.view_as(written[rows])
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("change", [{"stride": 2}, {"padding": 1}])
def test_a_geometry_that_is_set_later_may_be_one_number(change: dict[str, Any]) -> None:
    layer, x = nn.Conv2d(4, 6, 1), torch.randn(2, 4, 7, 6).double()
    vars(layer).update(change)
    model = nn.Sequential(layer).double()
    ll.inject_adapters(model, EVERY)
    randomise(model)
    output = model(x)
    ll.merge_adapters(model)
    torch.testing.assert_close(output, model(x))


@pytest.mark.parametrize(
    ("kernel", "channels_last", "size"), [(1, True, (5, 4)), (1, False, (1, 1)), (3, True, (1, 1)), (3, False, (5, 4))]
)
def test_the_output_has_the_layers_own_memory_format(kernel: int, channels_last: bool, size: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, kernel, padding=kernel // 2))
    x = torch.randn(3, *size, 4).movedim(-1, 1) if channels_last else torch.randn(3, 4, *size)
    expected = model(x)
    ll.inject_adapters(model, EVERY)
    found = model(x)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


# Embeddings and bags of them


def test_gradients_are_divided_by_how_often_a_token_occurs_if_the_layer_does_so() -> None:
    grads = []
    for divides in (False, True):
        torch.manual_seed(0)
        layer = adapted(nn.Embedding(6, 4, scale_grad_by_freq=divides))
        layer(INDEX).sum().backward()
        grads.append(layer.lora_A.grad)
    torch.testing.assert_close(grads[1], grads[0] / torch.tensor([1.0, 2, 1, 3, 1, 1]).double())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_token_that_pads_gives_no_gradient_to_its_column(kind: Any) -> None:
    layer = adapted(kind(6, 4, padding_idx=2))
    layer(torch.tensor([[1, 2, 5], [2, 1, 1]])).square().sum().backward()
    assert layer.lora_A.grad.any(dim=0).tolist() == [False, True, False, False, False, True]


# Attention: each projection has an update of its own


def test_projections_that_are_excluded_or_train_whole_leave_the_others() -> None:
    def parts(**config: Any) -> set[str]:
        model = nn.TransformerEncoderLayer(8, 2, 16)
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["self_attn"], **config))
        assert model.self_attn.in_proj_weight.requires_grad is ("modules_to_save" in config)
        return {name.rpartition("_")[2] for name in ll.adapter_state_dict(model) if "lora_A_" in name}

    assert parts(exclude_modules=["self_attn.out_proj"]) == {"q", "k", "v"}
    assert parts(modules_to_save=["self_attn.in_proj_weight"]) == {"out"}
    with pytest.raises(ll.TargetError, match="select no layer of TransformerEncoderLayer"):
        parts(modules_to_save=["self_attn.in_proj_weight", "self_attn.out_proj"])
    with pytest.raises(ll.TargetError, match=r"'self_attn', whose parts have names: 'q', 'k', 'v', 'out'\. Give"):
        parts(target_slices={"self_attn": {"q": [0, 8]}})


def test_each_adapter_is_in_the_group_of_its_own_weight() -> None:
    layer: Any = nn.MultiheadAttention(4, 1)
    ll.inject_adapters(model := nn.Sequential(layer), EVERY)
    weights = (layer.in_proj_weight, layer.out_proj.weight)
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1)
    train_adapters(model, [optimizer])
    names = {id(p): name for name, p in layer.named_parameters()}
    held = [[names[id(p)][5:] for p in group["params"]] for group in optimizer.param_groups]
    assert held == [["A_q", "B_q", "A_k", "B_k", "A_v", "B_v"], ["A_out", "B_out"]]


# Recurrent layers


@pytest.mark.parametrize("name", ["lstm", "lstm with projections", "gru cell"])
def test_every_weight_of_every_layer_and_direction_has_an_update_of_its_own(name: str) -> None:
    model = nn.Sequential(LAYERS[name][0]())
    weights = {name[7:]: p for name, p in model[0].named_parameters() if name.startswith("weight_")}
    ll.inject_adapters(model, EVERY)
    shapes = {name: factor.shape for name, factor in ll.adapter_state_dict(model).items()}
    assert shapes == {f"0.lora_A_{part}": (2, weight.shape[1]) for part, weight in weights.items()} | {
        f"0.lora_B_{part}": (weight.shape[0], 2) for part, weight in weights.items()
    }


def test_running_a_layer_keeps_no_updated_weights_in_memory() -> None:
    def held() -> int:
        gc.collect()
        return sum(type(each) in (Tensor, nn.Parameter) and each.shape == (92, 5) for each in gc.get_objects())

    layer = adapted(nn.LSTM(5, 23))  # a size that nothing else has
    before = held()
    layer(FLOATS)
    assert held() == before


def test_weights_are_laid_out_for_cudnn_again_whenever_others_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    model, laid_out = nn.Sequential(nn.LSTM(5, 4)), list[nn.Module]()
    ll.inject_adapters(model, EVERY)
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda layer: laid_out.append(layer))
    for change in (ll.merge_adapters, ll.unmerge_adapters):
        change(model)
        assert laid_out == [model[0]]
        laid_out.clear()
