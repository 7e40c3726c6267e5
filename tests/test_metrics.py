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
from lightning_lora.metrics import Amplification, EffectiveRank, SubspaceSimilarity, UpdateNorm, measured
from tests.support.layers import LAYERS, Model, config, train
from tests.support.models import LitTiny, data, lora, randomise, trainer
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
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrices = {name: (name.removesuffix(f".{m.matrix.name}"), m.matrix) for name, m in measured(model).items()}
    ll.merge_adapters(model)
    after, found = dict(model.named_parameters()), {}
    for name, (layer, matrix) in matrices.items():
        both = [state[f"{layer}.{matrix.weight}"].detach() for state in (before, after)]
        rows = slice(matrix.first, matrix.first + matrix.writes) if not matrix.has_all_rows else slice(None)
        w, merged = (p if matrix.stack else p.flatten(1)[rows] for p in both)
        found[name] = w, merged - w
    ll.unmerge_adapters(model)
    return found


def entropy_rank(delta: Tensor) -> Tensor:
    p = torch.linalg.svdvals(delta)
    p = p / p.sum(-1, keepdim=True)
    return (-(p * p.clamp_min(1e-300).log()).sum(-1)).exp().mean()


def projected(of: Tensor, w: Tensor, r: int) -> Tensor:
    """U^T W V, with the top r singular vectors of a matrix."""
    u, _, vh = SVD(of, full_matrices=False)
    return u[..., :r].mT @ w @ vh[..., :r, :].mT


def check(model: nn.Module, r: int = 2, **tolerance: float) -> None:
    """Compare all metrics of one model with plain matrices."""
    norms, ranks, factors, top = UpdateNorm()(model), EffectiveRank()(model), Amplification(), Amplification("weight")
    amplification = factors(model)
    top.update(model)
    known = plain(model)
    assert norms.keys() == ranks.keys() == amplification.keys() == known.keys()
    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False, **tolerance}
    for name, (w, delta) in known.items():
        torch.testing.assert_close(norms[name], delta.norm() / w.norm(), **close)
        torch.testing.assert_close(ranks[name], entropy_rank(delta), **close)
        size = [delta.norm(), projected(delta, w, r).norm(), w.norm()]
        torch.testing.assert_close(torch.stack(factors.norms[name]), torch.stack(size), **close)
        torch.testing.assert_close(amplification[name], size[0] / size[1], **close)
        torch.testing.assert_close(top.norms[name][1], projected(w, w, r).norm(), **close)


KINDS: list[tuple[str, dict[str, Any]]] = [("linear", {"use_dora": True}), ("linear", {"init": "pissa"})]
KINDS += [("linear", {"target_modules": ["0"], "target_slices": {"0": {"q": [0, 1], "v": [2, 4]}}})]
KINDS += [(k, {}) for k in ("conv1d", "embedding", "grouped convolution", "lstm", "attention", "experts")]


@pytest.mark.parametrize(("kind", "kwargs"), KINDS, ids=str)
def test_each_kind_of_update_is_measured_as_its_plain_matrices(kind: str, kwargs: dict[str, Any]) -> None:
    model = Model(LAYERS[kind][0]()).double()
    ll.inject_adapters(model, config(model, **kwargs))
    train(model)
    check(model)


def test_half_precision_is_measured_in_float32_also_under_autocast() -> None:
    model = two().bfloat16()
    check(copy.deepcopy(model).double(), 4)
    expected = [metric(model) for metric in (UpdateNorm(), Amplification(), EffectiveRank())]
    with torch.autocast("cpu", torch.bfloat16):
        assert [metric(model) for metric in (UpdateNorm(), Amplification(), EffectiveRank())] == expected
    w = model[0].weight.float()
    delta = 0.75 * model[0].lora_B @ model[0].lora_A
    torch.testing.assert_close(expected[0]["0"], delta.norm() / w.norm())


def test_a_quantised_weight_has_the_values_that_the_layer_computes_with() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")
    model = nn.Sequential(layer.to("cpu"))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules="all"))
    randomise(model)
    with ll.disable_adapters(model):
        w = layer(torch.eye(64)).mT
    delta = layer.lora_B @ layer.lora_A * layer.lora_settings.scaling
    torch.testing.assert_close(UpdateNorm()(model)["0"], delta.norm() / w.norm(), rtol=1e-2, atol=0)


def test_a_fresh_update_is_zero_in_all() -> None:
    ll.inject_adapters(model := nn.Sequential(nn.Linear(12, 16)), ll.LoRAConfig(r=4))
    for metric in (UpdateNorm(), EffectiveRank(), Amplification()):
        assert metric(model) == {"0": 0}
    assert SubspaceSimilarity(2, side="B")(model, model) == {"0": 0}


def test_each_adapter_of_a_model_is_measured_by_its_name_also_above_a_merged_one() -> None:
    model, alone = two(name="de"), two(seed=1, r=2)
    expected = [metric(model) for metric in (UpdateNorm(), Amplification(), EffectiveRank())]
    ll.inject_adapters(model, ll.LoRAConfig(r=2, alpha=3), name="fr")
    randomise(model, 1)
    metric = SubspaceSimilarity()
    for merge in (False, True):
        if merge:
            ll.merge_adapters(model)
        assert [metric((model, "de")) for metric in (UpdateNorm(), Amplification(), EffectiveRank())] == expected
        assert UpdateNorm()((model, "fr")) == UpdateNorm()(model) == UpdateNorm()(alone)
        torch.testing.assert_close(metric((model, "de"), (model, "fr")), metric(two(), alone))
    with pytest.raises(ll.AdapterStateError, match="'it'"):
        UpdateNorm().update((model, "it"))


# Similarity


@pytest.mark.parametrize(("i", "j", "side"), [(1, 8, "A"), (5, 3, "A"), (2, 2, "B")])
def test_similarity_is_that_of_singular_vectors(i: int, j: int, side: str) -> None:
    one, other = two(5), two(8, seed=1)
    metric, grid = SubspaceSimilarity(i, j, side=side), SubspaceSimilarity(side=side)  # type: ignore[arg-type]
    found, grids = metric(one, other), grid(one, other)
    for name, layer in (("0", 0), ("1", 1)):
        pair = (getattr(model[layer], f"lora_{side}").detach() for model in (one, other))
        u, v = (SVD(p if side == "A" else p.mT).Vh.mT for p in pair)
        expected = (u[:, :i].mT @ v[:, :j]).square().sum() / min(i, j)
        torch.testing.assert_close(found[name], expected.float())
        assert found[name] == grids[name][i - 1, j - 1] and grids[name].shape == (5, 8)


def test_similarity_of_stacks_is_the_mean_over_their_matrices() -> None:
    one, other = (nn.Sequential(LAYERS["experts"][0]()) for _ in range(2))
    for model in (one, other):
        ll.inject_adapters(model, config(model))
    expected = []
    for a, b in zip(one[0].lora_A_stack, other[0].lora_A_stack, strict=True):
        u, v = (SVD(each.detach().double()).Vh[:2] for each in (a, b))
        expected.append((u @ v.mT).square().sum() / 2)
    torch.testing.assert_close(SubspaceSimilarity(2)(one, other)["0.stack"], torch.stack(expected).mean().float())


def test_similarity_is_read_from_files_as_from_models(tmp_path: Path) -> None:
    one, other = two(2), two(4, seed=1)
    ll.save_adapter(one, tmp_path / "one.safetensors")
    metric = SubspaceSimilarity()
    torch.testing.assert_close(metric(tmp_path / "one.safetensors", other), metric(one, other))
    torch.testing.assert_close(EffectiveRank()(str(tmp_path / "one.safetensors")), EffectiveRank()(one))
    with pytest.raises(ll.AdapterStateError, match="no weights"):
        UpdateNorm().update(tmp_path / "one.safetensors")


def test_similarity_is_of_the_matrices_that_both_have() -> None:
    one = two(target_modules=["0"])
    assert SubspaceSimilarity(1)(one, two()).keys() == {"0"}
    with pytest.raises(ll.AdapterStateError, match=r"one '0', the other '1'. Compare"):
        SubspaceSimilarity().update(one, two(target_modules=["1"]))


def test_grids_are_pooled_as_far_as_all_matrices_go_and_i_stops_there_too() -> None:
    one, other = two(rank_pattern={"1": 2}), two(seed=1, rank_pattern={"1": 3})
    grids = SubspaceSimilarity()(one, other)
    assert [grids["0"].shape, grids["1"].shape] == [(4, 4), (2, 3)]
    pooled = SubspaceSimilarity(reduction="mean")(one, other)
    torch.testing.assert_close(pooled, (grids["0"][:2, :3] + grids["1"]) / 2)
    assert SubspaceSimilarity(4)(one, other) == {"0": grids["0"][3, 3], "1": grids["1"][1, 2]}


# Metrics of torchmetrics


def test_one_number_is_pooled() -> None:
    each = torch.stack(list(UpdateNorm()(model := two()).values()))
    for reduction in ("mean", "max", "min"):
        assert UpdateNorm(reduction=reduction)(model) == getattr(each, reduction)()  # type: ignore[arg-type]


def test_the_last_update_counts_until_a_reset_and_forward_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    metric, model, looked = EffectiveRank(), two(), list[Any]()
    monkeypatch.setattr(metrics, "measured", lambda model: looked.append(model) or measured(model))
    metric.update(two(2))
    metric.update(model)
    assert metric.compute() == metric(model) and len(looked) == 3
    metric.reset()
    for ask in (metric.compute, metric.plot, SubspaceSimilarity().plot, UpdateNorm(reduction="mean").plot):
        with (
            pytest.warns(UserWarning, match="before the ``update``"),
            pytest.raises(ll.AdapterStateError, match="Nothing was measured"),
        ):
            ask()


def test_metrics_stay_apart_in_a_collection() -> None:
    """It updates only one of two metrics whose states were once the same, as all are in a fresh model."""
    model = two()
    fresh, collection = copy.deepcopy(model), MetricCollection([UpdateNorm(), EffectiveRank(reduction="mean")])
    for layer in fresh:
        nn.init.zeros_(layer.lora_B)
    collection.update(fresh)
    collection.update(model)
    assert collection.compute() == {**UpdateNorm()(model), "EffectiveRank": EffectiveRank(reduction="mean")(model)}


def test_random_directions_hold_a_random_part_of_the_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    ll.inject_adapters(model, ll.LoRAConfig(r=16))
    metric = Amplification("random")
    metric.update(model)
    _, part, whole = metric.norms["0"]
    assert part / whole == pytest.approx(16 / 64, rel=0.1)  # a share r / n of the rows, and of the columns
    first = metric.norms
    metric.update(model)
    assert metric.norms == first
    metric.update(two())
    assert list(metric.norms) == ["0", "1"]
    metric.reset()
    assert not metric.norms


def test_an_unknown_word_is_refused() -> None:
    for kind, name in ((UpdateNorm, "reduction"), (Amplification, "directions"), (SubspaceSimilarity, "side")):
        with pytest.raises(ll.ConfigError, match=f"^{name}='sum'. Expected '"):
            kind(**{name: "sum"})
    for number in ({"i": 0}, {"i": 2, "j": -1}, {"j": 2}):
        with pytest.raises(ll.ConfigError, match="Expected numbers from 1 on, and j only with i"):
            SubspaceSimilarity(**number)


# In a Trainer, and over processes


class Logs(LitTiny):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rank = UpdateNorm(reduction="mean"), EffectiveRank(reduction="max")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.norm(self)
        self.log("norm", self.norm, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.rank.update(self)
        self.log("rank", self.rank)


class Keeps(Callback):
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        found = [trainer.callback_metrics[name] for name in ("norm_step", "norm_epoch", "rank")]
        torch.save(
            [*found, EffectiveRank(reduction="max")(pl_module)], f"{trainer.default_root_dir}/{trainer.global_rank}.pt"
        )


@pytest.mark.processes
def test_a_trainer_logs_them_and_each_process_has_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "enable_checkpointing": False}
    trainer(tmp_path, [lora(), Keeps()], **options).fit(Logs(), data())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    step, epoch, rank, expected = first
    assert first == second and step == epoch > 0 and rank == expected


def shards() -> Any:
    from torch.distributed.fsdp import fully_shard

    join_group()
    model = two(use_dora=True)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return [metric(model) for metric in (UpdateNorm(), Amplification(), EffectiveRank())]


@pytest.mark.processes
@pytest.mark.skipif(not has_shards, reason="models are sharded with torch 2.7 and later")
def test_a_sharded_model_has_the_numbers_of_a_whole_one() -> None:
    model = two(use_dora=True)
    whole = [metric(model) for metric in (UpdateNorm(), Amplification(), EffectiveRank())]
    assert run_ranks(shards) == [whole, whole]


# Figures


def test_plots_name_the_matrices_and_figure_3_has_a_panel_for_each() -> None:
    metric, grid = UpdateNorm(), SubspaceSimilarity()
    first, grids = metric(two()), grid(two(), two(seed=1))
    _, axes = metric.plot()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"] and axes.get_ylabel() == "UpdateNorm"
    assert [line.get_ydata().item() for line in axes.lines] == [value.item() for value in first.values()]
    figure, axes = grid.plot()
    panels = {each.get_title(): each.images[0].get_array() for each in axes.flatten()}
    assert [*panels] == ["0", "1"] and all((panels[name] == grids[name].numpy()).all() for name in grids)
    assert len(figure.axes) == 3 and grid.plot(ax=mpl.figure.Figure().subplots())[0] is None
    pooled = SubspaceSimilarity(reduction="mean")
    pooled(two(), two(seed=1))
    pooled.plot()[0].canvas.draw()
    torchmetrics_plot.plt.close("all")
