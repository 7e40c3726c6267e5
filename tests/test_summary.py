"""A summary counts groups, parameters and bytes."""

import torch
from rich.console import Console
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters, merge_adapters, summarize
from tests.models import WIDTH, WORDS, TinyLM


def test_summary_counts_groups_and_costs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), *(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 2))
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["4"]))
    summary = summarize(model)
    assert summary.trained == 3 * 2 * (8 + 8) + 8 * 2 + 2
    assert summary.frozen == 80 + 3 * 72
    assert [(group.name, group.layers, group.kind, group.r) for group in summary.groups] == [
        ("*", 1, "Embedding", None), ("*", 3, "Linear", 2), ("*", 1, "Linear", None),
    ]  # fmt: skip
    assert summary.optimizer_bytes == 2 * 4 * summary.trained  # Adam's two moments, fp32
    assert summary.full_optimizer_bytes == 2 * 4 * (80 + 3 * 72 + 18)
    assert summary.checkpoint_bytes == 4 * summary.trained
    assert summary.full_checkpoint_bytes == 4 * (80 + 3 * 72 + 18)


def test_summary_prints_every_layer_of_a_plain_model_too() -> None:
    shown = str(summarize(TinyLM()))
    assert all(name in shown for name in ("embed", "q_proj", "v_proj", "norm")) and "TinyLM is a plain model" in shown
    model = TinyLM()
    inject_adapters(model, LoRAConfig(r=2))
    merge_adapters(model)
    assert "TinyLM is a plain model, with 2 adapters merged into it" in str(summarize(model))


def test_summary_shown_at_the_start_fits_a_terminal() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"encoder": nn.ModuleList()}), "norm": nn.LayerNorm(64)})
    for _ in range(12):
        layer = {"attention": nn.ModuleDict({"self": nn.ModuleDict({"query": nn.Linear(64, 64)})})}
        model["encoder"]["encoder"].append(nn.ModuleDict(layer))  # type: ignore[operator]
    inject_adapters(model, LoRAConfig(r=2))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(summarize(model).table(trained_only=True))
    assert "│ …attention.self.query (×12)" in capture.get() and "│ 1 other layer " in capture.get()
    assert "encoder.encoder.*.attention.self.query (×12)" in str(summarize(model))


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
