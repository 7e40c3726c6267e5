"""A summary counts groups, parameters and bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from rich.console import Console
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    inject_adapters,
    merge_adapters,
    summarize,
)
from lightning_lora.summary import LoRASummary
from lightning_lora.training.compatibility import about_lightnings_table
from tests.support.messages import assert_in_text
from tests.support.models import LitTiny, TinyLM, aged, data, trainer
from tests.support.parameters import bytes_of, count_of, trainable


def normed() -> nn.Module:
    """A model with buffers, one of which no checkpoint holds."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].register_buffer("table", torch.ones(100), persistent=False)
    return model


def three_layers() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 2))


def not_tied() -> nn.Module:
    return TinyLM(tied=False)


COUNTED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (three_layers, {"modules_to_save": ["2"]}),
    "tied": (TinyLM, {"target_modules": ["q_proj"]}),
    "not tied": (not_tied, {"target_modules": ["q_proj"]}),
    "tied, and trained whole": (
        TinyLM,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed"]},
    ),
    "buffers": (normed, {}),
}


@pytest.mark.parametrize(("build", "config"), COUNTED.values(), ids=COUNTED)
def test_summary_counts_what_trains_and_what_it_costs(
    build: Callable[[], nn.Module], config: dict[str, Any]
) -> None:
    model = build()
    # a tied weight once
    stored = {value.data_ptr(): value.nbytes for value in model.state_dict().values()}
    parameters = count_of(model.parameters())
    inject_adapters(model, LoRAConfig(r=2, **config))
    summary = summarize(model)
    assert summary.trained == count_of(trainable(model))
    assert summary.frozen == count_of(model.parameters()) - summary.trained
    assert summary.share == summary.trained / count_of(model.parameters())
    # Adam's two moments, fp32
    assert summary.optimizer_bytes == 2 * 4 * summary.trained
    # buffers as the base has them are not stored
    assert summary.checkpoint_bytes == 4 * summary.trained
    assert summary.full_optimizer_bytes == 2 * 4 * parameters
    assert summary.full_checkpoint_bytes == sum(stored.values())


def test_summary_prints_every_layer_of_a_plain_model_too() -> None:
    shown = str(summarize(TinyLM()))
    assert_in_text(["embed", "q_proj", "v_proj", "norm"], shown)
    assert "TinyLM is a plain model" in shown
    model = TinyLM()
    inject_adapters(model, LoRAConfig(r=2))
    merge_adapters(model)
    assert "TinyLM is a plain model, with 2 adapters merged into it" in str(
        summarize(model)
    )


def test_what_looks_untrained_counts_in_a_checkpoint_and_is_judged_anew_in_a_fit() -> (
    None
):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 16))
    inject_adapters(model, LoRAConfig(r=2, target_modules=["0"]))
    # of most layers, it is no sign
    assert summarize(model).checkpoint_bytes == 4 * 2 * 2 * 64
    aged(model[:2])
    size = summarize(model).checkpoint_bytes
    assert (
        size
        == bytes_of(adapter_state_dict(model).values())
        == 4 * (2 * 2 * 64 + 65 * 16)
    )


class Block(nn.Module):
    """A block as in torchvision's ViT: attention, and an nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(8, 2)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Stacks(nn.Module):
    """Blocks with numbers as names, at the end of names, and in an nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"encoder_layer_{i}": Block() for i in range(12)})
        self.layer0 = Block()
        self.layer1 = Block()
        self.chain = nn.Sequential(Block(), Block())
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))


def printed(summary: LoRASummary, width: int, **kwargs: Any) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(summary.table(**kwargs))
    return capture.get()


def rows_of(table: str) -> list[list[str]]:
    """The cells of each row of a printed table, without its head."""
    rows = []
    for line in table.splitlines():
        if "│" in line:
            _, *cells, _ = line.split("│")
            rows.append([cell.strip() for cell in cells])
    return rows


def first_cells(table: str) -> list[str]:
    return [row[0] for row in rows_of(table)]


def test_blocks_are_one_row_and_different_layers_are_several() -> None:
    model = Stacks()
    inject_adapters(model, LoRAConfig(r=2))
    groups = {group.name: group for group in summarize(model).groups}
    layers = {name: group.layers for name, group in groups.items()}
    assert layers == {
        "blocks.encoder_layer_*.self_attention": 12, "blocks.encoder_layer_*.mlp.0": 12,
        "blocks.encoder_layer_*.mlp.2": 12, "layer*.self_attention": 2, "layer*.mlp.0": 2, "layer*.mlp.2": 2,
        "chain.*.self_attention": 2, "chain.*.mlp.0": 2, "chain.*.mlp.2": 2, "fc1": 1, "fc2": 1,
        "heads.0": 1, "heads.1": 1, "heads.2": 1,
    }  # fmt: skip
    assert groups["layer*.self_attention"].parts == ("q", "k", "v", "out")
    assert groups["layer*.self_attention"].kind == "MultiheadAttention"
    assert groups["fc1"].kind == "Linear"


def test_rows_fit_a_terminal_and_hold_whole_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.ModuleDict({"network": Stacks(), "norm": nn.LayerNorm(8)})
    inject_adapters(model, LoRAConfig(r=2))
    # as in logs, which are wide
    assert "network.blocks.encoder_layer_*.self_attention " in str(summarize(model))
    monkeypatch.setenv("COLUMNS", "44")
    assert_fits(str(summarize(model)), 44)
    of_a_fit = printed(summarize(model), 44, trained_only=True)
    assert_fits(of_a_fit, 44)
    assert "network.heads.21otherlayer" in names_in(of_a_fit)
    assert "1,536" in of_a_fit


def assert_fits(table: str, width: int) -> None:
    longest = max(len(line) for line in table.splitlines())
    assert longest <= width
    assert (
        "network.blocks.encoder_layer_*.self_attention[q,k,v,out](×12)network.blocks"
        in names_in(table)
    )


def names_in(table: str) -> str:
    """All names of a table, though broken over lines."""
    return "".join(first_cells(table)).replace(" ", "")


def test_names_break_behind_dots() -> None:
    model = nn.ModuleDict({"first": nn.ModuleDict({"second_part": nn.Linear(8, 8)})})
    inject_adapters(model, LoRAConfig(r=2))
    names = first_cells(printed(summarize(model), 52))
    assert names[:2] == ["first.", "second_part"]


def test_a_fit_shows_the_fifteen_rows_that_train_most_and_counts_the_others() -> None:
    names = [f"layer_{letter}" for letter in "abcdefghijklmnopqrst"]
    model = nn.ModuleDict()
    for width, name in enumerate(names, start=4):
        model[name] = nn.Linear(8, width)
    model["norm"] = nn.LayerNorm(8)
    inject_adapters(model, LoRAConfig(r=2))
    rows = rows_of(printed(summarize(model), 120, trained_only=True))
    shown = [row[0] for row in rows[:15]]
    assert shown == names[5:]
    widths = (4, 5, 6, 7, 8)  # of the five that are not shown
    trained = sum(2 * (8 + width) for width in widths)
    frozen = sum(9 * width for width in widths) + 16  # with biases, and with the norm
    assert rows[15] == [
        "6 other layers: lightning_lora.summarize(model)",
        "",
        "–",
        f"{trained}",
        f"{frozen}",
    ]
    assert rows[16][0] == "Total"
    assert_in_text([*names, "norm"], str(summarize(model)))


class WithSGD(LitTiny):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def shown_by_a_fit(
    model: LitTiny, folder: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """What a fit prints before it begins."""
    trainer(folder, [LoRACallback(r=6)], max_epochs=1, enable_model_summary=True).fit(
        model, data()
    )
    shown = capsys.readouterr().out
    assert "q_proj" in shown
    assert f"LoRA: {type(model).__name__} trains" in shown
    assert "full fine-tuning" in shown
    assert "Weights in a checkpoint" in shown
    assert "Adam" not in str(summarize(model))
    return shown


def test_a_fit_names_its_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "State of AdamW" in shown_by_a_fit(LitTiny(), tmp_path, capsys)


def test_a_fit_with_an_optimizer_without_state_says_nothing_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = shown_by_a_fit(WithSGD(), tmp_path, capsys)
    assert "State of" not in shown
    assert "moments" not in shown


def test_a_fit_without_a_summary_shows_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, [LoRACallback(r=6)], max_epochs=1).fit(LitTiny(), data())
    assert "LoRA" not in capsys.readouterr().out


def test_a_fit_says_what_lightnings_own_table_is_where_it_shows_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    note = (
        "In Lightning's own table (ModelSummary(0) hides it), LoRALinear is a Linear "
        "with its adapter."
    )
    for callbacks, is_said in (
        ([], True),
        ([RichModelSummary(2)], True),
        ([ModelSummary(0)], False),
    ):
        run = trainer(
            tmp_path,
            [LoRACallback(r=6), *callbacks],
            max_epochs=1,
            enable_model_summary=True,
        )
        run.fit(LitTiny(), data())
        shown = " ".join(capsys.readouterr().out.split())
        assert "Weights in a checkpoint" in shown
        assert (note in shown) == is_said
        assert ("LoRALinear │" in shown) == is_said


@pytest.mark.parametrize(("depth", "notes"), [(1, 0), (2, 1), (-1, 1)])
def test_only_classes_that_lightnings_table_has_are_explained(
    depth: int, notes: int
) -> None:
    inside = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = LitTiny()
    model.inside = inside
    for name in ("q_proj", "v_proj", "head"):
        delattr(model, name)
    inject_adapters(model, LoRAConfig(r=2))
    run = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[ModelSummary(depth)],
        enable_checkpointing=False,
    )
    run.strategy.connect(model)
    said = list(map(str, about_lightnings_table(run)))
    assert len(said) == notes
    if said:
        assert (
            "LoRALinear is a Linear with its adapter, and FrozenBatchNorm1d is a "
            "BatchNorm1d that keeps" in said[0]
        )


def test_the_table_shows_the_ranks_that_a_layer_has() -> None:
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(1, 16, bidirectional=True),
            "attention": nn.MultiheadAttention(2, 1),
        }
    )
    model.update(
        {"body": nn.Linear(16, 16), "heads": nn.ModuleList([nn.Linear(16, 1)])}
    )
    inject_adapters(model, LoRAConfig(r=4, target_modules="all"))
    ranks = {group.name: group.r for group in summarize(model).groups}
    assert ranks == {"lstm": "1–4", "attention": "2", "body": "4", "heads.0": "1"}
    assert "lstm [4 matrices] " in str(summarize(model))
    assert "attention [q,k,v,out] " in str(summarize(model))


def test_integers_would_train_as_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model.register_parameter(
        "codes", nn.Parameter(torch.zeros(10, dtype=torch.int8), requires_grad=False)
    )
    full_bytes = 4 * (16 + 10)
    assert summarize(model).full_optimizer_bytes == 2 * full_bytes
