"""Single layers: inputs given by name, tokens that pad, forwards that fail, memory that held anything, dtypes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, inject_adapters
from tests.models import randomise

DROPPED: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], bool]] = {
    "Linear": (lambda: nn.Linear(6, 4), {"input": torch.ones(3, 6)}, False),
    "Linear with DoRA": (lambda: nn.Linear(6, 4), {"input": torch.ones(3, 6)}, True),
    "Conv1D": (lambda: Conv1D(4, 6), {"x": torch.ones(3, 6)}, False),
    "Conv1D with DoRA": (lambda: Conv1D(4, 6), {"x": torch.ones(3, 6)}, True),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 1), {"input": torch.ones(3, 6, 2, 2)}, False),
    "Conv2d with DoRA": (lambda: nn.Conv2d(6, 4, 1), {"input": torch.ones(3, 6, 2, 2)}, True),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 4, 2), {"input": torch.ones(3, 6, 2)}, False),
    "Bilinear": (lambda: nn.Bilinear(6, 5, 4), {"input1": torch.ones(3, 6), "input2": torch.ones(3, 5)}, False),
}


def adapted(layer: nn.Module, **arguments: Any) -> Any:
    """A layer with an update that does something."""
    model = nn.Sequential(layer).double()
    inject_adapters(model, LoRAConfig(**({"r": 2, "target_modules": "all"} | arguments)))
    randomise(model, scale=1)
    return layer


@pytest.mark.parametrize(("build", "named", "use_dora"), DROPPED.values(), ids=DROPPED)
def test_an_input_given_by_name_is_dropped_in_training_as_any_other(
    build: Callable[[], nn.Module], named: dict[str, Tensor], use_dora: bool
) -> None:
    layer, named = adapted(build(), dropout=0.5, use_dora=use_dora), {name: x.double() for name, x in named.items()}
    torch.manual_seed(1)
    expected = layer(*named.values())
    torch.manual_seed(1)
    dropped = layer(**named)
    assert torch.equal(dropped, expected)
    layer.eval()
    assert not torch.allclose(dropped, layer(**named))
    assert torch.equal(layer(**named), layer(*named.values()))


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


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (2, 4, 3, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (2, 4)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), (2, 4)),
}


@pytest.mark.parametrize(("build", "wrong"), NORMS.values(), ids=NORMS)
def test_a_frozen_norm_is_in_its_own_mode_after_a_forward_that_fails(
    build: Callable[[], nn.Module], wrong: tuple[int, ...]
) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "norm": build()})
    inject_adapters(model, LoRAConfig(r=2))
    for training in (True, False):
        model.train(training)
        with pytest.raises(ValueError, match="expected"):
            model["norm"](torch.ones(wrong))
        assert model["norm"].training is training


# Memory that held anything


@pytest.fixture
def memory_of_nan() -> Iterator[None]:
    """Fill new memory with NaN, as torch does in this mode, where it may hold anything otherwise."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


STARTS: dict[str, dict[str, Any]] = {
    "kaiming": {},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "dora": {"use_dora": True},
    "rounded": {"autocast_adapter_dtype": False},
}


@pytest.mark.usefixtures("memory_of_nan")
@pytest.mark.parametrize("arguments", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("way", ["to_empty", "assign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_start_anew_whatever_memory_held(arguments: dict[str, Any], way: str, dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    inject_adapters(model, LoRAConfig(**({"r": 2} | arguments)))
    if way == "to_empty":
        model.to_empty(device="cpu")
        assert model[0].weight.isnan().all()
        for layer in model:
            assert layer.lora_A.isfinite().all() and layer.lora_B.isfinite().all()
    model.load_state_dict(base.state_dict(), assign=way == "assign")
    for layer in model:
        trained = [p for p in layer.parameters() if p.requires_grad]
        assert len(trained) >= 2 and all(p.isfinite().all() for p in trained)
        assert layer.lora_A.any(dim=1).all()
    x = torch.randn(3, 8, dtype=dtype)
    assert torch.equal(model(x), base(x))
    model(x).sum().backward()
    assert all(layer.lora_B.grad.any() for layer in model)


@pytest.mark.usefixtures("memory_of_nan")
def test_an_embedding_without_memory_starts_anew_the_other_way_round() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(6, 4))
    inject_adapters(model, LoRAConfig(r=2, target_modules="all"))
    model.to_empty(device="cpu")
    assert not model[0].lora_A.any() and model[0].lora_B.isfinite().all() and model[0].lora_B.any(dim=0).all()


# What a quantised layer computes in


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_four_bits_have_the_dtype_that_the_layer_computes_in(
    compute: torch.dtype | None, stored: torch.dtype
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, compute_dtype=compute).to(stored))
    assert model.to("cpu")[0].weight.dtype is torch.uint8  # which is when it is quantised
    inject_adapters(model, LoRAConfig(r=2, autocast_adapter_dtype=False))
    assert {model[0].lora_A.dtype, model[0].lora_B.dtype} == {compute or stored}


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_of_eight_bits_are_half_precision_or_kept_in_full(autocast: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)).to("cpu")
    inject_adapters(model, LoRAConfig(r=2, autocast_adapter_dtype=autocast))
    assert model[0].lora_A.dtype is model[0].lora_B.dtype is (torch.float32 if autocast else torch.float16)
