"""Blocks of adapter_names: what they run is known, until they end."""

import pytest
from torch import nn

from lightning_lora import AdapterStateError
from lightning_lora.base.blocks import is_in_block, open_block, refuse_in_block


def test_a_model_is_refused_while_a_block_runs_a_part_of_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    other = nn.Sequential(nn.Linear(2, 2))
    with open_block([model[0]]):
        assert is_in_block(model[0])
        assert not is_in_block(model)
        refuse_in_block(other, "merge_adapters")
        with pytest.raises(
            AdapterStateError,
            match=r"merge_adapters is not possible in a block.*row of Sequential",
        ):
            refuse_in_block(model, "merge_adapters")
    refuse_in_block(model, "merge_adapters")
    assert not is_in_block(model[0])


def test_a_block_in_another_one_ends_for_its_own_modules_alone() -> None:
    first = nn.Linear(2, 2)
    second = nn.Linear(2, 2)
    with open_block([first]):
        with open_block([first, second]):
            assert is_in_block(second)
        assert is_in_block(first)
        assert not is_in_block(second)
