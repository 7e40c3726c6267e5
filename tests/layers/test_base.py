"""Layers compute with their update however they are called, with adapters in float32 over a base in half precision."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterMismatchError,
    LoRAConfig,
    adapter_state_dict,
    inject_adapters,
    merge_adapters,
    remove_adapters,
)
from lightning_lora.layers import HAS_UPDATE
from tests.support.cases import Three, three
from tests.support.compared import assert_all_equal, assert_same_tensors
from tests.support.layers import (
    BAGS,
    FLOATS,
    INDEX,
    LAYERS,
    PLANE,
    Model,
    Scaled,
    adapted,
    config,
    is_float,
)
from tests.support.models import WIDTH, X, randomise
from tests.support.parameters import add_to, cloned, dtypes


def output_and_gradient(model: nn.Module, x: Tensor) -> list[Tensor]:
    output = model.train()(x)
    loss = output.float().square().sum()
    return [output, *torch.autograd.grad(loss, x)]


@pytest.mark.parametrize(
    ("layer", "dtype", "shape", "dropout"),
    [
        (nn.Linear(64, 48), torch.float32, (1, 64), 0.0),
        (nn.Linear(64, 48), torch.bfloat16, (400, 64), 0.3),
        (nn.Conv2d(64, 48, 3), torch.bfloat16, (20, 64, 5, 5), 0.0),
        (nn.Conv2d(64, 48, 1), torch.float32, (20, 64, 5, 5), 0.3),
    ],
    ids=str,
)
def test_a_fresh_adapter_changes_no_bit_in_training(
    layer: nn.Module, dtype: Any, shape: Any, dropout: float
) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    before = output_and_gradient(model, x)
    inject_adapters(model, LoRAConfig(r=4, target_modules="all", dropout=dropout))
    assert_all_equal(output_and_gradient(model, x), before)


@torch.no_grad()
def test_threads_compute_a_layer_with_its_own_forward_rightly() -> None:
    model = nn.Sequential(adapted(Scaled(8, 8)))
    x = torch.randn(4, 8).double()
    expected = model(x)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(model, [x] * 400))
    assert_all_equal(found, [expected] * 400)


@pytest.mark.parametrize("how", [{}, {"init": "pissa"}, {"use_dora": True}], ids=str)
def test_adapters_on_the_meta_device_begin_when_a_merged_base_is_assigned(
    how: dict[str, Any],
) -> None:
    plain = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(4, 8)
    state: Any = plain.state_dict()
    state._metadata["0"][HAS_UPDATE] = True
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, LoRAConfig(r=2, target_modules="all", **how))
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize(
    "name", ["linear", "lstm", "transposed convolution", "experts"]
)
def test_other_code_may_wrap_the_forward_of_an_adapted_layer(name: str) -> None:
    build, x = LAYERS[name]
    model = Model(build()).double()
    base = model(x)
    inject_adapters(model, config(model))
    randomise(model)
    expected = model(x)
    forward = model[0].forward
    model[0].forward = lambda *args, **kwargs: forward(*args, **kwargs)  # type: ignore[method-assign]
    assert torch.equal(model(x), expected)
    remove_adapters(model)
    assert torch.equal(model(x), base)


class Counts(nn.Linear):
    """A layer that counts its calls."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


def test_what_a_forward_sets_on_its_layer_is_there_afterwards() -> None:
    model = nn.Sequential(Counts(4, 4))
    inject_adapters(model, LoRAConfig(r=2))
    for calls in (1, 2):
        model(torch.ones(4))
        assert model[0].calls == calls


@pytest.mark.parametrize(
    ("layer", "arguments", "dora"),
    [
        (nn.Linear(5, 4), {"input": FLOATS}, False),
        (Conv1D(4, 5), {"x": FLOATS}, True),
        (nn.Embedding(5, 4), {"input": INDEX}, True),
        (nn.EmbeddingBag(5, 4), {"input": BAGS[0], "offsets": BAGS[1]}, False),
        (
            nn.ConvTranspose2d(4, 6, 3, stride=2),
            {"input": PLANE, "output_size": [12, 11]},
            False,
        ),
        (nn.Bilinear(5, 5, 6), {"input1": FLOATS, "input2": FLOATS}, False),
        (nn.GRUCell(5, 4), {"input": FLOATS[0]}, False),
    ],
    ids=str,
)
def test_calls_by_name_and_by_place_compute_the_same(
    layer: nn.Module, arguments: dict[str, Any], dora: bool
) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).double()
    base = model[0](**arguments)
    how = LoRAConfig(r=2, alpha=3, target_modules="all", dropout=0.5, use_dora=dora)
    inject_adapters(model, how)
    randomise(model, scale=0.5)
    torch.manual_seed(1)
    by_name = model[0](**arguments)
    torch.manual_seed(1)
    by_place = model[0](*arguments.values())
    assert by_name.shape == base.shape
    assert not torch.equal(by_name, base)
    assert torch.equal(by_name, by_place)


# Adapters are float32 over a base in half precision


KINDS = [
    "linear",
    "scaled",
    "padded embedding",
    "bag",
    "convolution",
    "transposed convolution",
    "bilinear",
    "experts",
]


def floats_to(dtype: torch.dtype, tree: Any) -> Any:
    """The same, with its floating point numbers in this dtype."""

    def convert(leaf: Any) -> Any:
        if is_float(leaf):
            return leaf.to(dtype)
        return leaf

    return tree_map(convert, tree)


def assert_near(
    found: Tensor, expected: Tensor, tolerance: float, absolute: float = 0.0
) -> None:
    error = (found - expected).norm()
    assert error < tolerance * expected.norm() + absolute


@pytest.mark.parametrize("name", KINDS)
def test_it_computes_in_the_bases_dtype_nearly_what_float32_does_and_trains_in_float32(
    name: str,
) -> None:
    build, x = LAYERS[name]
    model = Model(build()).bfloat16()
    x = floats_to(torch.bfloat16, x)
    inject_adapters(model, config(model))
    randomise(model, scale=0.5)
    exact = copy.deepcopy(model).float()
    output = model(x)
    expected = exact(floats_to(torch.float32, x))
    assert output.dtype is torch.bfloat16
    assert_near(output.float(), expected, 0.02)
    output.float().square().sum().backward()
    expected.square().sum().backward()
    for factor in adapter_state_dict(model):
        found = model.get_parameter(factor)
        wanted = exact.get_parameter(factor)
        assert found.dtype is torch.float32
        assert found.grad is not None
        assert wanted.grad is not None
        assert found.grad.dtype is torch.float32
        assert_near(found.grad, wanted.grad, 0.05, absolute=1e-3)


def test_adapters_are_kept_in_float32_over_a_half_precision_base() -> None:
    model = three()
    before = cloned(adapter_state_dict(model))
    model.linear(torch.ones(WIDTH)).sum().backward()
    model.bfloat16()
    assert_same_tensors(adapter_state_dict(model), before)
    assert model.linear.lora_A.grad.dtype == torch.float32
    assert model.linear.weight.dtype == torch.bfloat16
    assert model(X).dtype == torch.bfloat16
    assert model.double().linear.lora_A.dtype == torch.float64
    assert model.half().linear.lora_A.dtype == torch.float32


def test_adapters_have_the_dtype_of_the_base_if_asked() -> None:
    config = LoRAConfig(r=2, target_modules="all", autocast_adapter_dtype=False)
    made = Three().bfloat16()
    inject_adapters(made, config)
    assert dtypes(made) == {torch.bfloat16}
    converted = three(autocast_adapter_dtype=False).bfloat16()
    assert dtypes(converted) == {torch.bfloat16}
    with pytest.raises(AdapterMismatchError, match=r"dtype=False, not .*dtype=True"):
        inject_adapters(converted, LoRAConfig(r=2, target_modules="all"))


@pytest.mark.parametrize("merged", [False, True])
def test_autocast_computes_what_the_base_computes_it_in(merged: bool) -> None:
    model = three()
    exact = three().double()
    exact.load_state_dict(model.state_dict())
    base = Three()
    if merged:
        merge_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(X)
        dtype = base(X).dtype
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact(X), rtol=0.1, atol=0.1)


def test_an_adapter_that_is_paused_is_moved_by_no_optimizer() -> None:
    layer = adapted(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(layer.lora_parameters().values(), lr=1)
    layer(torch.ones(4).double()).sum().backward()
    before = cloned(layer.lora_parameters())
    layer.lora_pause()
    optimizer.step()
    assert_same_tensors(layer.lora_parameters(), before)


def fresh(**arguments: Any) -> Any:
    """A layer with an update of zero."""
    layer = nn.Linear(4, 4)
    inject_adapters(nn.Sequential(layer), LoRAConfig(r=2, **arguments))
    return layer


def test_an_adapter_that_begins_as_another_one_does_not_move_with_it() -> None:
    original = fresh()
    follower = fresh()
    follower.lora_follow(original)
    began = original.lora_A.detach().clone()
    assert torch.equal(follower.lora_A, began)
    add_to(original.lora_A, 1)
    assert torch.equal(follower.lora_A, began)


def test_magnitudes_stay_those_of_the_layers_own_weight_where_it_follows_another() -> (
    None
):
    original = fresh(use_dora=True)
    follower = fresh(use_dora=True)
    follower.lora_follow(original)
    assert torch.equal(follower.lora_A, original.lora_A)
    torch.testing.assert_close(follower.lora_magnitude, follower.weight.norm(dim=1))


def test_a_frozen_norm_stays_in_its_mode_and_computes_as_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    inject_adapters(model, LoRAConfig(r=2, target_modules=["0"]))
    x = torch.randn(6, 4)
    expected = model.eval()(x)
    torch.testing.assert_close(model.train()(x), expected)
    assert model[1].training
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("layer", "options", "shown"),
    [
        (nn.Linear(4, 4), {}, "r=2, scaling=4)"),
        (nn.Linear(4, 4), {"use_dora": True}, "r=2, scaling=4, use_dora=True)"),
        (nn.Linear(4, 4), {"init": "pissa"}, "r=2, scaling=4, init='pissa')"),
        (nn.LSTMCell(4, 4), {}, "r=2, scaling=4, parts=['ih', 'hh'])"),
    ],
)
def test_a_layer_is_printed_with_its_adapter(
    layer: nn.Module, options: dict[str, Any], shown: str
) -> None:
    model = nn.Sequential(layer)
    inject_adapters(model, LoRAConfig(r=2, target_modules="all", **options))
    assert repr(model[0]).endswith(f", {shown}")
