"""Adapters start as their init says."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_state_dict, inject_adapters
from lightning_lora.config import Init
from lightning_lora.layers import INITIALISATIONS
from tests.support.layers import Experts
from tests.support.models import randomise
from tests.support.parameters import trainable, trainable_names


@pytest.mark.parametrize("name", get_args(Init))
def test_each_word_is_one_object_in_the_table(name: str) -> None:
    assert set(get_args(Init)) == INITIALISATIONS.keys()
    assert INITIALISATIONS[name].name == name


def drawn(init: str, *size: int) -> Tensor:
    """What torch draws for a lora_A of rank 3."""
    values = torch.empty(size, dtype=torch.bfloat16)
    if init == "gaussian":
        return values.normal_(std=1 / 3)
    bound = size[-1] ** -0.5
    return values.uniform_(-bound, bound)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_random_starts_are_these_very_draws(init: Any) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Embedding(4, 6), Experts()).bfloat16()
    how: dict[str, Any] = {
        "target_modules": "all",
        "target_parameters": ["stack"],
        "autocast_adapter_dtype": False,
    }
    torch.manual_seed(3)
    inject_adapters(model, LoRAConfig(r=3, init=init, **how))
    torch.manual_seed(3)
    assert torch.equal(model[0].lora_A, drawn(init, 3, 7))
    assert torch.equal(model[1].lora_B, drawn(init, 6, 3))
    assert torch.equal(model[2].lora_A_stack, drawn(init, 3, 3, 5))
    assert not model[0].lora_B.any()
    assert not model[1].lora_A.any()
    assert not model[2].lora_B_stack.any()


def linear(weight: Tensor) -> nn.Sequential:
    """A model of one layer with this weight."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False)).to(
        weight.dtype
    )
    model[0].weight.data.copy_(weight)
    return model


def orthonormal(*size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, dtype=torch.float64))[0]


def test_a_direction_that_is_weak_and_not_zero_is_one_to_start_from() -> None:
    torch.manual_seed(0)
    u = orthonormal(9, 3)
    v = orthonormal(7, 3)
    values = torch.tensor([1, 1e-2, 1e-4], dtype=torch.float64)
    weight = (u * values) @ v.T
    model = linear(weight.float())
    inject_adapters(model, LoRAConfig(r=3, alpha=3, init="pissa"))
    layer: Any = model[0]
    roots = values.sqrt().float()
    torch.testing.assert_close(layer.lora_A.norm(dim=1), roots, rtol=1e-3, atol=0)
    torch.testing.assert_close(layer.lora_B.norm(dim=0), roots, rtol=1e-3, atol=0)


def assert_starts_from_strongest_part(matrix: Tensor, start: Tensor) -> None:
    """Expect the best approximation of rank 2 that there is."""
    size = matrix.norm()
    tail = torch.linalg.svdvals(matrix)[2:].norm()
    torch.testing.assert_close((matrix - start).norm() / size, tail / size)


def test_each_matrix_of_a_layer_starts_from_its_own_strongest_part_however_small() -> (
    None
):
    experts: Any = Experts()
    attention = nn.MultiheadAttention(8, 2)
    sizes = torch.tensor([1.0, 1e-9, 1e4]).view(3, 1, 1)
    stack = experts.stack.data.mul_(sizes).clone()
    projections = attention.in_proj_weight.detach().chunk(3)
    how = LoRAConfig(
        r=2, alpha=2, init="pissa", target_modules=["1"], target_parameters=["stack"]
    )
    model = nn.Sequential(experts, attention)
    inject_adapters(model, how)
    factors = adapter_state_dict(model)
    starts = factors["0.lora_B_stack"] @ factors["0.lora_A_stack"]
    for matrix, start in zip(stack, starts, strict=True):
        assert_starts_from_strongest_part(matrix, start)
    for matrix, part in zip(projections, "qkv", strict=True):
        start = factors[f"1.lora_B_{part}"] @ factors[f"1.lora_A_{part}"]
        assert_starts_from_strongest_part(matrix, start)


def start_of(model: nn.Module) -> Tensor:
    """B A of the one layer, in float32."""
    factors = adapter_state_dict(model)
    return factors["0.lora_B"].float() @ factors["0.lora_A"].float()


@pytest.mark.parametrize(
    ("init", "keep", "tolerance"),
    [("pissa", True, {}), ("olora", False, {"atol": 0.05, "rtol": 0.02})],
)
def test_starts_from_a_half_precision_base_are_those_of_its_values_in_float32(
    init: Any, keep: bool, tolerance: dict[str, float]
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 6).bfloat16()
    half = linear(weight)
    full = linear(weight.float())
    for model in (half, full):
        inject_adapters(model, LoRAConfig(r=2, init=init, autocast_adapter_dtype=keep))
        assert trainable_names(model) == ["0.lora_A", "0.lora_B"]
    torch.testing.assert_close(start_of(half), start_of(full), **tolerance)


@pytest.mark.parametrize(
    ("arguments", "dtype", "factor"),
    [
        ({"use_dora": True}, torch.bfloat16, "0.lora_magnitude"),
        ({"init": "pissa"}, torch.float64, "0.lora_B"),
        ({"init": "olora"}, torch.bfloat16, "0.lora_B"),
    ],
    ids=str,
)
def test_a_base_that_is_loaded_later_is_the_one_it_starts_from_in_every_dtype(
    arguments: Any, dtype: Any, factor: str
) -> None:
    torch.manual_seed(0)
    how = LoRAConfig(r=2, **arguments)
    pretrained = linear(torch.randn(7, 6).to(dtype))
    model = linear(torch.randn(7, 6).to(dtype))
    inject_adapters(model, how)
    inject_adapters(pretrained, how)
    weight = pretrained.get_parameter("0.weight").detach()
    model.load_state_dict({"0.weight": weight})
    assert torch.equal(
        adapter_state_dict(model)[factor], adapter_state_dict(pretrained)[factor]
    )
    x = torch.randn(3, 6).to(dtype)
    assert torch.equal(model(x), nn.functional.linear(x, weight))
    nn.init.normal_(model[0].weight)
    inject_adapters(model, how)  # as a Trainer does before it trains
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight))


@pytest.fixture
def memory_of_nan() -> Iterator[None]:
    """Fill new memory with NaN, as torch does in this mode, where it may hold anything otherwise."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def two_layers(dtype: torch.dtype) -> Any:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)


STARTS: list[tuple[dict[str, Any], str, torch.dtype, torch.dtype]] = [
    ({}, "assign", torch.bfloat16, torch.float32),
    ({"init": "pissa"}, "to_empty", torch.float32, torch.float32),
    ({"use_dora": True}, "assign", torch.bfloat16, torch.float32),
    ({"autocast_adapter_dtype": False}, "to_empty", torch.bfloat16, torch.bfloat16),
]


@pytest.mark.usefixtures("memory_of_nan")
@pytest.mark.parametrize(("arguments", "way", "dtype", "of_adapters"), STARTS)
def test_adapters_start_anew_whatever_memory_held(
    arguments: dict[str, Any], way: str, dtype: torch.dtype, of_adapters: torch.dtype
) -> None:
    base = two_layers(dtype)
    with torch.device("meta"):
        model = two_layers(dtype)
    inject_adapters(model, LoRAConfig(**{"r": 2, **arguments}))
    if way == "to_empty":
        model.to_empty(device="cpu")
        assert model[0].weight.isnan().all()
        for layer in model:
            assert layer.lora_A.isfinite().all()
            assert layer.lora_B.isfinite().all()
    model.load_state_dict(base.state_dict(), assign=way == "assign")
    for layer in model:
        assert len(trainable(layer)) >= 2
        assert layer.lora_A.any(dim=1).all()
    for p in trainable(model):
        assert p.dtype is of_adapters
        assert p.isfinite().all()
    x = torch.randn(3, 8, dtype=dtype)
    assert torch.equal(model(x), base(x))
    model(x).sum().backward()
    for layer in model:
        assert layer.lora_B.grad.any()


def test_a_layer_whose_parameters_are_reset_starts_its_adapter_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    before = model[0].weight.clone()
    model[0].reset_parameters()
    assert not torch.equal(model[0].weight, before)
    assert model[0].lora_A.any()
    assert not model[0].lora_B.any()


def test_pissa_starts_from_the_best_approximation() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 6, dtype=torch.float64)
    model = linear(weight)
    inject_adapters(model, LoRAConfig(r=3, alpha=6, init="pissa"))
    a = model[0].lora_A
    b = model[0].lora_B
    tail = torch.linalg.svdvals(weight)[3:]
    torch.testing.assert_close((weight - 2 * b @ a).norm(), tail.norm())
    # the roots of the singular values, on both sides
    torch.testing.assert_close(a @ a.T, b.T @ b)


def test_olora_starts_from_an_orthonormal_approximation() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 6, dtype=torch.float64)
    model = linear(weight)
    inject_adapters(model, LoRAConfig(r=3, alpha=6, init="olora"))
    a = model[0].lora_A
    b = model[0].lora_B
    torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64))
    # a QR decomposition begins with the first column
    torch.testing.assert_close((b @ a)[:, 0], weight[:, 0])


def nudge(parameter: Tensor) -> None:
    """Move a parameter a thousandth of its size."""
    step = parameter.abs().mean() * 1e-3
    parameter.add_(step * torch.randn_like(parameter))


@torch.no_grad()
def test_small_updates_from_a_start_keep_their_precision_in_half_precision() -> None:
    """The update is a small difference of two large products, which half precision would round away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    inject_adapters(model, LoRAConfig(r=8, init="pissa"))
    layer: Any = model[0]
    x = torch.randn(16, 64)
    nudge(layer.lora_A)
    nudge(layer.lora_B)
    layer.weight.zero_()  # to see the update alone
    now = layer.lora_B.double() @ layer.lora_A.double()
    start = layer.lora_B0.double() @ layer.lora_A0.double()
    with torch.autocast("cpu", torch.bfloat16):
        update = model(x)
    exact = x.double() @ (now - start).T
    assert (update.double() - exact).norm() < 0.02 * exact.norm()
