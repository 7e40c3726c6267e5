"""Merging adds the update and is rounded once; combinations of updates are those of the full products."""

from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora import LoRAConfig, MergePrecisionWarning, inject_adapters, merge_adapters, unmerge_adapters
from lightning_lora.functional import update
from lightning_lora.functional.combine import Factors, concatenated, dare, factored, ties, truncated
from lightning_lora.functional.subspace import directions, effective_rank, norm, subspace_similarity
from tests.support.models import randomise, same, state


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
            assert values.dtype is dtype and lost == 0


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_merge_says_what_share_of_the_update_rounding_took(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    inject_adapters(model, LoRAConfig(r=4, alpha=None))
    with torch.no_grad():
        model[0].lora_B.normal_(std=0.1)
        model[1].lora_B.normal_(std=1e-6)
    delta = (model[1].lora_B @ model[1].lora_A).double()
    weight = model[1].weight.double()
    lost = ((weight + delta).to(dtype).double() - weight - delta).norm() / delta.norm()
    assert lost > 0.9
    with pytest.warns(MergePrecisionWarning, match=rf"{lost:.0%} of the update of '1'.* in 1 of 2 layers.*float32"):
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
    assert same(state(model), before)


# Combinations of updates, and numbers about them, against the full products


def factors(seed: int, r: int = 3, stack: tuple[int, ...] = ()) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*stack, r, 7, generator=generator), torch.randn(*stack, 5, r, generator=generator)


def updates(stack: tuple[int, ...] = ()) -> list[Factors]:
    return [factors(seed, r, stack) for seed, r in enumerate((2, 3))]


def weighted(found: list[Factors], weights: list[float]) -> Tensor:
    total: Tensor = sum(w * (b @ a) for (a, b), w in zip(found, weights, strict=True))  # type: ignore[assignment]
    return total


@pytest.mark.parametrize("stack", [(), (4,)])
def test_the_concatenation_is_the_sum(stack: tuple[int, ...]) -> None:
    a, b = concatenated(updates(stack), [0.7, -0.3])
    assert a.shape[-2] == 5
    torch.testing.assert_close(b @ a, weighted(updates(stack), [0.7, -0.3]))


@pytest.mark.parametrize("stack", [(), (4,)])
@pytest.mark.parametrize("r", [1, 2, 4, 5, 9])
def test_the_truncation_is_the_best_one(r: int, stack: tuple[int, ...]) -> None:
    whole = concatenated(updates(stack), [0.7, 0.3])
    a, b = truncated(whole, r)
    u, s, v = torch.linalg.svd(whole[1] @ whole[0], full_matrices=False)
    best = (u[..., :r] * s[..., :r].unsqueeze(-2)) @ v[..., :r, :]
    assert a.shape[-2] <= r
    torch.testing.assert_close(b @ a, best, rtol=1e-4, atol=1e-4)


def test_a_matrix_of_low_rank_is_factored_exactly() -> None:
    delta = weighted(updates(), [1.0, 1.0])
    a, b = factored(delta, 5)
    torch.testing.assert_close(b @ a, delta, rtol=1e-4, atol=1e-4)


def test_ties_keeps_the_largest_and_the_sign_of_most() -> None:
    one, other = torch.tensor([4.0, -3.0, 0.1, 2.0]), torch.tensor([-1.0, -5.0, 0.2, 3.0])
    assert ties([one, other], [1.0, 1.0], density=0.5).tolist() == [4.0, -4.0, 0.0, 3.0]
    assert ties([one, other], [1.0, 0.0], density=1.0).tolist() == pytest.approx(one.tolist())


def test_dare_keeps_the_expected_sum() -> None:
    one, other = torch.full((200, 200), 2.0), torch.full((200, 200), -1.0)
    total = dare([one, other], [0.5, 1.0], 0.25, torch.Generator().manual_seed(0))
    assert set(total.unique().tolist()) == {-4.0, 0.0, 4.0} and abs(total.mean()) < 0.05
    again = dare([one, other], [0.5, 1.0], 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(total, again)
    assert torch.equal(dare([one, other], [0.5, 1.0], 1.0, torch.Generator()), one * 0.5 + other)


@pytest.mark.parametrize("stack", [(), (4,)])
@pytest.mark.parametrize("r", [1, 3, 6])
def test_directions_are_those_of_the_product(r: int, stack: tuple[int, ...]) -> None:
    a, b = factors(0, r, stack)
    product = (b @ a).double()
    u, sizes, v = directions((a, b))
    torch.testing.assert_close(sizes, torch.linalg.svdvals(product)[..., : min(r, 5)], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(u @ torch.diag_embed(sizes) @ v.mT, product, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm((a, b)), torch.linalg.matrix_norm(product), rtol=1e-5, atol=1e-5)


def test_directions_of_size_zero_are_zeros() -> None:
    a, b = factors(0, 3)
    b[:, 2] = b[:, 1]
    u, _, v = directions((a, b))
    assert u[:, :2].norm(dim=0) == pytest.approx([1, 1]) and not u[:, 2].any() and not v[:, 2].any()
    u, sizes, v = directions((a, 0 * b))
    assert not u.any() and not sizes.any() and not v.any()


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.tensor([1.0, 1.0, 1.0, 1.0])) == pytest.approx(4)
    assert effective_rank(torch.tensor([1.0, 1e-9])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    half = effective_rank(torch.tensor([3.0, 1.0]))  # the entropy of 3/4 and 1/4
    assert half == pytest.approx(4 / 3**0.75)


def test_similarity_is_one_inside_and_zero_across() -> None:
    a, _ = factors(0)
    assert subspace_similarity(a, torch.randn(3, 3) @ a)[-1, -1] == pytest.approx(1)
    assert subspace_similarity(a[:1], a)[-1, -1] == pytest.approx(1)
    identity = torch.eye(7)
    assert subspace_similarity(identity[:3], identity[3:])[-1, -1] == pytest.approx(0)
    assert subspace_similarity(identity[:2], identity[1:3])[-1, -1] == pytest.approx(0.5)
    assert not subspace_similarity(a, torch.zeros_like(a)).any()


@pytest.mark.parametrize("stack", [(), (4,)])
def test_similarity_is_equation_4_of_the_paper_for_all_i_and_j(stack: tuple[int, ...]) -> None:
    a, other = factors(0, 3, stack)[0], factors(1, 4, stack)[0]
    grid = subspace_similarity(a, other)
    first, second = (torch.linalg.svd(matrix.double()).Vh.mT for matrix in (a, other))
    for i in range(1, 4):
        for j in range(1, 5):
            overlap = first[..., :i].mT @ second[..., :j]
            torch.testing.assert_close(grid[..., i - 1, j - 1], overlap.square().sum((-2, -1)) / min(i, j))
