"""Several adapters on one base: switching gives exactly what each computes alone, and never touches the base."""

import copy
import pickle
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
HEAD = ll.LoRAConfig(r=2, target_modules=["0", "2"], modules_to_save=["3"])
ONE = ll.LoRAConfig(r=1, target_modules=["2"])


def build() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 3)).eval()


def fill(model: nn.Module) -> Tensor:
    """Write random values into what trains, and return the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return model(X).detach()


def several() -> tuple[nn.Sequential, dict[str | None, Tensor]]:
    """A model with three adapters, "fr" active, and the output of each."""
    model = build()
    outputs: dict[str | None, Tensor] = {None: model(X).detach()}
    for name, config in {"default": HEAD, "de": HEAD, "fr": ONE}.items():
        ll.inject_adapters(model, config, name=name)
        outputs[name] = fill(model)
    return model, outputs


def test_each_adapter_computes_what_it_computed_before_in_any_order() -> None:
    model, outputs = several()
    assert ll.adapters(model) == ("fr", "default", "de")
    for name in ("de", "default", "de", None, "default", "fr", None, "de", "fr", "default", "de", "default"):
        ll.set_adapter(model, name)
        assert torch.equal(model(X), outputs[name]), name


def test_a_with_block_shows_afterwards_what_was_shown_before() -> None:
    model, outputs = several()
    with ll.set_adapter(model, "de"):
        assert torch.equal(model(X), outputs["de"])
        with suppress(KeyError), ll.set_adapter(model, None):
            assert torch.equal(model(X), outputs[None])
            raise KeyError
        assert torch.equal(model(X), outputs["de"])
    assert torch.equal(model(X), outputs["fr"])


def test_a_mistyped_name_is_an_error_with_near_names() -> None:
    model, outputs = several()
    with pytest.raises(ll.AdapterStateError, match=r"no adapter 'defualt'.*Did you mean 'default'"):
        ll.set_adapter(model, "defualt")
    assert torch.equal(model(X), outputs["fr"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("shown", ["de", None])
def test_a_copy_has_all_adapters_and_switches_by_itself(
    copied: Callable[[nn.Module], nn.Module], shown: str | None
) -> None:
    model, outputs = several()
    ll.set_adapter(model, "default")
    ll.set_adapter(model, "de")  # a switch is prepared, with the objects of this model
    ll.set_adapter(model, shown)
    other = copied(model)
    for name in ("default", "de", "fr"):
        ll.set_adapter(other, name)
        assert torch.equal(other(X), outputs[name])
    assert torch.equal(model(X), outputs[shown])
