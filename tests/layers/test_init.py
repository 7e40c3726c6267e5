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


def test_each_word_is_one_object_in_the_table() -> None:
    assert set(get_args(Init)) == INITIALISATIONS.keys()
    assert all(name == each.name for name, each in INITIALISATIONS.items())


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
    for found, size in (
        (model[0].lora_A, (3, 7)),
        (model[1].lora_B, (6, 3)),
        (model[2].lora_A_stack, (3, 3, 5)),
    ):
        drawn = torch.empty(size, dtype=torch.bfloat16)
        bound = size[-1] ** -0.5
        expected = drawn.normal_(std=1 / 3) if init == "gaussian" else drawn.uniform_(-bound, bound)
        assert torch.equal(found, expected)
    assert not any(factor.any() for factor in (model[0].lora_B, model[1].lora_A, model[2].lora_B_stack))


def linear(weight: Tensor) -> nn.Sequential:
    """A model of one layer with this weight."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False)).to(weight.dtype)
    model[0].weight.data.copy_(weight)
    return model


def test_a_direction_that_is_weak_and_not_zero_is_one_to_start_from() -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 3, dtype=torch.float64))[0] for size in (9, 7))
    values = torch.tensor([1, 1e-2, 1e-4], dtype=torch.float64)
    model = linear(((u * values) @ v.T).float())
    inject_adapters(model, LoRAConfig(r=3, alpha=3, init="pissa"))
    for factor, dim in (("lora_A", 1), ("lora_B", 0)):
        torch.testing.assert_close(
            getattr(model[0], factor).norm(dim=dim),
            values.sqrt().float(),
            rtol=1e-3,
            atol=0,
        )


def test_each_matrix_of_a_layer_starts_from_its_own_strongest_part_however_small() -> None:
    model = nn.Sequential(Experts(), nn.MultiheadAttention(8, 2))
    matrices = [*model[0].stack.data.mul_(torch.tensor([1.0, 1e-9, 1e4]).view(3, 1, 1))]
    matrices += model[1].in_proj_weight.detach().chunk(3)
    inject_adapters(
        model,
        LoRAConfig(r=2, alpha=2, init="pissa", target_modules=["1"], target_parameters=["stack"]),
    )
    factors = adapter_state_dict(model)
    starts = [*(factors["0.lora_B_stack"] @ factors["0.lora_A_stack"])]
    starts += [factors[f"1.lora_B_{part}"] @ factors[f"1.lora_A_{part}"] for part in "qkv"]
    for matrix, start in zip(matrices, starts, strict=True):
        tail = torch.linalg.svdvals(matrix)[2:].norm()
        torch.testing.assert_close((matrix - start).norm() / matrix.norm(), tail / matrix.norm())


@pytest.mark.parametrize(("init", "keep"), [("pissa", True), ("olora", False)])
def test_starts_from_a_half_precision_base_are_those_of_its_values_in_float32(init: Any, keep: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 6).bfloat16()
    found = []
    for model in (linear(weight), linear(weight.float())):
        inject_adapters(model, LoRAConfig(r=2, init=init, autocast_adapter_dtype=keep))
        assert [name for name, p in model.named_parameters() if p.requires_grad] == [
            "0.lora_A",
            "0.lora_B",
        ]
        factors = adapter_state_dict(model)
        found.append(factors["0.lora_B"].float() @ factors["0.lora_A"].float())
    torch.testing.assert_close(found[0], found[1], **({} if keep else {"atol": 0.05, "rtol": 0.02}))


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({"use_dora": True}, torch.bfloat16),
        ({"init": "pissa"}, torch.float64),
        ({"init": "olora"}, torch.bfloat16),
    ],
    ids=str,
)
def test_a_base_that_is_loaded_later_is_the_one_it_starts_from_in_every_dtype(arguments: Any, dtype: Any) -> None:
    torch.manual_seed(0)
    pretrained = linear(torch.randn(7, 6).to(dtype))
    model = linear(torch.randn(7, 6).to(dtype))
    for each in (model, pretrained):
        inject_adapters(each, LoRAConfig(r=2, **arguments))
    base = {"0.weight": pretrained.get_parameter("0.weight").detach()}
    model.load_state_dict(base)
    expected = adapter_state_dict(pretrained)
    name = "0.lora_magnitude" if "use_dora" in arguments else "0.lora_B"
    assert torch.equal(adapter_state_dict(model)[name], expected[name])
    x = torch.randn(3, 6).to(dtype)
    assert torch.equal(model(x), nn.functional.linear(x, base["0.weight"]))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(7, 6))
    inject_adapters(model, LoRAConfig(r=2, **arguments))  # as a Trainer does before it trains
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight))


@pytest.fixture
def memory_of_nan() -> Iterator[None]:
    """Fill new memory with NaN, as torch does in this mode, where it may hold anything otherwise."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


STARTS: list[tuple[dict[str, Any], str, torch.dtype]] = [
    ({}, "assign", torch.bfloat16),
    ({"init": "pissa"}, "to_empty", torch.float32),
    ({"use_dora": True}, "assign", torch.bfloat16),
    ({"autocast_adapter_dtype": False}, "to_empty", torch.bfloat16),
]


@pytest.mark.usefixtures("memory_of_nan")
@pytest.mark.parametrize(("arguments", "way", "dtype"), STARTS)
def test_adapters_start_anew_whatever_memory_held(arguments: dict[str, Any], way: str, dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    keeps = "autocast_adapter_dtype" not in arguments
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    inject_adapters(model, LoRAConfig(**({"r": 2} | arguments)))
    if way == "to_empty":
        model.to_empty(device="cpu")
        assert model[0].weight.isnan().all()
        for layer in model:
            assert layer.lora_A.isfinite().all()
            assert layer.lora_B.isfinite().all()
    model.load_state_dict(base.state_dict(), assign=way == "assign")
    for layer in model:
        trained = [p for p in layer.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32 if keeps else dtype}
        assert len(trained) >= 2
        assert all(p.isfinite().all() for p in trained)
        assert layer.lora_A.any(dim=1).all()
    x = torch.randn(3, 8, dtype=dtype)
    assert torch.equal(model(x), base(x))
    model(x).sum().backward()
    assert all(layer.lora_B.grad.any() for layer in model)


def test_a_layer_whose_parameters_are_reset_starts_its_adapter_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    before = model[0].weight.clone()
    model[0].reset_parameters()
    assert not torch.equal(model[0].weight, before)
    assert model[0].lora_A.any()
    assert not model[0].lora_B.any()


def test_pissa_starts_from_the_best_approximation_and_olora_from_an_orthonormal_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 6, dtype=torch.float64)
    for init in ("pissa", "olora"):
        model = linear(weight)
        inject_adapters(model, LoRAConfig(r=3, alpha=6, init=init))
        a = model[0].lora_A
        b = model[0].lora_B
        if init == "pissa":
            tail = torch.linalg.svdvals(weight)[3:]
            torch.testing.assert_close((weight - 2 * b @ a).norm(), tail.norm())
            torch.testing.assert_close(a @ a.T, b.T @ b)  # the roots of the singular values, on both sides
        else:
            torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64))
            torch.testing.assert_close((b @ a)[:, 0], weight[:, 0])  # a QR decomposition begins with the first column


def test_small_updates_from_a_start_keep_their_precision_in_half_precision() -> None:
    """The update is a small difference of two large products, which half precision would round away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    inject_adapters(model, LoRAConfig(r=8, init="pissa"))
    layer: Any = model[0]
    with torch.no_grad():
        for p in (layer.lora_A, layer.lora_B):
            p.add_(p.abs().mean() * 1e-3 * torch.randn_like(p))
        layer.weight.zero_()  # to see the update alone
        x = torch.randn(16, 64)
        a, b, start_a, start_b = (getattr(layer, f"lora_{name}").double() for name in ("A", "B", "A0", "B0"))
        exact = x.double() @ (b @ a - start_b @ start_a).T
        with torch.autocast("cpu", torch.bfloat16):
            update = model(x)
    assert (update.double() - exact).norm() < 0.02 * exact.norm()
