"""Metrics are what the paper's formulas say of plain matrices, for each kind of layer and in every process."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torchmetrics import MetricCollection
from torchmetrics.utilities import plot as torchmetrics_plot

import lightning_lora as ll
from lightning_lora import metrics
from lightning_lora.measured import measured_matrices
from lightning_lora.metrics import (
    Amplification,
    EffectiveRank,
    SubspaceSimilarity,
    UpdateNorm,
)
from tests.support.layers import LAYERS, Model, config, train
from tests.support.models import LitTiny, data, lora, randomise, trainer
from tests.support.parameters import values_of
from tests.support.ranks import has_shards, join_group, run_ranks

mpl.use("agg")
SVD = torch.linalg.svd


def two(r: int = 4, seed: int = 0, name: str = "default", **kwargs: Any) -> Any:
    """Two linear layers, the same ones each time, with a trained update."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12)).double()
    ll.inject_adapters(model, ll.LoRAConfig(r=r, alpha=3, **kwargs), name=name)
    randomise(model, seed)
    return model


def plain(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """W and ΔW of each adapted matrix, as stacks of matrices, from the weights before and after a merge."""
    updates = measured_matrices(model)
    before = values_of(model)
    ll.merge_adapters(model)
    after = values_of(model)
    ll.unmerge_adapters(model)
    found = {}
    for name, update in updates.items():
        matrix = update.matrix
        layer = name.removesuffix(f".{matrix.name}")
        weight = f"{layer}.{matrix.weight}"
        w = part_of(matrix, before[weight])
        found[name] = w, part_of(matrix, after[weight]) - w
    return found


def part_of(matrix: Any, weight: Tensor) -> Tensor:
    """The matrix, or the stack of matrices, that lies in a weight."""
    if matrix.stack:
        return weight
    rows = weight.flatten(1)
    if matrix.has_all_rows:
        return rows
    return rows[matrix.first : matrix.first + matrix.writes]


def entropy_rank(delta: Tensor) -> Tensor:
    p = torch.linalg.svdvals(delta)
    p = p / p.sum(-1, keepdim=True)
    return (-(p * p.clamp_min(1e-300).log()).sum(-1)).exp().mean()


def projected(of: Tensor, w: Tensor, r: int) -> Tensor:
    """U^T W V, with the top r singular vectors of a matrix."""
    u, _, vh = SVD(of, full_matrices=False)
    return u[..., :r].mT @ w @ vh[..., :r, :].mT


def check(model: nn.Module, r: int = 2) -> None:
    """Compare all metrics of one model with plain matrices."""
    norms = UpdateNorm()(model)
    ranks = EffectiveRank()(model)
    factors = Amplification()
    top = Amplification("weight")
    amplification = factors(model)
    top.update(model)
    matrices = plain(model)
    assert norms.keys() == ranks.keys() == amplification.keys() == matrices.keys()
    for name, (w, delta) in matrices.items():
        size = delta.norm()
        size_in_directions = projected(delta, w, r).norm()
        assert_near(norms[name], size / w.norm())
        assert_near(ranks[name], entropy_rank(delta))
        assert_near(
            torch.stack(factors.norms[name]),
            torch.stack([size, size_in_directions, w.norm()]),
        )
        assert_near(amplification[name], size / size_in_directions)
        assert_near(top.norms[name][1], projected(w, w, r).norm())


def assert_near(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6, check_dtype=False)


def of_each_update(model: Any) -> list[Any]:
    """What each metric of updates says of a model."""
    return [UpdateNorm()(model), Amplification()(model), EffectiveRank()(model)]


SLICES = {"0": {"q": [0, 1], "v": [2, 4]}}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"use_dora": True}),
    ("linear", {"init": "pissa"}),
    ("linear", {"target_modules": ["0"], "target_slices": SLICES}),
    ("conv1d", {}),
    ("embedding", {}),
    ("grouped convolution", {}),
    ("lstm", {}),
    ("attention", {}),
    ("experts", {}),
]


@pytest.mark.parametrize(("kind", "kwargs"), KINDS, ids=str)
def test_each_kind_of_update_is_measured_as_its_plain_matrices(
    kind: str, kwargs: dict[str, Any]
) -> None:
    model = Model(LAYERS[kind][0]()).double()
    ll.inject_adapters(model, config(model, **kwargs))
    train(model)
    check(model)


def test_half_precision_is_measured_in_float32_also_under_autocast() -> None:
    model = two().bfloat16()
    check(copy.deepcopy(model).double(), 4)
    expected = of_each_update(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert of_each_update(model) == expected
    w = model[0].weight.float()
    delta = 0.75 * model[0].lora_B @ model[0].lora_A
    torch.testing.assert_close(expected[0]["0"], delta.norm() / w.norm())


def test_a_quantised_weight_has_the_values_that_the_layer_computes_with() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        torch.randn(64, 64), requires_grad=False, quant_type="nf4"
    )
    model = nn.Sequential(layer.to("cpu"))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules="all"))
    randomise(model)
    with ll.disable_adapters(model):
        w = layer(torch.eye(64)).mT
    delta = layer.lora_B @ layer.lora_A * layer.lora_settings.scaling
    torch.testing.assert_close(
        UpdateNorm()(model)["0"], delta.norm() / w.norm(), rtol=1e-2, atol=0
    )


def test_a_fresh_update_is_zero_in_all() -> None:
    model = nn.Sequential(nn.Linear(12, 16))
    ll.inject_adapters(model, ll.LoRAConfig(r=4))
    assert of_each_update(model) == [{"0": 0}, {"0": 0}, {"0": 0}]
    assert SubspaceSimilarity(2, side="B")(model, model) == {"0": 0}


def test_each_adapter_of_a_model_is_measured_by_its_name_also_above_a_merged_one() -> (
    None
):
    model = two(name="de")
    alone = two(seed=1, r=2)
    expected = of_each_update(model)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, alpha=3), name="fr")
    randomise(model, 1)

    def check_both() -> None:
        assert of_each_update((model, "de")) == expected
        assert UpdateNorm()((model, "fr")) == UpdateNorm()(model) == UpdateNorm()(alone)
        metric = SubspaceSimilarity()
        torch.testing.assert_close(
            metric((model, "de"), (model, "fr")), metric(two(), alone)
        )

    check_both()
    ll.merge_adapters(model)
    check_both()
    with pytest.raises(ll.AdapterStateError, match="'it'"):
        UpdateNorm().update((model, "it"))


# Similarity


@pytest.mark.parametrize(("i", "j", "side"), [(1, 8, "A"), (5, 3, "A"), (2, 2, "B")])
def test_similarity_is_that_of_singular_vectors(i: int, j: int, side: str) -> None:
    one = two(5)
    other = two(8, seed=1)
    found = SubspaceSimilarity(i, j, side=side)(one, other)  # type: ignore[arg-type]
    grids = SubspaceSimilarity(side=side)(one, other)  # type: ignore[arg-type]
    for name in ("0", "1"):
        u = directions(one.get_submodule(name), side)[:, :i]
        v = directions(other.get_submodule(name), side)[:, :j]
        expected = (u.mT @ v).square().sum() / min(i, j)
        torch.testing.assert_close(found[name], expected.float())
        assert found[name] == grids[name][i - 1, j - 1]
        assert grids[name].shape == (5, 8)


def directions(layer: nn.Module, side: str) -> Tensor:
    """The singular vectors of A on its inputs, or of B on its outputs, as columns."""
    factor = layer.get_parameter(f"lora_{side}").detach()
    rows = factor if side == "A" else factor.mT
    return SVD(rows).Vh.mT


def test_similarity_of_stacks_is_the_mean_over_their_matrices() -> None:
    def experts() -> nn.Sequential:
        model = nn.Sequential(LAYERS["experts"][0]())
        ll.inject_adapters(model, config(model))
        return model

    one = experts()
    other = experts()
    u = SVD(one[0].lora_A_stack.detach().double()).Vh[:, :2]
    v = SVD(other[0].lora_A_stack.detach().double()).Vh[:, :2]
    # one for each matrix of the stack
    similarities = (u @ v.mT).square().sum((1, 2)) / 2
    torch.testing.assert_close(
        SubspaceSimilarity(2)(one, other)["0.stack"], similarities.mean().float()
    )


def test_similarity_is_read_from_files_as_from_models(tmp_path: Path) -> None:
    one = two(2)
    other = two(4, seed=1)
    ll.save_adapter(one, tmp_path / "one.safetensors")
    metric = SubspaceSimilarity()
    torch.testing.assert_close(
        metric(tmp_path / "one.safetensors", other), metric(one, other)
    )
    torch.testing.assert_close(
        EffectiveRank()(str(tmp_path / "one.safetensors")), EffectiveRank()(one)
    )
    with pytest.raises(ll.AdapterStateError, match="no weights"):
        UpdateNorm().update(tmp_path / "one.safetensors")


def test_similarity_is_of_the_matrices_that_both_have() -> None:
    one = two(target_modules=["0"])
    assert SubspaceSimilarity(1)(one, two()).keys() == {"0"}
    with pytest.raises(ll.AdapterStateError, match=r"one '0', the other '1'. Compare"):
        SubspaceSimilarity().update(one, two(target_modules=["1"]))


def test_grids_are_pooled_as_far_as_all_matrices_go_and_i_stops_there_too() -> None:
    one = two(rank_pattern={"1": 2})
    other = two(seed=1, rank_pattern={"1": 3})
    grids = SubspaceSimilarity()(one, other)
    assert [grids["0"].shape, grids["1"].shape] == [(4, 4), (2, 3)]
    pooled = SubspaceSimilarity(reduction="mean")(one, other)
    torch.testing.assert_close(pooled, (grids["0"][:2, :3] + grids["1"]) / 2)
    assert SubspaceSimilarity(4)(one, other) == {
        "0": grids["0"][3, 3],
        "1": grids["1"][1, 2],
    }


# Metrics of torchmetrics


@pytest.mark.parametrize("reduction", ["mean", "max", "min"])
def test_one_number_is_pooled(reduction: Any) -> None:
    model = two()
    each = torch.stack(list(UpdateNorm()(model).values()))
    assert UpdateNorm(reduction=reduction)(model) == getattr(each, reduction)()


def test_the_last_update_counts_until_a_reset_and_forward_measures_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[Any] = []

    def look(model: Any) -> Any:
        looked.append(model)
        return measured_matrices(model)

    monkeypatch.setattr(metrics, "measured_matrices", look)
    metric = EffectiveRank()
    model = two()
    metric.update(two(2))
    metric.update(model)
    assert metric.compute() == metric(model)
    assert len(looked) == 3
    metric.reset()
    for ask in (
        metric.compute,
        metric.plot,
        SubspaceSimilarity().plot,
        UpdateNorm(reduction="mean").plot,
    ):
        refused = pytest.raises(ll.AdapterStateError, match="Nothing was measured")
        with pytest.warns(UserWarning, match="before the ``update``"), refused:
            ask()


def test_metrics_stay_apart_in_a_collection() -> None:
    """It updates only one of two metrics whose states were once the same, as all are in a fresh model."""
    model = two()
    fresh = copy.deepcopy(model)
    collection = MetricCollection([UpdateNorm(), EffectiveRank(reduction="mean")])
    for layer in fresh:
        nn.init.zeros_(layer.lora_B)
    collection.update(fresh)
    collection.update(model)
    assert collection.compute() == {
        **UpdateNorm()(model),
        "EffectiveRank": EffectiveRank(reduction="mean")(model),
    }


def test_random_directions_hold_a_random_part_of_the_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    ll.inject_adapters(model, ll.LoRAConfig(r=16))
    metric = Amplification("random")
    metric.update(model)
    _, part, whole = metric.norms["0"]
    # a share r / n of the rows, and of the columns
    assert part / whole == pytest.approx(16 / 64, rel=0.1)
    first = metric.norms
    metric.update(model)
    assert metric.norms == first
    metric.update(two())
    assert list(metric.norms) == ["0", "1"]
    metric.reset()
    assert not metric.norms


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (UpdateNorm, "reduction"),
        (Amplification, "directions"),
        (SubspaceSimilarity, "side"),
    ],
)
def test_an_unknown_word_is_refused(metric: Any, name: str) -> None:
    with pytest.raises(ll.ConfigError, match=f"^{name}='sum'. Expected '"):
        metric(**{name: "sum"})


@pytest.mark.parametrize("number", [{"i": 0}, {"i": 2, "j": -1}, {"j": 2}])
def test_a_number_of_directions_begins_at_one(number: Any) -> None:
    with pytest.raises(
        ll.ConfigError, match="Expected numbers from 1 on, and j only with i"
    ):
        SubspaceSimilarity(**number)


# In a Trainer, and over processes


class Logs(LitTiny):
    def __init__(self) -> None:
        super().__init__()
        self.norm = UpdateNorm(reduction="mean")
        self.rank = EffectiveRank(reduction="max")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.norm(self)
        self.log("norm", self.norm, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.rank.update(self)
        self.log("rank", self.rank)


class Keeps(Callback):
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        logged = trainer.callback_metrics
        found = [
            logged["norm_step"],
            logged["norm_epoch"],
            logged["rank"],
            EffectiveRank(reduction="max")(pl_module),
        ]
        torch.save(found, f"{trainer.default_root_dir}/{trainer.global_rank}.pt")


@pytest.mark.processes
def test_a_trainer_logs_them_and_each_process_has_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "strategy": "ddp_fork",
        "devices": 2,
        "enable_checkpointing": False,
    }
    trainer(tmp_path, [lora(), Keeps()], **options).fit(Logs(), data())
    first = torch.load(tmp_path / "0.pt", weights_only=True)
    second = torch.load(tmp_path / "1.pt", weights_only=True)
    step, epoch, rank, expected = first
    assert first == second
    assert step == epoch > 0
    assert rank == expected


def shards() -> Any:
    from torch.distributed.fsdp import fully_shard

    join_group()
    model = two(use_dora=True)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return of_each_update(model)


@pytest.mark.processes
@pytest.mark.skipif(
    not has_shards, reason="models are sharded with torch 2.7 and later"
)
def test_a_sharded_model_has_the_numbers_of_a_whole_one() -> None:
    whole = of_each_update(two(use_dora=True))
    assert run_ranks(shards) == [whole, whole]


# Figures


def test_plots_name_the_matrices_and_figure_3_has_a_panel_for_each() -> None:
    metric = UpdateNorm()
    grid = SubspaceSimilarity()
    norms = metric(two())
    grids = grid(two(), two(seed=1))
    _, axes = metric.plot()
    assert axes.get_ylabel() == "UpdateNorm"
    for name, line, label in zip(
        ("0", "1"), axes.lines, axes.get_xticklabels(), strict=True
    ):
        assert label.get_text() == name
        assert line.get_ydata().item() == norms[name].item()
    figure, axes = grid.plot()
    for name, panel in zip(("0", "1"), axes.flatten(), strict=True):
        assert panel.get_title() == name
        assert (panel.images[0].get_array() == grids[name].numpy()).all()
    assert len(figure.axes) == 3
    assert grid.plot(ax=mpl.figure.Figure().subplots())[0] is None
    pooled = SubspaceSimilarity(reduction="mean")
    pooled(two(), two(seed=1))
    pooled.plot()[0].canvas.draw()
    torchmetrics_plot.plt.close("all")
