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
from tests.support.parameters import shapes

EVERY = ll.LoRAConfig(r=2, target_modules="all")
INDEX = torch.tensor([[3, 3, 3, 1], [0, 1, 2, 4]])


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 6, 3), PLANE),
        (nn.Conv2d(4, 6, 3, groups=2), PLANE),
        (nn.Embedding(6, 6), INDEX),
    ],
    ids=["convolution", "grouped convolution", "embedding"],
)
def test_slices_are_channels_or_features_that_a_layer_writes(
    layer: nn.Module, x: Tensor
) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).double()
    plain = copy.deepcopy(model)
    slices = {"0": {"few": [1, 3], "last": [5, 6]}}
    ll.inject_adapters(
        model, ll.LoRAConfig(r=2, alpha=2, target_modules=["0"], target_slices=slices)
    )
    assert torch.equal(model(x), plain(x))
    randomise(model)
    factors = ll.adapter_state_dict(model)
    written = plain[0].weight.detach()
    if isinstance(layer, nn.Embedding):
        written = written.T
    few = factors["0.lora_B_few"] @ factors["0.lora_A_few"]
    last = factors["0.lora_B_last"] @ factors["0.lora_A_last"]
    written[1:3] += few.view_as(written[1:3])
    written[5:6] += last.view_as(written[5:6])
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("change", [{"stride": 2}, {"padding": 1}])
def test_a_geometry_that_is_set_later_may_be_one_number(change: dict[str, Any]) -> None:
    layer = nn.Conv2d(4, 6, 1)
    x = torch.randn(2, 4, 7, 6).double()
    vars(layer).update(change)
    model = nn.Sequential(layer).double()
    ll.inject_adapters(model, EVERY)
    randomise(model)
    output = model(x)
    ll.merge_adapters(model)
    torch.testing.assert_close(output, model(x))


def image(*size: int, channels_last: bool) -> Tensor:
    """Three random images of four channels."""
    if channels_last:
        return torch.randn(3, *size, 4).movedim(-1, 1)
    return torch.randn(3, 4, *size)


@pytest.mark.parametrize(
    ("kernel", "channels_last", "size"),
    [(1, True, (5, 4)), (1, False, (1, 1)), (3, True, (1, 1)), (3, False, (5, 4))],
)
def test_the_output_has_the_layers_own_memory_format(
    kernel: int, channels_last: bool, size: tuple[int, int]
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, kernel, padding=kernel // 2))
    x = image(*size, channels_last=channels_last)
    expected = model(x)
    ll.inject_adapters(model, EVERY)
    found = model(x)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


# Embeddings and bags of them


def gradient_of_tokens(*, scale_grad_by_freq: bool) -> Tensor:
    torch.manual_seed(0)
    layer = adapted(nn.Embedding(6, 4, scale_grad_by_freq=scale_grad_by_freq))
    layer(INDEX).sum().backward()
    return layer.lora_A.grad


def test_gradients_are_divided_by_how_often_a_token_occurs_if_the_layer_does_so() -> (
    None
):
    times = torch.tensor([1.0, 2, 1, 3, 1, 1]).double()
    plain = gradient_of_tokens(scale_grad_by_freq=False)
    divided = gradient_of_tokens(scale_grad_by_freq=True)
    torch.testing.assert_close(divided, plain / times)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_token_that_pads_gives_no_gradient_to_its_column(kind: Any) -> None:
    layer = adapted(kind(6, 4, padding_idx=2))
    layer(torch.tensor([[1, 2, 5], [2, 1, 1]])).square().sum().backward()
    assert layer.lora_A.grad.any(dim=0).tolist() == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]


# Attention: each projection has an update of its own


def projections(**config: Any) -> list[str]:
    """The projections of an attention that this adapts."""
    model = nn.TransformerEncoderLayer(8, 2, 16)
    ll.inject_adapters(
        model, ll.LoRAConfig(r=2, target_modules=["self_attn"], **config)
    )
    trains_whole = model.self_attn.in_proj_weight.requires_grad
    assert trains_whole is ("modules_to_save" in config)
    factors = [name for name in ll.adapter_state_dict(model) if "lora_A_" in name]
    return [name.removeprefix("self_attn.lora_A_") for name in factors]


def test_projections_that_are_excluded_or_train_whole_leave_the_others() -> None:
    assert projections(exclude_modules=["self_attn.out_proj"]) == ["q", "k", "v"]
    assert projections(modules_to_save=["self_attn.in_proj_weight"]) == ["out"]
    with pytest.raises(
        ll.TargetError, match="select no layer of TransformerEncoderLayer"
    ):
        projections(modules_to_save=["self_attn.in_proj_weight", "self_attn.out_proj"])
    message = r"'self_attn', whose parts have names: 'q', 'k', 'v', 'out'\. Give"
    with pytest.raises(ll.TargetError, match=message):
        projections(target_slices={"self_attn": {"q": [0, 8]}})


def names_in_groups(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[list[str]]:
    """What each group of the optimizer holds, by name."""
    names = {p: name for name, p in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        found.append([names[p] for p in group["params"]])
    return found


def test_each_adapter_is_in_the_group_of_its_own_weight() -> None:
    layer: Any = nn.MultiheadAttention(4, 1)
    model = nn.Sequential(layer)
    ll.inject_adapters(model, EVERY)
    groups = [{"params": [layer.in_proj_weight]}, {"params": [layer.out_proj.weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    train_adapters(model, [optimizer])
    inside, outside = names_in_groups(layer, optimizer)
    assert inside == [
        "lora_A_q",
        "lora_B_q",
        "lora_A_k",
        "lora_B_k",
        "lora_A_v",
        "lora_B_v",
    ]
    assert outside == ["lora_A_out", "lora_B_out"]


# Recurrent layers


@pytest.mark.parametrize("name", ["lstm", "lstm with projections", "gru cell"])
def test_every_weight_of_every_layer_and_direction_has_an_update_of_its_own(
    name: str,
) -> None:
    build, _ = LAYERS[name]
    model = nn.Sequential(build())
    expected = {}
    for weight_name, weight in model[0].named_parameters():
        if weight_name.startswith("weight_"):
            part = weight_name.removeprefix("weight_")
            writes, reads = weight.shape
            expected[f"0.lora_A_{part}"] = (2, reads)
            expected[f"0.lora_B_{part}"] = (writes, 2)
    ll.inject_adapters(model, EVERY)
    assert shapes(ll.adapter_state_dict(model)) == expected


def is_of_that_layer(value: object) -> bool:
    """Whether it is a weight of the layer below, or as large as one."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    return value.shape == (92, 5)  # a size that nothing else has


def weights_in_memory() -> int:
    gc.collect()
    return sum(map(is_of_that_layer, gc.get_objects()))


def test_running_a_layer_keeps_no_updated_weights_in_memory() -> None:
    layer = adapted(nn.LSTM(5, 23))
    before = weights_in_memory()
    layer(FLOATS)
    assert weights_in_memory() == before


def test_weights_are_laid_out_for_cudnn_again_whenever_others_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.LSTM(5, 4))
    laid_out = list[nn.Module]()
    ll.inject_adapters(model, EVERY)
    monkeypatch.setattr(
        nn.LSTM, "flatten_parameters", lambda layer: laid_out.append(layer)
    )
    ll.merge_adapters(model)
    assert laid_out == [model[0]]
    laid_out.clear()
    ll.unmerge_adapters(model)
    assert laid_out == [model[0]]
