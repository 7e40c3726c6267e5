"""Adapted encoders compute the same in every mode."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import AdapterStateError, LoRAConfig, inject_adapters, merge_adapters, remove_adapters
from tests.support.layers import config
from tests.support.model import as_trained
from tests.support.models import randomise


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["1.linear1"], ["0.linear2"]])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_are_adapted_in_eval_and_inference_mode(targets: Any, norm_first: bool, padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).double()
    x = torch.randn(3, 5, 8, dtype=torch.double)
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]]) if padded else None
    kept = ~padding if padding is not None else slice(None)
    base = model(x, src_key_padding_mask=padding)[kept]
    as_trained(model, target_modules=targets)
    expected = model(x, src_key_padding_mask=padding)[kept]
    assert not torch.allclose(expected, base)
    model.eval()
    torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)
    merge_adapters(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def switches(model: nn.TransformerEncoder) -> list[Any]:
    return [*(layer.activation_relu_or_gelu for layer in model.layers), model.use_nested_tensor]


def test_an_encoder_that_was_adapted_twice_has_its_own_inference_path_again() -> None:
    model = encoder()
    own = switches(model)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["linear1"]))
    inject_adapters(model, LoRAConfig(r=2, target_modules=["linear1", "linear2"]))
    remove_adapters(model)
    assert switches(model) == own == [1, 1, True]


def test_an_encoder_that_was_adapted_with_its_part_has_its_own_inference_path_again() -> None:
    model, config = encoder(), LoRAConfig(r=2, target_modules=["linear1"])
    own = switches(model)
    inject_adapters(model.layers[0], config)
    inject_adapters(model, config)
    remove_adapters(model)
    assert switches(model) == own


UNDERMINED: dict[str, Any] = {
    "prune": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "old weight norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral norm": lambda layer: nn.utils.parametrizations.spectral_norm(layer),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("undermine", UNDERMINED.values(), ids=UNDERMINED)
def test_weight_that_is_computed_since_injection_is_not_merged_or_given_back(undermine: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, config(model))
    randomise(model)
    undermine(model[0])
    adapted = model.eval()(torch.ones(8))
    for call in (merge_adapters, remove_adapters):
        with pytest.raises(AdapterStateError, match=r"weight of '0' of Sequential is computed"):
            call(model)
    assert torch.equal(model(torch.ones(8)), adapted)
