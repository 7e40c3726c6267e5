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


def test_merging_asks_no_device_for_float64() -> None:
    class Apple(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                assert not (isinstance(tensor, Tensor) and tensor.is_meta and tensor.dtype is torch.float64), func
            return made

    weight, a, b = (torch.empty(size, device="meta") for size in ((600, 1024), (2, 1024), (600, 2)))
    with Apple():
        for dtype in (torch.float32, torch.float16):
            values, lost = update.merged(weight.to(dtype), a, b, 1.0)
            assert values.dtype is dtype
            assert lost == 0


def test_a_higher_rank_than_the_layer_has_is_made_on_its_device() -> None:
    a = torch.empty(8, 4, device="meta")
    b = torch.empty(4, 8, device="meta")
    assert {factor.device.type for factor in with_rank((a, b), 4)} == {"meta"}


def test_merge_says_what_share_of_the_update_rounding_took() -> None:
    dtype = torch.bfloat16
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    inject_adapters(model, LoRAConfig(r=4, alpha=None))
    with torch.no_grad():
        model[0].lora_B.normal_(std=0.1)
        model[1].lora_B.normal_(std=1e-6)
    delta = (model[1].lora_B @ model[1].lora_A).double()
    weight = model[1].weight.double()
    lost = ((weight + delta).to(dtype).double() - weight - delta).norm() / delta.norm()
    assert lost > 0.9
    with pytest.warns(
        MergePrecisionWarning,
        match=rf"{lost:.0%} of the update of '1'.* in 1 of 2 layers.*float32",
    ):
        merge_adapters(model)
    unmerge_adapters(model)
    merge_adapters(model.float())  # in silence


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_is_rounded_once_and_unmerge_exact_in_every_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    inject_adapters(model, LoRAConfig(r=2, alpha=None))
    randomise(model, scale=1.0)
    before = state(model)
    wide = {k: v.double() for k, v in before.items()}
    merge_adapters(model)
    exact = wide["0.weight"] + wide["0.lora_B"] @ wide["0.lora_A"]
    ulp = torch.finfo(dtype).eps * exact.abs()
    wide_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # of the sum before it is rounded
    unrounded = 4 * wide_eps * (exact.abs() + wide["0.lora_B"].abs() @ wide["0.lora_A"].abs())
    assert ((model[0].weight.double() - exact).abs() <= ulp / 2 + unrounded + torch.finfo(dtype).tiny).all()
    unmerge_adapters(model)
    assert_state(model, before)
