"""A LightningModule is not one network: what stands still stays as it is, and copies follow."""

import copy
import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_lora as ll
from tests.support.fits import KeepsStates
from tests.support.models import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them. Single-digit widths make layers too small to look untrained."""
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Module(L.LightningModule):  # each has a ``build`` and a ``loss``. The optimizer gets all parameters, or the net's
    def __init__(self, optimized: str = "all") -> None:
        super().__init__()
        self.optimized = optimized
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.build()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def configure_optimizers(self) -> Any:
        held: Any = self if self.optimized == "all" else self.net
        return torch.optim.Adam(held.parameters(), lr=0.01)


class Perceptual(Module):  # a frozen network in the loss
    def build(self) -> None:
        self.net, self.vgg = mlp(8, 15, 15, 8), mlp(8, 15, 4).requires_grad_(False)

    def loss(self, x: Tensor) -> Tensor:
        return (self.vgg(self.net(x)) - self.vgg(x)).square().mean()


class SmallBesideLarge(Perceptual):
    """The network that trains has two layers, as a head may, and the one in the loss most of the weights."""

    def build(self) -> None:
        self.net, self.vgg = mlp(8, 9, 8), mlp(8, 15, 15, 4).requires_grad_(False)


class Distilled(SmallBesideLarge):  # a frozen teacher, which passes no gradients
    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.vgg(x)
        return (self.net(x)[:, :4] - wanted).square().mean()


class AlikeInShape(Distilled):  # a teacher of the same layers with other weights, which is no copy
    def build(self) -> None:
        self.net, self.vgg = mlp(8, 15, 15, 4), mlp(8, 15, 15, 4).requires_grad_(False)


class NotGiven(SmallBesideLarge):  # nobody froze it, but the optimizer does not get it
    def build(self) -> None:
        super().build()
        self.vgg.requires_grad_(True)
        self.optimized = "net"


class FrozenLate(NotGiven):  # it is frozen when the optimizer is made
    def configure_optimizers(self) -> Any:
        self.vgg.requires_grad_(False)
        self.optimized = "all"
        return super().configure_optimizers()


class Headed(Module):  # a frozen backbone under a head that is trained already
    def build(self) -> None:
        self.net = nn.ModuleDict({"backbone": mlp(8, 15, 15, 8).requires_grad_(False), "head": nn.Linear(8, 2)})

    def loss(self, x: Tensor) -> Tensor:
        features: Tensor = self.net["backbone"](x)
        return self.net["head"](features).square().mean()


class Recomputed(Headed):  # its backbone is behind a reentrant checkpoint, whose graph nobody sees
    def loss(self, x: Tensor) -> Tensor:
        features: Any = checkpoint(self.net["backbone"], x, use_reentrant=True)
        return self.net["head"](features).square().mean()


class AllFrozen(Headed):
    def build(self) -> None:
        super().build()
        self.net.requires_grad_(False)


class Momentum(Module):  # a network and a copy that follows it, as in BYOL
    def build(self) -> None:
        self.net = mlp(8, 15, 4)
        self.copy_now()

    def copy_now(self) -> None:
        self.copy = copy.deepcopy(self.net).requires_grad_(False)

    def loss(self, x: Tensor) -> Tensor:
        for p, q in zip(self.net.parameters(), self.copy.parameters(), strict=True):
            q.data = q.data.lerp(p.data, 0.01)
        return (self.net(x) - self.copy(x.roll(1, 0))).square().mean() + (self.net(x) - 1).square().mean()


class Average(Momentum):  # a copy that nobody froze, as in timm's ModelEma
    def copy_now(self) -> None:
        self.copy = nn.ModuleDict({"module": copy.deepcopy(self.net)}).eval()

    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p, q in zip(self.net.parameters(), self.copy.parameters(), strict=True):
                q.lerp_(p, 0.01)
        return (self.net(x) - 1).square().mean()


class MadeInSetup(Momentum):
    def build(self) -> None:
        self.net = mlp(8, 15, 4)

    def setup(self, stage: str) -> None:
        self.copy_now()


def fit(folder: Path, module: Any, *callbacks: Any, ckpt_path: Any = None, epochs: int = 4, **options: Any) -> Any:
    """Fit a module with adapters, which stay on it in one process."""
    rest = {name: options.pop(name) for name in ("strategy", "devices", "logger") if name in options}
    merge = "last" if "strategy" in rest else False
    callbacks = (ll.LoRACallback(**{"r": 2, "merge": merge, **options}), *callbacks)
    t = trainer(folder, callbacks, max_epochs=epochs, enable_checkpointing=len(callbacks) > 1, **rest)
    t.fit(module, DataLoader(TensorDataset(X), batch_size=4), ckpt_path=ckpt_path)
    return module


def adapted(module: nn.Module) -> list[str]:
    return [name.removesuffix(".lora_A") for name, _ in module.named_parameters() if name.endswith("lora_A")]


def same(module: nn.Module, *others: nn.Module) -> bool:
    """Whether all hold the same values by the same names."""
    value, *values = (each.state_dict() for each in (module, *others))
    return all(torch.equal(value[name], each[name]) for each in values for name in value)


# What stands still


@pytest.mark.parametrize(
    ("kind", "optimized", "target_modules"),
    [
        (Perceptual, "all", "all-linear"),
        (SmallBesideLarge, "net", "all"),
        (Distilled, "all", "all"),
        (AlikeInShape, "all", "all-linear"),
        (NotGiven, "net", "all-linear"),
        (FrozenLate, "all", "all-linear"),
    ],
)
def test_a_network_that_stands_still_beside_one_that_trains_gets_no_adapter(
    tmp_path: Path, kind: Any, optimized: str, target_modules: str, caplog: Any
) -> None:
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, kind(optimized), target_modules=target_modules, bias="all")
    assert same(module.vgg, kind().vgg)
    assert adapted(module) == [f"net.{n}" for n, layer in module.net.named_children() if isinstance(layer, nn.Linear)]
    told = [record.message for record in caplog.records if "No adapter for 'vgg'" in record.message]
    assert len(told) == 1 and "name its layers in target_modules" in told[0]


@pytest.mark.parametrize(("kind", "optimized"), [(Headed, "net"), (Recomputed, "all"), (AllFrozen, "all")])
def test_a_frozen_backbone_is_adapted_under_a_head_alone(
    tmp_path: Path, kind: Any, optimized: str, caplog: Any
) -> None:
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, kind(optimized))
    assert adapted(module) == ["net.backbone.0", "net.backbone.2", "net.backbone.4", "net.head"]
    assert module.net["backbone"][0].lora_B.any()
    assert ("exclude_modules=['net.backbone']" in caplog.text) == (kind is not AllFrozen)
    assert adapted(fit(tmp_path, kind(optimized), modules_to_save=["head"])) == adapted(module)[:3]


def test_a_frozen_backbone_is_adapted_under_a_large_head_that_looks_untrained() -> None:
    model = nn.ModuleDict({"backbone": mlp(64, 64, 64, 64, 64, 64, 64, 64), "head": mlp(64, 64, 64, 64)})
    for layer in model["backbone"]:
        if isinstance(layer, nn.Linear):
            layer.weight.data += 0.1 * torch.outer(torch.randn(64), torch.randn(64))
    model["backbone"].requires_grad_(False)
    names = ll.inject_adapters(model, ll.LoRAConfig(r=2))
    assert [name for name in names if name.startswith("backbone")]


def test_whoever_names_a_layer_gets_an_adapter_there(tmp_path: Path) -> None:
    assert len(adapted(fit(tmp_path, Perceptual(), target_modules=["0", "2", "4"]))) == 5


class Decoder(Module):
    """A frozen network, the only one with linear layers, and a decoder of its size that is written for it."""

    def build(self) -> None:
        self.net, self.frozen = nn.Sequential(*(nn.Conv1d(9, 9, 1) for _ in range(4))), mlp(8, 9, 8)
        self.frozen.requires_grad_(False)

    def decode(self, x: Tensor) -> Tensor:
        return self.net(x[:, None].expand(-1, 9, -1)).mean(1)

    def loss(self, x: Tensor) -> Tensor:
        return (self.decode(self.frozen(x)) - x).square().mean()


class Teacher(Decoder):  # or is not
    def loss(self, x: Tensor) -> Tensor:
        return (self.decode(x) - self.frozen(x)).square().mean()


@pytest.mark.filterwarnings("ignore:target_modules=", "ignore:You have frozen most")
@pytest.mark.parametrize("optimized", ["all", "net"])
def test_a_frozen_network_that_alone_has_what_is_targeted_is_adapted_if_what_trains_reads_it(
    tmp_path: Path, optimized: str
) -> None:
    assert adapted(fit(tmp_path, Decoder(optimized))) == ["frozen.0", "frozen.2"]
    with pytest.raises(ll.TargetError, match=r"No adapter for 'frozen' of Teacher.* No other layer has an adapter"):
        fit(tmp_path, Teacher(optimized))


# Copies


def follower(module: Any) -> nn.Module:
    return next(inner for inner in module.copy.modules() if isinstance(inner, nn.Sequential))


@pytest.mark.parametrize(("kind", "optimized"), [(Momentum, "all"), (Average, "net"), (MadeInSetup, "all")])
def test_a_copy_follows_its_original(tmp_path: Path, kind: Any, optimized: str, caplog: Any) -> None:
    base = kind("net").net.state_dict()
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, kind(optimized), epochs=8)
    assert f"Copies in {kind.__name__}: 'copy" in caplog.text
    assert not any(p.requires_grad for name, p in module.copy.named_parameters() if "lora" in name)
    ll.merge_adapters(module)
    moved = [torch.cat([p.flatten() - base[n].flatten() for n, p in m.named_parameters() if "weight" in n])
             for m in (module.net, follower(module))]  # fmt: skip
    assert cosine_similarity(*moved, dim=0) > 0.9


def test_the_share_that_trains_is_told_again_without_what_is_left_out(tmp_path: Path, caplog: Any) -> None:
    logger = CSVLogger(tmp_path)
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, SmallBesideLarge(), logger=logger)
    share = ll.summarize(module).share
    assert f"Now {share:.2%} of its parameters train" in caplog.text
    assert json.loads((Path(logger.log_dir) / "lora.json").read_text())["lora/trained_share"] == share


class Baseline(MadeInSetup):
    """A copy that nobody froze, and that the optimizer holds too, as the rollout baseline of rl4co."""

    def copy_now(self) -> None:
        self.copy = copy.deepcopy(self.net)

    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            reference = self.copy(x)
        return (self.net(x) - reference - 1).square().mean()


@pytest.mark.parametrize(
    ("kind", "optimized", "save"),
    [
        (Perceptual, "all", "adapters"),
        (NotGiven, "net", "model"),
        (Average, "net", "adapters"),
        (MadeInSetup, "net", "adapters"),
        (Baseline, "all", "adapters"),
    ],
)
def test_a_run_resumes_merges_and_loads_exactly(tmp_path: Path, kind: Any, optimized: str, save: str) -> None:
    through = fit(tmp_path, kind(optimized), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), save=save)
    resumed = fit(tmp_path, kind(optimized), ckpt_path=tmp_path / "epoch=1.ckpt")
    loaded = kind(optimized)
    loaded.setup("fit")
    loaded.requires_grad_(True)
    ll.load_adapter(loaded, tmp_path / "epoch=3.ckpt")
    before, other = copy.deepcopy(through), follower(through) if hasattr(through, "copy") else through.vgg
    wanted = other(X)
    ll.merge_adapters(through)
    torch.testing.assert_close(other(X), wanted)
    ll.unmerge_adapters(through)
    assert same(before, through, resumed, loaded)


@pytest.mark.parametrize(
    ("kind", "names"), [(SmallBesideLarge, ["net.0", "net.2"]), (MadeInSetup, ["net.0", "net.2", "copy.0", "copy.2"])]
)
def test_it_is_so_in_several_processes(tmp_path: Path, kind: Any, names: list[str]) -> None:
    options = {"strategy": "ddp_fork", "devices": 2}
    saves, keeps = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), KeepsStates(tmp_path)
    through = fit(tmp_path, kind("net"), saves, keeps, **options)
    assert [name.removesuffix(".lora_A") for name in keeps.same() if name.endswith("lora_A")] == names
    assert same(through, fit(tmp_path, kind("net"), ckpt_path=tmp_path / "epoch=1.ckpt", **options))


def test_a_copy_that_is_left_out_loses_the_adapters_that_it_was_copied_with(tmp_path: Path) -> None:
    assert adapted(fit(tmp_path, Baseline("net"), exclude_modules=["copy"])) == ["net.0", "net.2"]


def test_an_attention_of_which_only_the_output_trains_is_no_network_of_its_own() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "others": mlp(8, 15, 15, 15)})
    model["attention"].in_proj_weight.requires_grad_(False)
    with pytest.warns(ll.LoRAWarning, match="No adapter for 'attention'"):
        assert ll.inject_adapters(model, ll.LoRAConfig(r=2)) == ("others.0", "others.2", "others.4")


def test_two_critics_and_their_targets_are_two_pairs() -> None:
    critic = mlp(4, 9, 1)
    critics = nn.ModuleDict({"one": critic, "two": copy.deepcopy(critic)})
    targets = nn.ModuleDict({name: copy.deepcopy(net).requires_grad_(False) for name, net in critics.items()})
    ll.inject_adapters(nn.ModuleDict({"critics": critics, "targets": targets}), ll.LoRAConfig(r=2))
    for name, target in targets.items():
        assert torch.equal(target[0].lora_A, critics[name][0].lora_A)


@pytest.mark.parametrize("kind", [Momentum, Average])
def test_what_trains_in_full_does_not_in_a_copy(tmp_path: Path, kind: Any) -> None:
    module = fit(tmp_path, kind("net"), modules_to_save=["2"], bias="lora_only")
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trained == ["net.0.bias", "net.0.lora_A", "net.0.lora_B", "net.2.weight", "net.2.bias"]
    ll.merge_adapters(module)
    moved = [m[2].weight - kind("net").net[2].weight for m in (module.net, follower(module))]
    assert cosine_similarity(*(each.flatten() for each in moved), dim=0) > 0.9


@pytest.mark.filterwarnings("ignore:No adapter for 'net.2'")
@pytest.mark.parametrize("options", [{"modules_to_save": ["net.2"]}, {"exclude_modules": ["net.2"]}, {}], ids=str)
def test_a_copy_has_adapters_exactly_where_its_original_has(options: Any) -> None:
    module = Momentum("net")
    module.net[2].requires_grad_(bool(options))
    ll.inject_adapters(module, ll.LoRAConfig(r=2, **options))
    assert adapted(module) == ["net.0", "copy.0"]


def test_a_backbone_is_judged_when_its_own_optimizer_steps(tmp_path: Path) -> None:
    class Adversarial(Headed):
        def build(self) -> None:
            super().build()
            self.judge = nn.Linear(2, 1)
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            of_net, of_judge = self.optimizers()  # type: ignore[misc]
            with torch.no_grad():
                made = self.net["head"](self.net["backbone"](batch[0]))
            for optimizer, inputs in ((of_judge, made), (of_net, None)):
                made = self.net["head"](self.net["backbone"](batch[0])) if inputs is None else inputs
                optimizer.zero_grad()
                self.manual_backward(self.judge(made).square().mean())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.net, self.judge)]

    names = ["net.backbone.0", "net.backbone.2", "net.backbone.4", "net.head", "judge"]
    assert adapted(fit(tmp_path, Adversarial())) == names


def test_a_frozen_network_with_adapters_of_its_own_is_merged_first() -> None:
    module = Perceptual()
    ll.inject_adapters(module.vgg, ll.LoRAConfig(r=2))
    module.vgg.requires_grad_(False)
    with pytest.raises(ll.AdapterStateError, match=r"'vgg' of Perceptual has adapters of its own, and is frozen"):
        ll.inject_adapters(module, ll.LoRAConfig(r=2))
    ll.merge_adapters(module.vgg)
    with pytest.warns(ll.LoRAWarning, match="No adapter for 'vgg'"):
        assert ll.inject_adapters(module, ll.LoRAConfig(r=2)) == ("net.0", "net.2", "net.4")


def test_a_copy_that_lags_behind_keeps_its_own_magnitudes() -> None:
    module = Momentum("net")
    for p in module.copy.parameters():
        p.data += 0.1 * p.abs().mean() * torch.randn(p.shape)
    before = module.copy(X)
    ll.inject_adapters(module, ll.LoRAConfig(r=2, use_dora=True))
    torch.testing.assert_close(module.copy(X), before)


@pytest.mark.filterwarnings("ignore:No adapter for:lightning_lora.LoRAWarning")
@pytest.mark.parametrize(
    ("build", "head", "last"),
    [
        ("resnet18", "fc", "layer4."),
        ("mobilenet_v3_large", "classifier", "features.16."),
        ("densenet121", "classifier", "features.denseblock4."),
        ("vit_b_16", "heads", "encoder.layers.encoder_layer_11."),
    ],
)
def test_a_backbone_of_torchvision_is_adapted_below_its_head_and_not_below_its_last_block(
    build: str, head: str, last: str
) -> None:
    for trains, is_adapted in (((head,), True), ((last, head), False)):
        with torch.device("meta"):
            model = getattr(torchvision.models, build)()
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(trains))
        names = ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules="all"))
        assert any(not name.startswith((last, head)) for name in names) == is_adapted
