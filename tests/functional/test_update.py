"""Merging adds the update and is rounded once."""

from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora import (
    LoRAConfig,
    MergePrecisionWarning,
    inject_adapters,
    merge_adapters,
    unmerge_adapters,
)
from lightning_lora.functional import update
from lightning_lora.functional.factors import with_rank
from tests.support.compared import assert_state
from tests.support.models import randomise, state


class Apple(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            assert not is_wide_on_meta(leaf), func
        return made


def is_wide_on_meta(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.is_meta and value.dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_merging_asks_no_device_for_float64(dtype: torch.dtype) -> None:
    weight = torch.empty(600, 1024, device="meta", dtype=dtype)
    a = torch.empty(2, 1024, device="meta")
    b = torch.empty(600, 2, device="meta")
    with Apple():
        values, lost = update.merged(weight, a, b, 1.0)
        assert values.dtype is dtype
        assert lost == 0


def test_a_higher_rank_than_the_layer_has_is_made_on_its_device() -> None:
    a = torch.empty(8, 4, device="meta")
    b = torch.empty(4, 8, device="meta")
    wider_a, wider_b = with_rank((a, b), 4)
    assert wider_a.device.type == "meta"
    assert wider_b.device.type == "meta"


def test_merge_says_what_share_of_the_update_rounding_took() -> None:
    dtype = torch.bfloat16
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    inject_adapters(model, LoRAConfig(r=4, alpha=None))
    nn.init.normal_(model[0].lora_B, std=0.1)
    nn.init.normal_(model[1].lora_B, std=1e-6)
    delta = (model[1].lora_B @ model[1].lora_A).double()
    weight = model[1].weight.double()
    rounded = (weight + delta).to(dtype).double()
    lost = (rounded - weight - delta).norm() / delta.norm()
    assert lost > 0.9
    message = rf"{lost:.0%} of the update of '1'.* in 1 of 2 layers.*float32"
    with pytest.warns(MergePrecisionWarning, match=message):
        merge_adapters(model)
    unmerge_adapters(model)
    merge_adapters(model.float())  # in silence


def rounding_of(exact: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """How far from W + B A it may lie in this dtype, when the sum is rounded once."""
    half_a_step = torch.finfo(dtype).eps * exact.abs() / 2
    eps_of_the_sum = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    of_the_sum = 4 * eps_of_the_sum * (exact.abs() + b.abs() @ a.abs())
    return half_a_step + of_the_sum + torch.finfo(dtype).tiny


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_merge_is_rounded_once_and_unmerge_exact_in_every_dtype(
    dtype: torch.dtype,
) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    inject_adapters(model, LoRAConfig(r=2, alpha=None))
    randomise(model, scale=1.0)
    before = state(model)
    a = before["0.lora_A"].double()
    b = before["0.lora_B"].double()
    exact = before["0.weight"].double() + b @ a
    merge_adapters(model)
    error = (model[0].weight.double() - exact).abs()
    assert (error <= rounding_of(exact, a, b, dtype)).all()
    unmerge_adapters(model)
    assert_state(model, before)
