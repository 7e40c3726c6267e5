"""A kind of one's own that reads a weight as a matrix writes it back in the same way, or is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.layers import LoRALayer
from tests.support.compared import assert_state
from tests.support.models import as_trained, state


class Turned(nn.Module):
    """A linear layer with its weight as (in, out)."""

    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(reads, writes))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class LoRATurned(LoRALayer):
    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        return weight.T


def refuses(kind: Any, layer: nn.Module, message: str) -> None:
    """Expect an error that names the class and the method, and a model that is as it was."""
    own = type("Own", (type(layer),), {})
    ll.register_adapter(own, kind)
    layer.__class__ = own
    model = nn.Sequential(layer)
    before = state(model)
    with pytest.raises(ll.TargetError, match=message):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules="all"))
    assert_state(model, before)
    assert type(model[0]) is own


@pytest.mark.parametrize("shape", [(6, 6), (6, 4)], ids=str)
def test_a_kind_that_reads_a_matrix_and_does_not_write_it_back_is_refused(
    shape: tuple[int, int],
) -> None:
    refuses(
        LoRATurned,
        Turned(*shape),
        r"LoRATurned, .*'0' \(Own\).*lora_as_weight\(lora_as_matrix\(W\), W\) is not W",
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (lambda matrix, weight: matrix, r"has the shape \(4, 6\)"),
        (lambda matrix, weight: matrix.T.reshape(7, 7), "ends in RuntimeError"),
        (lambda matrix, weight: None, r"has the shape \(\)"),
    ],
)
def test_what_is_written_back_has_the_shape_of_the_weight(
    written: Any, message: str
) -> None:
    kind = type("LoRAOwn", (LoRATurned,), {"lora_as_weight": staticmethod(written)})
    refuses(kind, Turned(6, 4), f"LoRAOwn.*{message}")


def test_a_weight_that_is_no_matrix_is_refused_with_what_to_define() -> None:
    layer = Turned(6, 4)
    layer.weight = nn.Parameter(torch.randn(2, 6, 4))
    refuses(
        type("LoRAOwn", (LoRALayer,), {}),
        layer,
        r"LoRAOwn .*\(2, 6, 4\).*Define lora_as_matrix and lora_as_weight",
    )


def test_a_kind_that_writes_back_what_it_reads_is_merged_as_it_computes() -> None:
    back = {"lora_as_weight": staticmethod(lambda matrix, weight: matrix.T)}
    own = type("Own", (Turned,), {})
    ll.register_adapter(own, type("LoRAOwn", (LoRATurned,), back))
    model: Any = as_trained(nn.Sequential(own(6, 6)).double(), target_modules="all")
    x = torch.randn(3, 6).double()
    adapted = model(x)
    ll.merge_adapters(model)
    torch.testing.assert_close(model(x), adapted)


def test_a_mistake_in_a_kind_is_shown_and_not_taken_for_a_computed_weight() -> None:
    class LoRAMistaken(LoRALayer):
        @classmethod
        def lora_matrices_of(cls, layer: Any) -> Any:
            return layer.wieght.shape

    own = type("Own", (Turned,), {})
    ll.register_adapter(own, LoRAMistaken)
    model = nn.Sequential(own(6, 6))
    with pytest.raises(AttributeError, match="'Own' object has no attribute 'wieght'"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules="all"))
