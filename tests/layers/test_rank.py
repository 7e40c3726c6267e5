"""A layer smaller than ``r`` gets its largest rank, with the scaling that was asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.layers import Role
from tests.layers.test_kinds import reference
from tests.support.layers import LAYERS, Model, config, factors
from tests.support.models import randomise, same
from tests.support.peft_export import check_read


class Curve(nn.Module):
    """A regression of one variable on one variable."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


X = torch.linspace(-2, 2, 32).view(8, 4, 1)


RANKS = {"net.0": 1, "net.2": 4, "net.4": 1}


def ranks(model: Any) -> dict[str, int]:
    return {name[:-7]: len(a) for name, a in ll.adapter_state_dict(model).items() if name.endswith("lora_A")}


def trained(**arguments: Any) -> Curve:
    model = Curve()
    ll.inject_adapters(model, ll.LoRAConfig(**{"r": 4, **arguments}))
    randomise(model, scale=0.5)
    return model


KINDS = ["linear", "embedding", "bag", "grouped convolution", "transposed convolution", "bilinear", "lstm", "attention"]


@pytest.mark.parametrize("kind", [*KINDS, "experts"])
def test_every_kind_of_layer_takes_a_rank_above_its_sides(kind: str) -> None:
    torch.manual_seed(0)
    build, x = LAYERS[kind]
    model = Model(build()).double()
    ll.inject_adapters(model, config(model, r=64, alpha=96))
    layer: Any = model[0]
    for part in layer.lora_matrices:
        assert getattr(layer, part.parameter(Role.A)).shape[-2] == min(part.reads, part.writes)
    randomise(model)
    output = model(x)
    torch.testing.assert_close(output, reference(model, factors(layer), x))  # with a scaling of 96 / 64
    ll.merge_adapters(model)
    torch.testing.assert_close(model(x), output)
    ll.unmerge_adapters(model)
    assert torch.equal(model(x), output)


@pytest.mark.parametrize(
    ("arguments", "scaling"),
    [
        ({"alpha": None}, 1),
        ({"alpha": 6}, 6 / 4),
        ({"alpha": 6, "use_rslora": True}, 3),
    ],
)
def test_the_scaling_is_that_of_the_rank_that_was_asked(arguments: Any, scaling: float) -> None:
    model = trained(**arguments)
    assert ranks(model) == RANKS
    assert [model.get_submodule(name).lora_settings.scaling for name in RANKS] == 3 * [scaling]  # type: ignore[union-attr]
    assert "r=1, " in repr(model.net[0])


@pytest.mark.parametrize(("init", "use_dora"), [("gaussian", True), ("pissa", False), ("olora", True)])
def test_a_layer_of_one_feature_starts_and_trains_by_every_method(init: Any, use_dora: bool, tmp_path: Path) -> None:
    plain, model = Curve(), Curve()
    ll.inject_adapters(model, ll.LoRAConfig(r=4, init=init, use_dora=use_dora))
    torch.testing.assert_close(model(X), plain(X))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(16):
        nn.functional.mse_loss(model(X), X.sin()).backward()
        optimizer.step()
    output = model(X)
    assert not torch.allclose(output, plain(X))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.load_adapter(plain, tmp_path / "a.safetensors")
    assert torch.equal(plain(X), output)
    ll.merge_adapters(model)
    torch.testing.assert_close(model(X), output)


def test_a_larger_rank_that_gives_the_same_adapters_reads_the_same_file(tmp_path: Path) -> None:
    ll.save_adapter(trained(target_modules=["0", "4"]), tmp_path / "small.safetensors")
    model = trained(target_modules=["0", "4"], r=8, alpha=16)
    ll.load_adapter(model, tmp_path / "small.safetensors")
    assert same(ll.adapter_state_dict(model), ll.adapter_state_dict(trained(target_modules=["0", "4"])))
    ll.save_adapter(trained(alpha=6), tmp_path / "scaled.safetensors")
    with pytest.raises(ll.AdapterMismatchError, match=r"scaling of 1.5 in 'net.0'; here it has r=1, .* of 2 and"):
        ll.load_adapter(trained(), tmp_path / "scaled.safetensors")


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 5, "use_rslora": True, "rank_pattern": {"2": 3}},
        {"alpha": 5, "init": "pissa"},
        {"use_dora": True, "alpha": 7},
    ],
)
def test_peft_computes_the_same_from_an_export(arguments: dict[str, Any], tmp_path: Path) -> None:
    check_read(Curve().net, ll.LoRAConfig(**{"r": 6, **arguments}), lambda model: model(X), tmp_path)
