"""What a summary says of memory: bytes of tied weights and of buffers."""

import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters, summarize
from tests.models import WIDTH, WORDS, TinyLM


def stored_bytes(model: nn.Module) -> int:
    """What a checkpoint of a model holds: every tensor of its state, a tied one once."""
    return sum({value.data_ptr(): value.nbytes for value in model.state_dict().values()}.values())


def test_a_tied_weight_is_counted_once_in_what_full_fine_tuning_costs() -> None:
    tied, untied = TinyLM(), TinyLM(tied=False)
    full = stored_bytes(tied)
    for model in (tied, untied):
        inject_adapters(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    assert summarize(tied).full_checkpoint_bytes == full
    assert summarize(tied).full_optimizer_bytes == 2 * full
    assert summarize(untied).full_checkpoint_bytes == full + 4 * WORDS * WIDTH
    assert summarize(untied).full_optimizer_bytes == 2 * (full + 4 * WORDS * WIDTH)


def test_buffers_are_in_a_full_checkpoint_and_have_no_optimizer_state() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    full = stored_bytes(model)
    assert full == 4 * (16 + 4 + 4 + 4) + (4 * 4 + 4 * 4 + 8)  # parameters; two statistics and a count
    inject_adapters(model, LoRAConfig(r=2))
    assert summarize(model).full_checkpoint_bytes == full
    assert summarize(model).full_optimizer_bytes == 2 * 4 * (16 + 4 + 4 + 4)
    assert summarize(model).checkpoint_bytes == 4 * 2 * (4 + 4)  # buffers as the base has them are not stored


def test_a_buffer_that_no_checkpoint_holds_is_not_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    full = stored_bytes(model)
    model[0].register_buffer("table", torch.ones(100), persistent=False)
    inject_adapters(model, LoRAConfig(r=2))
    assert summarize(model).full_checkpoint_bytes == full


def test_a_tied_weight_that_trains_whole_is_counted_once() -> None:
    """As a file of torch's stores it."""
    model = TinyLM()
    inject_adapters(model, LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed"]))
    summary = summarize(model)
    assert summary.trained == 2 * (WIDTH + WIDTH) + WORDS * WIDTH
    assert summary.optimizer_bytes == 2 * 4 * summary.trained
    assert summary.checkpoint_bytes == 4 * summary.trained
