"""Parts of parameter groups make up what an optimizer of the whole parameters has."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.training.deepspeed import Partition, full_state, local_state
from tests.support.ranks import join_group, run_ranks

VALUES = [torch.tensor([[0.5, -0.0, math.nan], [2.0, -3.0, 4.0]]), torch.tensor(7.0), torch.tensor([8.0])]
"""Of 8 numbers: the first process has 4 of them, and 4 are left for the second."""

PLACES = [[(0, 0, 4), (0, 0, 0), (0, 0, 0)], [(4, 0, 2), (0, 2, 1), (0, 3, 1)]]


def partition_of(rank: int) -> Partition:
    flat = torch.cat([value.reshape(-1) for value in VALUES]).view(2, 4)[rank]
    return Partition([nn.Parameter(value.clone()) for value in VALUES], flat.clone(), PLACES[rank])


def bits(values: list[Tensor]) -> list[list[int]]:
    return [value.reshape(-1).view(torch.int32).tolist() for value in values]


def full() -> tuple[list[list[int]], dict[str, Any]]:
    """The parameters, and the optimizer's state after a step; both come back."""
    join_group()
    partitions = [partition_of(dist.get_rank()), Partition([], torch.zeros(2), [])]
    values = partitions[0].full(partitions[0].local, torch.device("cpu"))
    assert bits([partitions[0].local_of(values)]) == bits([partitions[0].local])
    for partition in partitions:
        partition.local = nn.Parameter(partition.local)
    groups = [{"params": [partition.local], "lr": 0.1 * n} for n, partition in enumerate(partitions)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    partitions[0].local.grad = torch.ones(4)
    optimizer.step()
    state = full_state(partitions, optimizer, torch.device("cpu"))
    found, expected = local_state(partitions, state), optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"])
    return bits(values), state


@pytest.mark.processes
def test_parts_make_up_the_parameters_and_their_optimizers_state() -> None:
    parameters = [nn.Parameter(value) for value in VALUES]
    groups = [{"params": parameters, "lr": 0.0}, {"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    optimizer.param_groups[1]["params"].clear()
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for values, state in run_ranks(full):
        assert values == bits(VALUES) and state["param_groups"] == optimizer.state_dict()["param_groups"]
        torch.testing.assert_close(state["state"], optimizer.state_dict()["state"])


def test_each_parameter_gets_its_own_number_of_steps() -> None:
    first, second, *_ = partition_of(0).full_states({"step": torch.tensor(3.0)}, torch.device("cpu"))
    first["step"] += 1
    assert second["step"] == 3


def test_parameters_without_a_state_start_at_zero() -> None:
    moments = {"step": torch.tensor(2.0), "exp_avg": torch.ones(2, 3)}
    found = partition_of(0).local_state([moments, {}, {"exp_avg": None}])
    assert found["step"] == 2 and found["exp_avg"].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"state": {}, "param_groups": [{"params": [0, 1]}]}, r"its groups have \[2\] parameters, .* have \[3\]"),
        ({"state": {0: {"rows": torch.ones(2)}}, "param_groups": [{"params": [0, 1, 2]}]}, "'rows' has other shapes"),
    ],
)
def test_state_of_other_parameters_is_refused(state: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        local_state([partition_of(0)], state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_follows_what_is_not_itself_rounded(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    part = torch.tensor([1.001, 2.001, 9.0])
    Partition([parameter], part, [(0, 0, 3)]).follow()
    kept = dtype is torch.bfloat16
    assert part.tolist() == torch.tensor([1.001, 2.001, 3.0] if kept else [1.0, 2.0, 3.0]).tolist()
