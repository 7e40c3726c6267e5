"""Pictures show the numbers that runs logged."""

import csv
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from lightning.pytorch.loggers import CSVLogger
from matplotlib import pyplot
from torch import nn

import lightning_lora as ll
from lightning_lora import LoRAMonitor
from lightning_lora.plots import plot_layers, plot_losses
from tests.support.models import LitTiny, data, lora, trainer

mpl.use("agg")


@pytest.fixture(autouse=True)
def _closes_figures() -> Any:
    yield
    pyplot.close("all")


@pytest.fixture
def run(tmp_path: Path) -> CSVLogger:
    """A run with a monitor."""
    logger = CSVLogger(tmp_path, name="run")
    callbacks = [lora(merge=False), LoRAMonitor(2, per_layer=True)]
    trainer(tmp_path, callbacks, logger=logger, log_every_n_steps=1, max_steps=6).fit(
        LitTiny(), data()
    )
    return logger


def logged_by(logger: CSVLogger, metric: str) -> list[dict[str, str]]:
    """The rows of its file that have this metric."""
    text = Path(logger.log_dir, "metrics.csv").read_text()
    found = []
    for row in csv.DictReader(text.splitlines()):
        if row[metric]:
            found.append(row)
    return found


def texts_of(artists: Any) -> list[str]:
    return [artist.get_text() for artist in artists]


def numbers_in(ax: Any) -> list[list[float]]:
    """Those of a heat map, and -1 where it has none."""
    (image,) = ax.images
    shown: list[list[float]] = image.get_array().filled(-1).tolist()
    return shown


def written(folder: Path, **columns: list[Any]) -> Path:
    """A metrics.csv with these columns."""
    folder.mkdir(parents=True)
    path = folder / "metrics.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


# The lines of plot_losses


def test_a_line_has_the_steps_and_values_that_were_logged(run: CSVLogger) -> None:
    _, ax = plot_losses({"tiny": run.log_dir}, "lora/update_norm")
    (line,) = ax.lines
    logged = logged_by(run, "lora/update_norm")
    assert len(logged) > 3
    for row, step, value in zip(
        logged, line.get_xdata(), line.get_ydata(), strict=True
    ):
        assert step == int(row["step"])
        assert value == float(row["lora/update_norm"])
    assert ax.get_ylabel() == "lora/update_norm"


def test_each_run_is_a_line_with_its_name(tmp_path: Path) -> None:
    runs = {
        "one": written(tmp_path / "a", step=[3, 4, 7], val_loss=[2, "", 1]),
        "two": written(tmp_path / "b", step=[3, 7], val_loss=[4, 3]).parent,
    }
    figure, ax = plot_losses(runs)
    one, two = ax.lines
    assert list(one.get_xdata()) == [3, 7]
    assert list(one.get_ydata()) == [2, 1]
    assert list(two.get_ydata()) == [4, 3]
    assert texts_of(ax.get_legend().get_texts()) == ["one", "two"]
    assert plot_losses(runs, ax=ax) == (figure, ax)
    assert len(ax.lines) == 4


@pytest.mark.parametrize("kind", [str, Path])
def test_a_single_run_needs_no_name(tmp_path: Path, kind: Any) -> None:
    written(tmp_path / "a", step=[3, 7], val_loss=[2, 1])
    run = kind(tmp_path / "a")
    _, ax = plot_losses(run)
    assert list(ax.lines[0].get_ydata()) == [2, 1]
    assert texts_of(ax.get_legend().get_texts()) == [str(run)]


@pytest.mark.parametrize("runs", [["a", "b"], {"a"}, None, {}])
def test_runs_that_are_neither_one_nor_named_are_refused(runs: Any) -> None:
    with pytest.raises(ll.ConfigError, match=r"Expected a dict of names and runs"):
        plot_losses(runs)


def test_a_window_gives_means_up_to_each_value(tmp_path: Path) -> None:
    run = written(tmp_path / "a", step=[0, 1, 2, 3], train_loss=[4, 2, 3, 1])
    _, ax = plot_losses({"a": run}, "train_loss", window=2)
    assert list(ax.lines[0].get_ydata()) == [4, 3, 2.5, 2]
    assert ax.get_ylabel() == "train_loss (mean of 2)"


def test_the_newest_version_of_a_folder_counts(tmp_path: Path) -> None:
    # which is written last says nothing: a copied folder has other times
    for version in (10, 9):
        written(tmp_path / f"version_{version}", step=[0], val_loss=[version])
    _, ax = plot_losses({"a": tmp_path})
    assert list(ax.lines[0].get_ydata()) == [10]


# The heat maps of plot_layers


def test_each_layer_has_its_last_numbers(run: CSVLogger) -> None:
    figure, axes = plot_layers(Path(run.save_dir) / "run")
    last = logged_by(run, "lora/update_norm")[-1]
    for ax, metric in zip(axes, ("update_norm", "effective_rank"), strict=True):
        (numbers,) = numbers_in(ax)
        shown = dict(zip(texts_of(ax.get_xticklabels()), numbers, strict=True))
        logged = {}
        for name, value in last.items():
            if name.startswith(f"lora/{metric}/"):
                logged[name.rpartition("/")[2]] = float(value)
        assert shown == logged
        assert len(shown) >= 2
    assert figure.get_suptitle().endswith(f"step {last['step']}")


def test_rows_are_blocks_in_their_order_and_columns_are_matrices(
    tmp_path: Path,
) -> None:
    columns: dict[str, list[Any]] = {"step": [5]}
    logged = {"0.mlp.up": 1, "0.q": 2, "2.q": 3, "10.q": 4, "10.mlp.up": 5}
    for name, value in logged.items():
        columns[f"lora/update_norm/model.layers.{name}"] = [value]
        columns[f"lora/effective_rank/model.layers.{name}"] = [value + 1]
    _, (norms, ranks) = plot_layers(written(tmp_path / "a", **columns))
    assert (
        texts_of(norms.get_xticklabels())
        == texts_of(ranks.get_xticklabels())
        == ["mlp.up", "q"]
    )
    assert texts_of(norms.get_yticklabels()) == ["0", "2", "10"]
    assert numbers_in(norms) == [[1, 2], [-1, 3], [5, 4]]
    assert numbers_in(ranks) == [[2, 3], [-1, 4], [6, 5]]
    assert texts_of(ranks.texts) == ["2.0", "3.0", "", "4.0", "6.0", "5.0"]


@pytest.mark.parametrize(
    ("names", "rows", "columns"),
    [
        (["body.0", "body.2"], [], ["body.0", "body.2"]),
        (["net.body.0", "net.body.2"], [], ["body.0", "body.2"]),
        (["0", "2"], [], ["0", "2"]),
        (["body.0", "classifier"], [], ["body.0", "classifier"]),
        (["up", "down"], [], ["up", "down"]),
        (
            ["layers.0.1", "layers.1.1", "layers.1.3"],
            ["0", "1"],
            ["layers.*.1", "layers.*.3"],
        ),
        (["layers.0.mlp.1", "layers.0.mlp.3"], ["0"], ["mlp.1", "mlp.3"]),
    ],
)
def test_a_column_is_never_a_number_alone_if_its_layer_has_a_longer_name(
    tmp_path: Path, names: list[str], rows: list[str], columns: list[str]
) -> None:
    logged: dict[str, list[Any]] = {"step": [5]}
    for name in names:
        logged[f"lora/update_norm/{name}"] = [1]
        logged[f"lora/effective_rank/{name}"] = [1]
    figure, axes = plot_layers(written(tmp_path / "a", **logged))
    for ax in axes:
        assert texts_of(ax.get_xticklabels()) == columns
        assert texts_of(ax.get_yticklabels()) == rows
        assert ax.get_ylabel() == ("block" if rows else "")
    width, height = figure.get_size_inches()
    assert width >= 8
    assert height >= 3


@pytest.mark.parametrize(
    ("norms", "shown"),
    [
        ([0.003, 1.8, 0.52], ["0.00", "1.80", "0.52"]),
        ([0.0101, 0.02], ["0.0101", "0.0200"]),
        ([250, 3.6], ["250", "4"]),
        ([0, 0], ["0.00", "0.00"]),
        ([0.5, "inf"], ["0.500", "inf"]),
    ],
)
def test_all_norms_have_as_many_decimals(
    tmp_path: Path, norms: list[Any], shown: list[str]
) -> None:
    columns: dict[str, list[Any]] = {"step": [5]}
    for block, norm in enumerate(norms):
        columns[f"lora/update_norm/layers.{block}.q"] = [norm]
        columns[f"lora/effective_rank/layers.{block}.q"] = [1]
    _, (ax, _) = plot_layers(written(tmp_path / "a", **columns))
    assert texts_of(ax.texts) == shown
    assert ax.get_title() == "Norm of the update (absolute)"


def test_columns_are_in_the_order_of_the_model_also_if_it_is_merged(
    tmp_path: Path,
) -> None:
    model = nn.ModuleDict()
    for name in ("query", "key", "out"):
        model[name] = nn.Linear(4, 4)
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    columns: dict[str, list[Any]] = {"step": [5]}
    for name in ("key", "out", "query"):  # as CSVLogger writes them
        columns[f"lora/update_norm/{name}"] = [1]
        columns[f"lora/effective_rank/{name}"] = [1]
    run = written(tmp_path / "a", **columns)
    for is_merged in (False, True):
        if is_merged:
            ll.merge_adapters(model)
        for ax in plot_layers(run, model)[1]:
            assert texts_of(ax.get_xticklabels()) == ["query", "key", "out"]
    assert texts_of(plot_layers(run)[1][0].get_xticklabels()) == ["key", "out", "query"]
    with pytest.raises(ll.AdapterStateError):
        plot_layers(run, nn.Linear(4, 4))


def test_no_two_labels_overlap(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"step": [5]}
    for matrix in (
        "q",
        "attention.output.dense",
        "mixture_of_experts.gate_projection",
        "v",
    ):
        columns[f"lora/update_norm/layers.0.{matrix}"] = [1]
        columns[f"lora/effective_rank/layers.0.{matrix}"] = [1]
    figure, axes = plot_layers(written(tmp_path / "a", **columns))
    figure.canvas.draw()
    labels = [
        label
        for ax in axes
        for label in (*ax.get_xticklabels(), *ax.get_yticklabels(), ax.title)
    ]
    boxes = [label.get_window_extent() for label in labels]
    for place, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[place + 1 :])


def test_a_large_model_has_colours_without_numbers(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"step": [5]}
    for block in range(201):
        columns[f"lora/update_norm/layers.{block}.q"] = [1]
        columns[f"lora/effective_rank/layers.{block}.q"] = [1]
    _, (norms, _) = plot_layers(written(tmp_path / "a", **columns))
    assert norms.images[0].get_array().shape == (201, 1)
    assert not norms.texts


# What cannot be drawn


def test_a_metric_that_was_not_logged_is_named_beside_those_that_were(
    tmp_path: Path,
) -> None:
    run = written(tmp_path / "a", step=[1], epoch=[0], val_acc=[1], train_loss=[2])
    with pytest.raises(
        ll.ConfigError, match=r"'val_loss' is not in .*It has 'train_loss', 'val_acc'\."
    ):
        plot_losses({"a": run})
    with pytest.raises(
        ll.ConfigError, match="LoRAMonitor\\(per_layer=True\\) logs them"
    ):
        plot_layers(run)
    with pytest.raises(ll.ConfigError, match="window=0"):
        plot_losses({"a": run}, "val_acc", window=0)


def test_a_folder_without_a_run_or_with_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder of a CSVLogger"):
        plot_layers(tmp_path)
    for name in ("a", "b"):
        written(tmp_path / name / "version_0", step=[1], val_loss=[1])
    with pytest.raises(ll.ConfigError, match=r"has several runs: .*a', .*b'"):
        plot_losses({"both": tmp_path})


def test_without_matplotlib_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = written(tmp_path / "a", step=[1], val_loss=[1])
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"extra 'plots': pip install '\.\[plots\]'"
    ):
        plot_losses({"a": run})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("step,val_loss\n,0.5\n", "has step=''. Expected a number"),
        ("epoch,val_loss\n0,0.5\n", "has step=None. Expected a number"),
        ("step,val_loss\n1,low\n", "has val_loss='low'. Expected a number"),
        ("step,val_loss\n1,0.5,7\n", "Line 2 of .* has more cells than its first line"),
    ],
    ids=["no step", "no steps", "a word", "more cells"],
)
def test_a_file_that_is_not_of_csvlogger_is_refused(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ll.ConfigError, match=says):
        plot_losses({"run": path})
